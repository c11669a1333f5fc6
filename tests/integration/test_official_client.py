from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self
from zoneinfo import ZoneInfo

import pytest

from ingestor.clock import from_datetime
from ingestor.model import SECOND, Tick
from ingestor.protocol.messages import price_message, wall_time
from ingestor.protocol.port import PORT
from ingestor.simulator.server import TOKEN, Simulator
from ingestor.store.ticks import TickStore
from tests.clocks import HANG_SECONDS
from tests.integration.test_store import batcher, filled, tick
from tests.recording import recording, stored
from tests.relays import new_token, relaying
from tests.servers import query

PAGE = Path(__file__).parents[2] / "docs/how-to/subscribe.md"

RECORDED_SECONDS = float(os.environ.get("INGESTOR_TEST_CLIENT_SECONDS", "3"))
"""The time for which the official client records from a relay."""

NOW = from_datetime(datetime(2026, 3, 2, 1, 2, 3, tzinfo=UTC))

# The client is unchanged: it connects to ws://localhost:5005/ws without end, and calls back with each message.
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
    """The official client in a process of its own, with the arguments of its callbacks."""

    def __init__(self, token: str, log: Path) -> None:
        self.log = log
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CLIENT, token],
                env={**os.environ, "no_proxy": "localhost"},  # the client would use a proxy for localhost too
                stdout=subprocess.PIPE,
                stderr=errors,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    async def messages(self, count: int) -> list[Any]:
        """Return the next messages; if one does not come, fail with what the client logged."""
        assert self.process.stdout is not None
        found: list[Any] = []
        while len(found) < count:
            try:
                line = await asyncio.wait_for(asyncio.to_thread(self.process.stdout.readline), HANG_SECONDS)
            except TimeoutError:
                line = b""
            if not line:
                pytest.fail(f"{len(found)} of {count} messages arrived; the client's log:\n{self.log.read_text()}")
            found.append(json.loads(line))
        return found


@pytest.fixture(autouse=True)
def _port_is_free() -> None:
    """Fail if another process listens on the client's fixed port."""
    for family, _, _, _, address in socket.getaddrinfo("localhost", PORT, type=socket.SOCK_STREAM):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            if probe.connect_ex(address) == 0:
                pytest.fail(f"Port {PORT} of {address[0]} is in use; the official client can use no other.")


async def test_receives_every_price(tmp_path: Path) -> None:
    """The unchanged official client authenticates and receives every price in order."""
    ticks = [Tick("AIR.NZ", NOW + n * SECOND, n / 8, n) for n in range(200)]
    async with Simulator(port=PORT, rate=0) as simulator:
        with Client(TOKEN, tmp_path / "log") as client:
            async with asyncio.timeout(HANG_SECONDS):
                await simulator.wait_connected()
            simulator.send(ticks)
            first, *prices = await client.messages(1 + len(ticks))
    assert first["type"] == "authenticated"
    assert isinstance(first["data"]["message"], str)
    zone = ZoneInfo("Pacific/Auckland")
    assert prices == [json.loads(price_message(tick, zone)) for tick in ticks]
    assert prices[0]["data"]["date"] == wall_time(NOW, zone) == "2026-03-02T14:02:03"


@pytest.mark.timeout(120 + RECORDED_SECONDS)
async def test_records_from_a_relay(writer_url: str, database: str, tmp_path: Path) -> None:
    """The unchanged official client records each tick that a daemon stores from a relay, once and in order."""
    token = await new_token(database)
    async with relaying(database, relay_port=PORT), recording(writer_url, heartbeat="5s") as (market, _):
        with Client(token, tmp_path / "log") as client:
            (first,) = await client.messages(1)
            assert first["type"] == "authenticated"
            prices: list[Any] = []
            reading = asyncio.create_task(_read(client, prices))
            with contextlib.suppress(TimeoutError):
                await market.trade_for(RECORDED_SECONDS)
            await stored(database, market)
            async with asyncio.timeout(HANG_SECONDS):
                while len(prices) < market.sent:
                    await asyncio.sleep(0.02)
            reading.cancel()
    rows = await query(database, "SELECT symbol, time, price, volume FROM market.ticks ORDER BY received_at, volume")
    zone = ZoneInfo("Pacific/Auckland")
    assert [price["type"] for price in prices] == ["price"] * len(rows)
    assert [price["data"] for price in prices] == [
        {"date": time.astimezone(zone).isoformat(), "price": price, "volume": volume, "symbol": symbol}
        for symbol, time, price, volume in rows
    ]


async def _read(client: Client, prices: list[Any]) -> None:
    while True:
        prices.extend(await client.messages(1))


async def test_the_lines_of_the_page(writer_url: str, database: str) -> None:
    """The page's lines with the official client print the prices that a relay sends."""
    snippet = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)[1]
    token = await new_token(database)
    store = TickStore(writer_url, write_timeout=10)
    async with relaying(database, relay_port=PORT) as relay:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", snippet,
            env={**os.environ, "RELAY_TOKEN": token, "no_proxy": "localhost"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            async with asyncio.timeout(HANG_SECONDS):
                while not relay.hub.live:
                    await asyncio.sleep(0.02)
            await store.write([filled(batcher(), tick("AIR.NZ", price=2.5))])
            assert process.stdout is not None
            line = await asyncio.wait_for(process.stdout.readline(), HANG_SECONDS)
        finally:
            process.kill()
            await process.wait()
            await store.close()
    assert line.decode() == "2026-03-02T13:00:00+13:00 AIR.NZ 2.5\n"


@pytest.mark.parametrize("token", ["tk_wrong_token_00001", "pk_simulator_0123456"])
async def test_a_bad_token_is_refused(token: str, tmp_path: Path) -> None:
    """A wrong token, and one of another region, get the documented error and no price."""
    async with Simulator(port=PORT, rate=0) as simulator:
        with Client(token, tmp_path / "log") as client:
            (message,) = await client.messages(1)
        assert simulator.accounts == []
    assert message["type"] == "error"
    assert "not authorised" in message["data"]["message"]
