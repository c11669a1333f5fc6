from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any, Self
from zoneinfo import ZoneInfo

import pytest

from ingestor.model import SECOND, Tick
from ingestor.simulator.server import PORT, TOKEN, Simulator
from ingestor.simulator.wire import price_message, wall_time

NOW = int(datetime(2026, 3, 2, 1, 2, 3, tzinfo=UTC).timestamp()) * SECOND

# The client as it is: it connects to ws://localhost:5005/ws, for ever, and calls back with each message.
CLIENT = """
import json, sys
from financefeast.common import EnvironmentsStream
from financefeast.stream import Stream

def on_data(stream, data):
    # With the current websocket-client, the client hands on the text as it came, as bytes.
    print(json.dumps(data if isinstance(data, dict) else json.loads(data)), flush=True)

Stream(sys.argv[1], on_data=on_data, environment=EnvironmentsStream.local).connect()
"""


class Client:
    """The official client in a process of its own, and what it was called back with."""

    def __init__(self, token: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, token],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    async def messages(self, count: int) -> list[Any]:
        import asyncio

        assert self.process.stdout is not None
        read = self.process.stdout.readline
        return [json.loads(await asyncio.wait_for(asyncio.to_thread(read), 30)) for _ in range(count)]


async def test_receives_exactly_what_was_sent() -> None:
    """The official client, unchanged, authenticates and is called back with every price, in order."""
    ticks = [Tick("AIR.NZ", NOW + n * SECOND, n / 8, n) for n in range(200)]
    async with Simulator(port=PORT, rate=0) as simulator:
        with Client(TOKEN) as client:
            await simulator.wait_connected()
            simulator.send(ticks)
            first, *prices = await client.messages(1 + len(ticks))
    assert first["type"] == "authenticated"
    assert isinstance(first["data"]["message"], str)
    zone = ZoneInfo("Pacific/Auckland")
    assert prices == [json.loads(price_message(tick, zone)) for tick in ticks]
    assert prices[0]["data"]["date"] == wall_time(NOW, zone) == "2026-03-02T14:02:03"


@pytest.mark.parametrize("token", ["tk_wrong_token_00001", "pk_simulator_0123456"])
async def test_a_bad_token_is_refused(token: str) -> None:
    """A wrong token, and one of another region, get the documented error and nothing more."""
    async with Simulator(port=PORT, rate=0) as simulator:
        with Client(token) as client:
            (message,) = await client.messages(1)
        assert simulator.accounts == []
    assert message["type"] == "error"
    assert "not authorised" in message["data"]["message"]
