"""Market, daemon and database fail through a whole day; afterwards every minute equals the market's own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ingestor.backfill.instruments import Refresh, refresh_instruments
from ingestor.clock import UNCOMPARED, ClockDifference, from_datetime
from ingestor.model import SECOND
from ingestor.service.daemon import Daemon
from ingestor.service.process import StopRequest
from ingestor.settings import Settings
from ingestor.simulator.market import Market
from ingestor.simulator.server import Simulator
from ingestor.store import clocks
from ingestor.store.gaps import Bounds
from tests.clocks import HANG_SECONDS, SteppedClock
from tests.integration.test_backfill import job
from tests.recording import settings
from tests.servers import TestServer, query
from tests.sessions import BEGINS, ENDS, MINUTE, OPENS, execute


class Day:
    """A market and a daemon on one clock, which the test advances."""

    def __init__(self, simulator: Simulator, clock: SteppedClock, configuration: Settings) -> None:
        self.simulator = simulator
        self.clock = clock
        self._configuration = configuration
        self._market = Market(3, 4.0, clock.wall())
        self._counted = 0

    async def start(self) -> None:
        """Start a daemon like a process: it knows only its settings and its spool."""
        self._counted = sum(account.sent for account in self.simulator.accounts)
        self._request = StopRequest()
        self._daemon = Daemon(self._configuration, clock=self.clock)
        self._task = asyncio.create_task(self._daemon.run(self._request))
        while not self.simulator.connected:
            await self._step(trading=False)

    async def trade(self, minutes: float) -> None:
        """Advance the clock with trades, received or not."""
        until = self.clock.wall() + round(minutes * 60) * SECOND
        while self.clock.wall() < until:
            await self._step(trading=True)

    async def rest(self, minutes: float) -> None:
        """Advance the clock without trades."""
        until = self.clock.wall() + round(minutes * 60) * SECOND
        while self.clock.wall() < until:
            await self._step(trading=False)

    async def cut(self) -> None:
        """Cut the connection; it is reopened as time passes."""
        self.simulator.drop_all()
        await self.simulator.wait_connected(0)

    async def _step(self, *, trading: bool) -> None:
        self.clock.advance(0.5)
        ticks = self._market.until(self.clock.wall())
        if trading:
            self.simulator.send(ticks)
        await asyncio.sleep(0.001)
        sent = sum(account.sent for account in self.simulator.accounts) - self._counted
        async with asyncio.timeout(HANG_SECONDS):
            while not self._task.done() and self._daemon.telemetry.counts.messages < sent:
                await asyncio.sleep(0.001)

    async def stop(self) -> None:
        """Send SIGTERM."""
        self._request()
        await asyncio.wait_for(self._task, HANG_SECONDS)

    async def crash(self) -> None:
        """End the daemon as by SIGKILL: ticks in memory are lost, and no end is recorded."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def calendar_of_one_day(database: str) -> None:
    """Return a trading day of 40 minutes, with lead and tail of five minutes."""
    await execute(database, "DELETE FROM ingest.trading_sessions")
    await execute(
        database,
        "INSERT INTO ingest.trading_sessions VALUES ('XNZE', '2026-11-20', $1, $2)",
        OPENS, OPENS + 40 * MINUTE,
    )  # fmt: skip
    await execute(database, "UPDATE ingest.settings SET coverage_lead = '5 min', coverage_tail = '5 min'")


async def allow_connections(server: TestServer, database: str, allowed: bool) -> None:
    name = database.rpartition("/")[2]
    await server.run(f"ALTER DATABASE {name} ALLOW_CONNECTIONS {allowed}")
    if not allowed:
        await server.run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")


async def as_scripted(*_: object) -> ClockDifference:
    """Let the database's clock show the time of the script too; a difference would count as a wrong clock."""
    return UNCOMPARED


async def test_a_scripted_day(
    writer_url: str, database: str, server: TestServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After cuts, a crash, a database outage and the backfill, every minute of every symbol is the market's own."""
    monkeypatch.setattr(clocks, "compare_clocks", as_scripted)
    await calendar_of_one_day(database)
    clock = SteppedClock(from_datetime(OPENS - 5 * MINUTE))
    async with Simulator(port=0, rate=0, market_clock=clock.wall) as simulator:
        day = Day(
            simulator,
            clock,
            settings(
                simulator,
                writer_url,
                exchange_calendar="XNZE",
                ping_interval="1s",
                heartbeat="1s",
                batch_max_delay="1ms",
                reconnect_max_delay="2s",
                spool_dir=tmp_path / "day",
            ),
        )
        await day.start()
        await day.rest(1.5)
        await day.trade(6)
        await day.cut()
        await day.trade(5)
        await allow_connections(server, database, False)
        await day.trade(4)
        await allow_connections(server, database, True)
        await day.trade(4)
        await day.crash()
        await day.trade(2.3)
        await day.start()
        await day.trade(3.2)
        await allow_connections(server, database, False)
        await day.trade(2.1)
        await day.crash()  # with the last minutes in the spool
        await allow_connections(server, database, True)
        await day.trade(1)
        await day.start()
        await day.trade(4)
        await day.cut()
        await day.trade(13)
        await day.rest(4.5)
        await day.stop()
        open_gaps = await query(database, "SELECT cause, status FROM market.gaps ORDER BY started_at")
        assert [cause for cause, _ in open_gaps] == [
            "the connection was closed or cut",
            "the process died without a word",
            "the process died without a word",
            "the connection was closed or cut",
        ]
        assert {status for _, status in open_gaps} == {"open"}
        async with job(writer_url, simulator.rest_url, clock) as (backfill, gap_store):
            assert await refresh_instruments(gap_store, backfill._client) == Refresh(36)
            await backfill.begin(await backfill.plan(Bounds()))
            summary = await backfill.run(await backfill.requests(Bounds()))
        assert (summary.pending, summary.unfillable) == (0, 0)
        assert summary.filled > 36
        start, end = (from_datetime(moment) for moment in (BEGINS, ENDS))
        symbols = {symbol for (symbol,) in await query(database, "SELECT symbol FROM market.instruments")}
        expected = {
            (symbol, bar.start // SECOND): (bar.open, bar.high, bar.low, bar.close, bar.volume)
            for symbol in symbols
            for bar in simulator.bars.of(symbol, start, end, lambda minute: minute)
        }
    rows = await query(database, "SELECT * FROM market.bars_1m")
    assert {(row[0], round(row[1].timestamp())): row[2:7] for row in rows} == expected
    assert len(rows) == len(expected)
    sources = [row[7] for row in rows]
    assert min(sources.count("stream"), sources.count("backfill")) > 100
    assert {status for (status,) in await query(database, "SELECT status FROM market.gaps")} == {"backfilled"}
    assert await query(database, "SELECT percent FROM market.coverage") == [(100,)]
    listed = await query(database, "SELECT count(*), count(company_name), count(last_seen) FROM market.instruments")
    assert listed[0][:2] == (36, 36)
    assert listed[0][2] > 25
