"""A clock that differs from the database's is reported, and affects neither liveness nor coverage."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog

from ingestor.clock import ClockDifference, SystemClock, from_datetime
from ingestor.model import SECOND, EndReason, SessionEnd
from ingestor.service.daemon import Daemon
from ingestor.service.process import StopRequest
from ingestor.simulator.server import TOKEN, Simulator
from ingestor.store.ticks import TickStore
from tests.clocks import HANG_SECONDS, SkewedClock
from tests.http import Window
from tests.integration.test_store import batcher, filled, session, tick
from tests.processes import ROOT, DaemonProcess
from tests.proxy import Proxy
from tests.recording import COUNT, Market, settings, stored, until
from tests.servers import query
from tests.sessions import execute

ALWAYS = "UPDATE ingest.settings SET calendar = 'always'"
GAPS = "SELECT started_at, ended_at, cause, status FROM market.gaps ORDER BY started_at"
FUTURE = "SELECT count(*) FROM ingest.covered WHERE upper(span) > now() OR upper(expected) > now()"
SEEN = "SELECT count(*) FROM ingest.stream_sessions WHERE last_seen_at IS NOT NULL"


@contextlib.asynccontextmanager
async def skewed(url: str, clock: SkewedClock, **changes: Any) -> AsyncIterator[tuple[Market, Daemon]]:
    """Run a market and a daemon whose clock is wrong."""
    request = StopRequest()
    async with Simulator(port=0, rate=0) as simulator:
        daemon = Daemon(settings(simulator, url, **changes), clock=clock)
        task = asyncio.create_task(daemon.run(request))
        try:
            await simulator.wait_connected()
            yield Market(simulator), daemon
        finally:
            request()
            await asyncio.wait_for(task, HANG_SECONDS)


async def test_a_clock_that_is_behind(writer_url: str, database: str) -> None:
    """A live daemon has no gap; its clock's lag is in the log, the JSON and the metrics.

    Coverage does not begin before the session either.
    """
    await execute(database, ALWAYS)
    ((before,),) = await query(database, "SELECT now()")
    with structlog.testing.capture_logs() as lines:
        async with skewed(writer_url, SkewedClock(-180)) as (market, daemon):
            market.trade()
            await stored(database, market)
            await until(database, SEEN, 1)
            assert await query(database, GAPS) == []
            async with Window(daemon.http.url) as window:
                assert await window.metric("ingestor_clock_difference_seconds") == pytest.approx(-180, abs=30)
                _, status = await window.get("/status")
            assert status["clock"]["ahead_seconds"] == pytest.approx(-180, abs=30)
            assert status["clock"]["is_wrong"] is True
    (reported,) = [line for line in lines if line["event"] == "clocks_compared"]
    assert reported["log_level"] == "warning"
    assert reported["ahead"] == pytest.approx(-180, abs=30)
    assert await query(database, "SELECT lower(expected) FROM ingest.covered WHERE NOT isempty(span)") == []
    assert (await query(database, "SELECT min(authenticated_at) FROM ingest.stream_sessions"))[0][0] >= before


async def test_a_clock_that_is_ahead(writer_url: str, database: str) -> None:
    """Future time is never covered, neither when it is written nor when it comes, and nothing fails."""
    await execute(database, f"{ALWAYS}, coverage_since = now() - interval '10 minutes'")
    async with skewed(writer_url, SkewedClock(180)) as (market, daemon):
        market.trade()
        await stored(database, market)
        await until(database, "SELECT count(*) FROM ingest.stream_sessions WHERE covered_until IS NOT NULL", 1)
        assert await query(database, FUTURE) == [(0,)]
        assert len(await query(database, GAPS)) == 1
        difference = daemon.telemetry.clock_difference
        assert difference is not None
        assert difference.most_ahead > 100 * SECOND
    sql = "SELECT covered_until <= now(), last_message_at <= now() FROM ingest.stream_sessions"
    assert await query(database, sql) == [(True, True)]


async def test_clocks_that_agree(writer_url: str, database: str) -> None:
    """Equal clocks are reported without a warning."""
    with structlog.testing.capture_logs() as lines:
        async with skewed(writer_url, SkewedClock(0)) as (market, daemon):
            market.trade()
            await stored(database, market)
            assert daemon.telemetry.clock_difference is not None
            assert not daemon.telemetry.clock_difference.is_large
    assert [line["log_level"] for line in lines if line["event"] == "clocks_compared"] == ["info"]


@pytest.mark.parametrize(
    ("ahead", "error", "is_large", "most"),
    [
        (0.9, 0.0, False, (0.0, 0.0)),
        (-0.9, 0.0, False, (0.0, 0.0)),
        (3.0, 0.5, True, (3.5, 0.0)),
        (-3.0, 0.5, True, (0.0, 3.5)),
        (3.0, 2.5, False, (0.0, 0.0)),
        (-3.0, 2.5, False, (0.0, 0.0)),
    ],
)
def test_a_slow_answer_does_not_mean_a_wrong_clock(
    ahead: float, error: float, is_large: bool, most: tuple[float, float]
) -> None:
    """The round trip limits precision: a difference counts if it exceeds the error by more than a second."""
    difference = ClockDifference(round(ahead * SECOND), round(error * SECOND))
    assert difference.is_large is is_large
    assert (difference.most_ahead / SECOND, difference.most_behind / SECOND) == most


@pytest.mark.parametrize("skew", [180, -180])
async def test_coverage_ends_at_the_earlier_clock(writer_url: str, database: str, skew: int) -> None:
    """Coverage ends at the earlier clock, also for spooled batches; a clock that is set is compared again."""
    clock = SkewedClock(0)
    store = TickStore(writer_url, write_timeout=10, clock=clock)
    await store.write([filled(batcher())])
    clock.skew = skew * SECOND
    begins = SystemClock().wall() - 3600 * SECOND
    ends = begins + 600 * SECOND
    instance = batcher(session(connected_at=begins + clock.skew))
    instance.authenticated(begins + clock.skew)
    instance.cover(ends + clock.skew)
    await store.write([instance.close()])
    await store.close()
    sql = "SELECT authenticated_at, covered_until FROM ingest.stream_sessions WHERE authenticated_at IS NOT NULL"
    found = [from_datetime(at) for at in (await query(database, sql))[0]]
    latest, earliest = max(begins, begins + clock.skew), min(ends, ends + clock.skew)
    assert -SECOND < found[0] - latest < 60 * SECOND
    assert -SECOND < earliest - found[1] < 60 * SECOND


async def test_coverage_never_ends_in_the_future(writer_url: str, database: str) -> None:
    """Coverage never ends in the future, also in a batch that is written after the clock was corrected."""
    store = TickStore(writer_url, write_timeout=10)
    now = SystemClock().wall()
    instance = batcher(session(connected_at=now))
    instance.authenticated(now)
    instance.cover(now + 3600 * SECOND)
    await store.write([instance.close()])
    await store.write([instance.close()])
    await store.close()
    assert await query(database, "SELECT covered_until <= now() FROM ingest.stream_sessions") == [(True,)]


async def test_a_clock_change_between_two_starts(writer_url: str, database: str) -> None:
    """A session that seems to begin after its successor's start is still ended."""
    store = TickStore(writer_url, write_timeout=10)
    later = SystemClock().wall() + 3600 * SECOND
    earlier = batcher(session(instance="one", connected_at=later))
    earlier.authenticated(later)
    await store.write([earlier.close()])
    await store.close()
    async with skewed(writer_url, SkewedClock(0), instance="one"):
        await until(database, "SELECT count(*) FROM ingest.stream_sessions WHERE end_reason = 'crashed'", 1)
        await until(database, "SELECT count(*) FROM ingest.stream_sessions WHERE end_reason IS NULL", 1)
    assert await query(database, "SELECT count(*) FROM ingest.stream_sessions WHERE end_reason = 'crashed'") == [(1,)]


async def test_ticks_of_a_clock_that_is_years_ahead_are_written(writer_url: str, database: str) -> None:
    """Partitions are made ahead of the database's month, and lateness is measured by its clock."""
    store = TickStore(writer_url, write_timeout=10, clock=SkewedClock(3 * 365 * 86_400))
    now = SystemClock().wall() // SECOND * SECOND
    assert (await store.write([filled(batcher(), tick(time=now))])).ticks == 1
    await store.close()
    assert await query(database, "SELECT count(*) FROM ingest.stale_bars") == [(0,)]


async def test_the_spool_of_a_dead_process(writer_url: str, database: str, tmp_path: Path) -> None:
    """A successor that writes a dead process's spool does not revive it: its session is crashed, with one gap."""
    await execute(database, f"{ALWAYS}, coverage_since = now() - interval '1 minute'")
    async with Simulator(port=0, rate=0) as simulator, Proxy(writer_url) as wire:
        there = settings(simulator, wire.url, spool_dir=tmp_path / "spool", spool_after="10ms")
        wire.refuses = True
        daemon = Daemon(there)
        task = asyncio.create_task(daemon.run(StopRequest()))
        await simulator.wait_connected()
        market = Market(simulator)
        market.trade()
        async with asyncio.timeout(HANG_SECONDS):
            while daemon.telemetry.counts.messages < market.sent or daemon.buffer.in_memory:
                await asyncio.sleep(0.01)
        task.cancel()  # as if it were killed: its end is not recorded
        await asyncio.gather(task, return_exceptions=True)
        wire.refuses = False
        await simulator.wait_connected(0)
        daemon = Daemon(there)
        request = StopRequest()
        task = asyncio.create_task(daemon.run(request))
        await stored(database, market)
        await until(database, "SELECT count(*) FROM ingest.stream_sessions WHERE last_seen_at IS NOT NULL", 1)
        request()
        await asyncio.wait_for(task, HANG_SECONDS)
    rows = await query(
        database, "SELECT end_reason, last_seen_at IS NULL FROM ingest.stream_sessions ORDER BY connected_at"
    )
    assert rows == [("crashed", True), ("stopped", False)]


async def test_inherited_sessions_do_not_count_as_alive(writer_url: str, database: str) -> None:
    """Inherited batches are no sign of life, even of a session that was seen before; the process's own writes are."""
    store = TickStore(writer_url, write_timeout=10)
    instance, seen = batcher(), "SELECT last_seen_at FROM ingest.stream_sessions"
    await store.write_inherited([filled(instance, tick())])
    assert await query(database, seen) == [(None,)]
    await store.write([filled(instance, tick("B"))])
    ((first,),) = await query(database, seen)
    assert abs(first - datetime.now(UTC)) < timedelta(seconds=60)
    await store.write_inherited([filled(instance, tick("C"))])
    assert await query(database, seen) == [(first,)]
    await store.write([instance.close(SessionEnd(SystemClock().wall(), EndReason.CLOSED))])
    assert (await query(database, seen))[0][0] > first
    await store.close()


async def test_a_process_with_a_wrong_clock(writer_url: str, database: str, tmp_path: Path) -> None:
    """`ingestor run` records with a wrong clock, `ingestor check` warns of it, and no future time is covered."""
    async with Simulator(port=0, rate=0) as simulator:
        environment = {
            "token": TOKEN,
            "stream_url": simulator.stream_url,
            "database_url": writer_url,
            "exchange_calendar": "always",
            "spool_dir": tmp_path / "spool",
            "heartbeat": "100ms",
        }
        daemon = DaemonProcess(tmp_path / "log", **environment)
        daemon.skew = 180
        daemon.start()
        try:
            await simulator.wait_connected()
            market = Market(simulator)
            market.trade()
            await until(database, COUNT, market.sent)
            assert daemon.stop() == 0
        finally:
            daemon.end()
        found = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "tests.skewed", "check"],
            env={f"INGESTOR_{name.upper()}": str(value) for name, value in environment.items()}
            | {"SKEW_SECONDS": "-180", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert "clocks_compared" in daemon.tail()
    assert await query(database, FUTURE) == [(0,)]
    assert "clock" in found.stdout
    assert "behind the" in found.stdout, found.stdout + found.stderr
