"""A daemon with its settings and a market of distinct ticks, for the tests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from ingestor.clock import from_datetime
from ingestor.model import Tick
from ingestor.service.daemon import Daemon
from ingestor.service.process import StopRequest
from ingestor.settings import Settings, load_settings
from ingestor.simulator.server import TOKEN, Simulator
from ingestor.store.connect import connect
from tests.clocks import HANG_SECONDS
from tests.servers import query

COUNT = "SELECT count(*) FROM market.ticks"
ENDS = "SELECT end_reason FROM ingest.stream_sessions ORDER BY connected_at"
TOTALS = "SELECT sum(ticks)::int, sum(duplicates)::int, sum(rejected)::int FROM ingest.stream_sessions"
NOW = from_datetime(datetime.now(UTC).replace(microsecond=0))


def settings(simulator: Simulator, database: str, **changes: Any) -> Settings:
    defaults = {
        "stream_url": simulator.stream_url,
        "token": TOKEN,
        "database_url": database,
        "exchange_calendar": "always",
        "reconnect_max_delay": "50ms",
        "heartbeat": "100ms",
        "ping_interval": "50ms",
        "ping_timeout": "2s",
    }
    return load_settings(**{**defaults, **changes})


@contextlib.asynccontextmanager
async def running(configuration: Settings, **parts: Any) -> AsyncIterator[Daemon]:
    """Run a daemon of these parts, and stop it in order at the end."""
    request = StopRequest()
    daemon = Daemon(configuration, **parts)
    task = asyncio.create_task(daemon.run(request))
    try:
        yield daemon
    finally:
        request()
        await asyncio.wait_for(task, HANG_SECONDS)


async def until(url: str, sql: str, expected: Any) -> None:
    """Wait until a query's single value is the expected one."""
    async with asyncio.timeout(HANG_SECONDS):
        connection = await connect(url)
        try:
            while await connection.fetchval(sql) != expected:
                await asyncio.sleep(0.02)
        finally:
            await connection.close()


async def received(daemon: Daemon, messages: int) -> None:
    """Wait until the daemon has received so many messages."""
    async with asyncio.timeout(HANG_SECONDS):
        while daemon.telemetry.counts.messages < messages:
            await asyncio.sleep(0.01)


class Market:
    """Sends ticks that differ from each other, so that each has a row of its own."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self.sent = 0

    def trade(self, count: int = 100) -> None:
        self._simulator.send([Tick("AIR.NZ", NOW, 0.5, self.sent + number) for number in range(count)])
        self.sent += count

    def refused(self) -> None:
        """Trade at a price that a careful administrator would not allow."""
        self._simulator.send([Tick("AIR.NZ", NOW, -0.5, 1)])

    async def trade_for(self, seconds: float) -> None:
        """Trade a little every few milliseconds."""
        async with asyncio.timeout(seconds):
            while True:
                self.trade(5)
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def recording(url: str, *, parts: Any = None, **changes: Any) -> AsyncIterator[tuple[Market, Any]]:
    """Run a market and a daemon that receives it."""
    async with (
        Simulator(port=0, rate=0) as simulator,
        running(settings(simulator, url, **changes), **(parts or {})) as daemon,
    ):
        await simulator.wait_connected()
        yield Market(simulator), daemon


async def stored(url: str, market: Market) -> None:
    """Wait until each tick has its row, and check that none was counted twice."""
    await until(url, COUNT, market.sent)
    assert (await query(url, TOTALS))[0][:2] == (market.sent, 0)
