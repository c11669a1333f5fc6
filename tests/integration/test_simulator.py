from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from ingestor.errors import ConfigurationError
from ingestor.model import Tick
from ingestor.simulator.faults import GARBAGE
from ingestor.simulator.server import TOKEN, Simulator

GOOD = json.dumps({"type": "authenticate", "data": {"token": TOKEN}})


@asynccontextmanager
async def authenticated(simulator: Simulator) -> AsyncIterator[ClientConnection]:
    async with connect(simulator.stream_url, close_timeout=0.2, ping_interval=None) as client:
        await client.send(GOOD)
        assert json.loads(await client.recv())["type"] == "authenticated"
        yield client


@pytest.mark.parametrize(
    "first",
    [
        json.dumps({"type": "authenticate", "data": {"token": "tk_wrong_token_00001"}}),
        json.dumps({"type": "authenticate", "data": {"token": "pk_simulator_0123456"}}),
        json.dumps({"type": "authenticate", "data": TOKEN}),
        json.dumps({"type": "subscribe", "data": {"token": TOKEN}}),
        json.dumps([TOKEN]),
        "hello",
        GOOD.encode(),  # a binary frame
    ],
)
async def test_refused(first: str | bytes) -> None:
    """Whatever is not the documented authentication gets `not authorised`, and the connection is closed."""
    async with Simulator(port=0, rate=0) as simulator, connect(simulator.stream_url) as client:
        await client.send(first)
        message = json.loads(await client.recv())
        assert message["type"] == "error"
        assert "not authorised" in message["data"]["message"]
        with pytest.raises(ConnectionClosed):
            await client.recv()


async def test_stream_limit() -> None:
    """One stream more than the plan allows gets an error with the limit in its text."""
    async with Simulator(port=0, rate=0, max_streams=1) as simulator, authenticated(simulator):
        async with connect(simulator.stream_url) as client:
            await client.send(GOOD)
            assert "stream limit of 1" in json.loads(await client.recv())["data"]["message"]


async def test_compression_is_negotiated() -> None:
    """permessage-deflate, as documented."""
    async with Simulator(port=0, rate=0) as simulator, authenticated(simulator) as client:
        assert client.response is not None
        assert "permessage-deflate" in client.response.headers["Sec-WebSocket-Extensions"]


async def test_both_apis_share_a_port() -> None:
    """REST is answered over HTTP beside the stream, and its bars contain what was streamed."""
    async with Simulator(port=0, rate=500) as simulator:
        async with authenticated(simulator) as client:
            for _ in range(100):
                await client.recv()
        await simulator.stop_market()
        async with httpx.AsyncClient(base_url=simulator.rest_url) as http:
            alive = await http.get("/health/alive")
            refused = await http.get("/data/last", params={"ticker": "FPH.NZ"})
            last = await http.get(
                "/data/last", params={"ticker": "fph.nz"}, headers={"Authorization": f"Bearer {TOKEN}"}
            )
    assert (alive.status_code, refused.status_code, last.status_code) == (200, 403, 200)
    assert alive.headers["x-ratelimit-remaining"].isdigit()
    assert last.json()["data"][0]["volume"] > 0


async def test_port_taken() -> None:
    """A port that is in use is said in one line."""
    async with Simulator(port=0, rate=0) as simulator:
        port = int(simulator.rest_url.rpartition(":")[2])
        with pytest.raises(ConfigurationError, match=f"cannot listen on 127.0.0.1:{port}"):
            async with Simulator(port=port, rate=0):
                pass


async def test_drop() -> None:
    """The connection is cut, without a closing handshake."""
    async with Simulator(port=0, rate=0, faults=["drop=10ms"]) as simulator, authenticated(simulator) as client:
        with pytest.raises(ConnectionClosed) as caught:
            await client.recv()
        assert caught.value.rcvd is None


@pytest.mark.parametrize(("fault", "answers"), [("stall=1ms", True), ("half-open=1ms", False)])
async def test_mute(fault: str, answers: bool) -> None:
    """A stalled connection still answers pings, a half-open one does not; neither sends a message."""
    async with Simulator(port=0, rate=0, faults=[fault]) as simulator, authenticated(simulator) as client:
        async with asyncio.timeout(5):
            while not simulator.accounts[0].muted:
                await asyncio.sleep(0.01)
        simulator.send([Tick("AIR.NZ", 0, 1.0, 1)])
        pong = await client.ping()
        done, _ = await asyncio.wait({asyncio.ensure_future(pong)}, timeout=5 if answers else 0.2)
        assert bool(done) is answers
        assert simulator.ticks_sent == 0


async def test_garbage() -> None:
    """Malformed messages come between."""
    async with Simulator(port=0, rate=0, faults=["garbage=1ms"]) as simulator, authenticated(simulator) as client:
        assert {await client.recv() for _ in range(20)} <= set(GARBAGE)


async def test_replay() -> None:
    """After a reconnect the last messages come again, in order; on the first connection nothing does."""
    ticks = [Tick("AIR.NZ", 0, 1.0, number) for number in range(300)]
    async with Simulator(port=0, rate=0, faults=["replay"]) as simulator:
        async with authenticated(simulator) as client:
            simulator.send(ticks)
            first = [await client.recv() for _ in range(300)]
        async with authenticated(simulator) as client:
            assert [await client.recv() for _ in range(200)] == first[100:]


@pytest.mark.parametrize(("fault", "words"), [("reject", "not authorised"), ("limit", "stream limit")])
async def test_every_second_authentication_is_refused(fault: str, words: str) -> None:
    """The first is accepted, the second is not, the third is again."""
    async with Simulator(port=0, rate=0, faults=[fault], max_streams=9) as simulator:
        answers = []
        for _ in range(3):
            async with connect(simulator.stream_url) as client:
                await client.send(GOOD)
                answers.append(json.loads(await client.recv()))
    assert [answer["type"] for answer in answers] == ["authenticated", "error", "authenticated"]
    assert words in answers[1]["data"]["message"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_command(number: signal.Signals) -> None:
    """`ingestor simulate` says where it listens and what to set, and ends with 0 when it is asked to."""
    command = [sys.executable, "-m", "ingestor", "simulate", "--port", "0", "--rate", "10"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(6)]
        process.send_signal(number)
        rest = process.stdout.read()
    assert process.returncode == 0, rest
    assert "ws://127.0.0.1:" in lines[0]
    assert f"INGESTOR_TOKEN={TOKEN}" in lines[5]
    assert "Stopped" in rest


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--host", "0.0.0.0"], 78, "this machine only"),
        (["--fault", "explode"], 78, "explode"),
        (["--session", "x"], 2, "not a duration"),
        (["--wrong"], 2, "No such option"),
    ],
)
def test_wrong_options(arguments: list[str], status: int, words: str) -> None:
    """A wrong option is named."""
    command = [sys.executable, "-m", "ingestor", "simulate", "--port", "0", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert found.returncode == status
    assert words in found.stderr
