from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect as connect_sync

from ingestor.clock import from_datetime
from ingestor.errors import ConfigurationError
from ingestor.model import SECOND, Tick
from ingestor.protocol.messages import price_message
from ingestor.simulator import server
from ingestor.simulator.faults import GARBAGE
from ingestor.simulator.server import TOKEN, Simulator
from tests.clocks import HANG_SECONDS

GOOD = json.dumps({"type": "authenticate", "data": {"token": TOKEN}})
TICK = Tick("FPH.NZ", 0, 1.5, 1)


@asynccontextmanager
async def authenticated(simulator: Simulator) -> AsyncIterator[ClientConnection]:
    async with connect(simulator.stream_url, close_timeout=0.2, ping_interval=None, proxy=None) as client:
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
        json.dumps({"type": "authenticate"}),
        json.dumps({"type": "authenticate", "data": {"token": [TOKEN]}}),
        "[" * 100_000,
        "hello",
        "",
        GOOD.encode(),  # a binary frame
    ],
    ids=lambda first: repr(first[:60]),
)
async def test_refused(first: str | bytes) -> None:
    """Any message but the documented authentication gets `not authorised`, and the connection is closed."""
    async with Simulator(port=0, rate=0) as simulator, connect(simulator.stream_url, proxy=None) as client:
        await client.send(first)
        message = json.loads(await client.recv())
        assert message["type"] == "error"
        assert "not authorised" in message["data"]["message"]
        with pytest.raises(ConnectionClosed):
            await client.recv()
        assert simulator.accounts == []


async def test_no_authentication(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends nothing in time gets `not authorised`, and is closed."""
    monkeypatch.setattr(server, "AUTHENTICATION_TIMEOUT", 0.05)
    async with Simulator(port=0, rate=0) as simulator, connect(simulator.stream_url, proxy=None) as client:
        message = json.loads(await client.recv())
        assert message["type"] == "error"
        assert "not authorised" in message["data"]["message"]
        with pytest.raises(ConnectionClosed):
            await client.recv()


async def test_stream_limit() -> None:
    """One stream over the plan's limit gets the error and is closed; a closed stream frees its place."""
    async with Simulator(port=0, rate=0, max_streams=2) as simulator:
        async with authenticated(simulator) as first, authenticated(simulator) as second:
            await simulator.wait_connected(2)
            async with connect(simulator.stream_url, proxy=None) as third:
                await third.send(GOOD)
                message = json.loads(await third.recv())
                assert message["type"] == "error"
                assert "stream limit of 2" in message["data"]["message"]
                with pytest.raises(ConnectionClosed):
                    await third.recv()
            simulator.send([TICK])
            assert await first.recv() == await second.recv()
            await first.close()
            await simulator.wait_connected(1)
            async with authenticated(simulator):
                await simulator.wait_connected(2)


async def test_prices_come_as_documented() -> None:
    """The documented sample arrives as documented, to authenticated clients only."""
    time = from_datetime(datetime(2021, 9, 28, 20, 33, 30, tzinfo=UTC))
    async with Simulator(port=0, rate=0) as simulator, authenticated(simulator) as client:
        await simulator.wait_connected()
        async with connect(simulator.stream_url, proxy=None) as stranger:
            simulator.send([Tick("SUM020.NZ", time, 2.61, 5000)])
            message = await client.recv()
            await stranger.send(GOOD)
            assert json.loads(await stranger.recv())["type"] == "authenticated"
    sample = {"date": "2021-09-29T09:33:30", "price": 2.61, "volume": 5000, "symbol": "SUM020.NZ"}
    assert isinstance(message, str)
    assert json.loads(message) == {"type": "price", "data": sample}


async def test_compression_is_negotiated() -> None:
    """permessage-deflate is negotiated, as documented."""
    async with Simulator(port=0, rate=0) as simulator, authenticated(simulator) as client:
        assert client.response is not None
        assert "permessage-deflate" in client.response.headers["Sec-WebSocket-Extensions"]


async def test_both_apis_share_a_port() -> None:
    """REST is answered on the stream's port, with the bars of the messages that a client received."""
    first = int(datetime(2026, 3, 2, 1, tzinfo=UTC).timestamp())
    ticks = [Tick("FPH.NZ", (first + n) * SECOND, 30 + n % 7 / 4, n + 1) for n in range(100)]
    async with Simulator(port=0, rate=0, rate_limit=5, market_clock=lambda: first * SECOND) as simulator:
        async with authenticated(simulator) as client:
            await simulator.wait_connected()
            simulator.send(ticks)
            received = [json.loads(await client.recv())["data"] for _ in ticks]
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        span = {"datetime_from": "2026-03-02 14:00:00", "datetime_to": "2026-03-02 14:02:00"}
        assert urlsplit(simulator.rest_url).port == urlsplit(simulator.stream_url).port
        async with httpx.AsyncClient(base_url=simulator.rest_url, trust_env=False) as http:
            alive = await http.get("/health/alive")
            refused = await http.get("/data/intraday", params={"ticker": "FPH.NZ", **span})
            unknown = await http.get("/data/last", params={"ticker": "NOPE.NZ"}, headers=bearer)
            malformed = await http.get("/data/last", headers=bearer)
            bars = await http.get("/data/intraday", params={"ticker": "fph.nz", **span}, headers=bearer)
            too_many = await http.get("/health/alive")
    answers = (alive, refused, unknown, malformed, bars, too_many)
    assert [answer.status_code for answer in answers] == [200, 403, 404, 400, 200, 429]
    assert [answer.headers["x-ratelimit-remaining"] for answer in answers] == ["4", "3", "2", "1", "0", "0"]
    assert {answer.headers["content-type"] for answer in answers} == {"application/json"}
    assert all(answer.json()["message"] for answer in answers if answer.status_code != 200)
    expected = []
    for minute in ("2026-03-02T14:00", "2026-03-02T14:01"):
        trades = [each for each in received if each["date"].startswith(minute)]
        prices = [each["price"] for each in trades]
        bar = {"open": prices[0], "high": max(prices), "low": min(prices), "close": prices[-1]}
        expected.append({"timestamp": f"{minute}:00", **bar, "volume": sum(each["volume"] for each in trades)})
    assert bars.json()["data"] == expected


async def test_a_market_is_streamed() -> None:
    """A client receives the recorded ticks of the simulator in order."""
    async with Simulator(port=0, rate=500, record=True) as simulator, authenticated(simulator) as client:
        received = [json.loads(await client.recv()) for _ in range(100)]
        await simulator.stop_market()
        (account,) = simulator.accounts
        received += [json.loads(await client.recv()) for _ in range(account.sent - 100)]
    zone = ZoneInfo("Pacific/Auckland")
    assert received == [json.loads(price_message(tick, zone)) for tick in account.ticks]
    assert len(received) == simulator.ticks_sent


async def test_a_used_port() -> None:
    """A port in use is reported in one line; the command ends with 78."""
    async with Simulator(port=0, rate=0) as simulator:
        port = int(simulator.rest_url.rpartition(":")[2])
        with pytest.raises(ConfigurationError, match=f"cannot listen on 127.0.0.1:{port}"):
            async with Simulator(port=port, rate=0):
                pass
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "ingestor", "simulate", "--port", str(port)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        output, errors = await asyncio.wait_for(process.communicate(), HANG_SECONDS)
    assert process.returncode == 78
    assert output == b""
    (line,) = errors.decode().splitlines()
    assert line.startswith(f"ingestor: The simulator cannot listen on 127.0.0.1:{port}: ")
    assert line.endswith("Use another --port.")


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
        async with asyncio.timeout(HANG_SECONDS):
            while not simulator.accounts[0].muted:
                await asyncio.sleep(0.01)
        simulator.send([TICK])
        pong = await client.ping()
        done, _ = await asyncio.wait({asyncio.ensure_future(pong)}, timeout=HANG_SECONDS if answers else 0.2)
        assert bool(done) is answers
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.recv(), 0.05)  # the pong would have followed it


async def test_a_half_open_connection_frees_its_place() -> None:
    """A client that returns after half-open connections is not blocked by the plan's limit."""
    async with Simulator(port=0, rate=0, faults=["half-open=1ms"], max_streams=1) as simulator:
        for number in (1, 2, 3):
            async with authenticated(simulator):
                async with asyncio.timeout(HANG_SECONDS):
                    while len(simulator.accounts) < number or not simulator.accounts[-1].muted:
                        await asyncio.sleep(0.01)
            assert simulator.connected == 0


async def test_garbage() -> None:
    """Malformed messages come in addition to the good ones, and neither remove one nor end the connection."""
    garbage: list[str | bytes] = []
    good: list[str | bytes] = []
    simulator = Simulator(port=0, rate=200, faults=["garbage=1ms"], record=True)
    async with simulator, authenticated(simulator) as client:
        while len(garbage) < 20 or len(good) < 20:
            message = await client.recv()
            (garbage if message in GARBAGE else good).append(message)
    zone = ZoneInfo("Pacific/Auckland")
    assert good == [price_message(tick, zone).decode() for tick in simulator.accounts[0].ticks[: len(good)]]
    assert len(set(garbage)) > 1


async def test_replay() -> None:
    """After a reconnect the last messages are repeated in order; on the first connection none is."""
    ticks = [Tick("AIR.NZ", 0, 1.0, number) for number in range(300)]
    async with Simulator(port=0, rate=0, faults=["replay"]) as simulator:
        async with authenticated(simulator) as client:
            await simulator.wait_connected()
            simulator.send(ticks)
            first = [await client.recv() for _ in range(300)]
        await simulator.wait_connected(0)
        async with authenticated(simulator) as client:
            assert [await client.recv() for _ in range(200)] == first[100:]
            await simulator.wait_connected()
            simulator.send([TICK])
            assert json.loads(await client.recv())["data"]["symbol"] == TICK.symbol  # 200 at most
    assert len(set(first)) == 300


@pytest.mark.parametrize(
    ("fault", "words"), [("reject", "not authorised"), ("limit", "stream limit"), ("no-access", "no access")]
)
async def test_every_second_authentication_is_refused(fault: str, words: str) -> None:
    """The first authentication is accepted, the second refused, the third accepted."""
    async with Simulator(port=0, rate=0, faults=[fault], max_streams=9) as simulator:
        answers = []
        for _ in range(3):
            async with connect(simulator.stream_url, proxy=None) as client:
                await client.send(GOOD)
                answers.append(json.loads(await client.recv()))
    assert [answer["type"] for answer in answers] == ["authenticated", "error", "authenticated"]
    assert words in answers[1]["data"]["message"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_command(number: signal.Signals) -> None:
    """`ingestor simulate` prints its address, and ends with 0 after a signal, also with a client connected."""
    command = [sys.executable, "-m", "ingestor", "simulate", "--port", "0", "--rate", "10"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            lines = [process.stdout.readline().strip() for _ in range(6)]
            assert all(lines[:3]), lines
            stream, rest, token = (line.split()[-1] for line in lines[:3])
            with connect_sync(stream, proxy=None) as client:
                client.send(GOOD)
                answers = [json.loads(client.recv(10)) for _ in range(2)]
                alive = httpx.get(f"{rest}/health/alive", trust_env=False)
                process.send_signal(number)
                output = process.communicate(timeout=20)[0]
        finally:
            process.kill()
    assert process.returncode == 0, output
    assert re.fullmatch(r"ws://127\.0\.0\.1:[1-9]\d*/ws", stream)
    assert f"{rest}/ws".replace("http", "ws") == stream
    assert lines[5] == f"export INGESTOR_STREAM_URL={stream} INGESTOR_TOKEN={token}"
    assert token == TOKEN
    assert [answer["type"] for answer in answers] == ["authenticated", "price"]
    assert alive.status_code == 200
    assert "Stopped after" in output.splitlines()[-1]
    assert "Traceback" not in output


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
