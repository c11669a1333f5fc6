"""Daemons are killed, stopped, frozen and run twice: real processes, real signals."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ingestor.simulator.server import TOKEN, Simulator
from tests.processes import DaemonProcess
from tests.recording import COUNT, TOTALS, Market, recording, stored, until
from tests.servers import TestServer, query


def process_of(
    simulator_url: str, database: str, directory: Path, name: str = "daemon", **changes: Any
) -> DaemonProcess:
    """Return a daemon's process with its own spool."""
    defaults = {
        "stream_url": simulator_url,
        "token": TOKEN,
        "database_url": database,
        "exchange_calendar": "always",
        "spool_dir": directory / name,
        "instance": name,
        "reconnect_max_delay": "100ms",
        "heartbeat": "100ms",
        "ping_interval": "100ms",
        "ping_timeout": "2s",
        "log_format": "json",
    }
    return DaemonProcess(directory / f"{name}.log", **{**defaults, **changes})


@pytest.fixture
def ended() -> Iterator[list[DaemonProcess]]:
    """Yield a list of processes that are ended after the test."""
    processes: list[DaemonProcess] = []
    yield processes
    for each in processes:
        each.end()


async def test_killed_while_the_database_is_unavailable(
    writer_url: str, database: str, server: TestServer, tmp_path: Path, ended: list[DaemonProcess]
) -> None:
    """The next process writes the spool; the time from its end to the next session is not covered."""
    name = database.rpartition("/")[2]
    await server.run(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    async with Simulator(port=0, rate=0, record=True) as simulator:
        daemon = process_of(simulator.stream_url, writer_url, tmp_path)
        ended.append(daemon)
        daemon.start()
        await simulator.wait_connected()
        market = Market(simulator)
        for _ in range(10):
            market.trade()
            await asyncio.sleep(0.05)
        spooled = market.sent
        await asyncio.sleep(1.0)
        market.trade()  # not recorded by anyone
        daemon.kill()
        await simulator.wait_connected(0)
        await server.run(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        daemon.start()
        await simulator.wait_connected()
        await until(database, "SELECT count(*) FROM ingest.stream_sessions WHERE end_reason = 'crashed'", 1)
        rows = (await query(database, COUNT))[0][0]
        assert spooled <= rows <= market.sent
        market.trade()
        await until(database, COUNT, rows + 100)
        daemon.signal(signal.SIGTERM)
        assert await asyncio.to_thread(daemon.wait) == 0
    (crashed, next_one) = await query(
        database,
        "SELECT ticks, covered_until, authenticated_at, end_reason FROM ingest.stream_sessions ORDER BY connected_at",
    )
    ((last_row,),) = await query(
        database, f"SELECT max(received_at) FROM market.ticks WHERE received_at < '{next_one[2]}'"
    )
    assert crashed[0] == rows
    assert crashed[1] >= last_row
    assert crashed[1] < next_one[2]
    assert (crashed[3], next_one[3]) == ("crashed", "stopped")


async def test_killed_at_any_moment(writer_url: str, database: str, tmp_path: Path, ended: list[DaemonProcess]) -> None:
    """After SIGKILL at any moment of a busy market, covered ticks are stored, and none is stored twice."""
    chance = random.Random(7)
    async with Simulator(port=0, rate=0, record=True) as simulator:
        daemon = process_of(simulator.stream_url, writer_url, tmp_path)
        ended.append(daemon)
        market = Market(simulator)
        for _ in range(4):
            daemon.start()
            await simulator.wait_connected()
            with contextlib.suppress(TimeoutError):
                await market.trade_for(0.7 + chance.random() * 0.5)
            daemon.kill()
            await simulator.wait_connected(0)
        daemon.start()
        await simulator.wait_connected()
        await until(database, "SELECT count(*) FROM ingest.stream_sessions WHERE end_reason IS NOT NULL", 4)
        daemon.signal(signal.SIGTERM)
        assert await asyncio.to_thread(daemon.wait) == 0
        accounts = simulator.accounts
    sessions = await query(
        database,
        "SELECT (extract(epoch FROM covered_until) * 1000000)::bigint, ticks FROM ingest.stream_sessions "
        "ORDER BY connected_at",
    )
    assert len(sessions) == len(accounts) == 5
    stored_volumes = {row[0] for row in await query(database, "SELECT volume FROM market.ticks")}
    for account, (covered_until, ticks) in zip(accounts, sessions, strict=True):
        volumes = [tick.volume for tick in account.ticks]
        kept = [volume for volume in volumes if volume in stored_volumes]
        assert kept == volumes[: len(kept)]  # without a gap
        assert ticks == len(kept)
        latency = 400_000  # on a busy machine
        assert sum(at < covered_until - latency for at in account.sent_at) <= len(kept)
    assert (await query(database, TOTALS))[0][1] == 0


async def test_stopped_while_the_database_is_unavailable(
    writer_url: str, database: str, server: TestServer, tmp_path: Path, ended: list[DaemonProcess]
) -> None:
    """After SIGTERM without a database the exit status is 0 and all ticks are on disk; the next start stores them."""
    name = database.rpartition("/")[2]
    await server.run(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    async with Simulator(port=0, rate=0) as simulator:
        daemon = process_of(simulator.stream_url, writer_url, tmp_path)
        ended.append(daemon)
        daemon.start()
        await simulator.wait_connected()
        market = Market(simulator)
        market.trade()
        await asyncio.sleep(0.3)
        daemon.signal(signal.SIGTERM)
        assert await asyncio.to_thread(daemon.wait, 10) == 0
        await server.run(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        daemon.start()
        await stored(database, market)
        await until(database, "SELECT count(*) FROM ingest.stream_sessions WHERE end_reason = 'stopped'", 1)
    assert "spool_not_empty" in daemon.log.read_text()


async def test_two_processes_and_one_spool(writer_url: str, tmp_path: Path, ended: list[DaemonProcess]) -> None:
    """The second process ends with 78 and the remedy; the first one continues."""
    async with Simulator(port=0, rate=0) as simulator:
        first = process_of(simulator.stream_url, writer_url, tmp_path, "first")
        second = process_of(simulator.stream_url, writer_url, tmp_path, "second", spool_dir=tmp_path / "first")
        ended += [first, second]
        first.start()
        await simulator.wait_connected()
        second.start()
        assert await asyncio.to_thread(second.wait, 20) == 78
        assert f"in use by another ingestor (process {first.pid})" in second.log.read_text()
        assert first.is_running


async def test_two_instances(writer_url: str, database: str, tmp_path: Path, ended: list[DaemonProcess]) -> None:
    """Two instances on one feed are killed in turn: the union of their ticks is stored, each once."""
    async with Simulator(port=0, rate=0, max_streams=4) as simulator:
        pair = [process_of(simulator.stream_url, writer_url, tmp_path, name) for name in ("one", "two")]
        ended += pair
        for each in pair:
            each.start()
        await simulator.wait_connected(2)
        market = Market(simulator)
        for turn in range(4):
            with contextlib.suppress(TimeoutError):
                await market.trade_for(0.4)
            pair[turn % 2].kill()
            with contextlib.suppress(TimeoutError):
                await market.trade_for(0.4)
            pair[turn % 2].start()
            await simulator.wait_connected(2)
        market.trade()
        await until(database, COUNT, market.sent)
        for each in pair:
            each.signal(signal.SIGTERM)
            assert await asyncio.to_thread(each.wait) == 0
    assert await query(database, "SELECT count(*), max(occurrence) FROM market.ticks") == [(market.sent, 1)]


async def test_a_process_that_is_stopped_and_continued(
    writer_url: str, database: str, tmp_path: Path, ended: list[DaemonProcess]
) -> None:
    """After a freeze beyond the keepalive, the waiting messages are stored and the time is not covered."""
    async with Simulator(port=0, rate=0) as simulator:
        daemon = process_of(simulator.stream_url, writer_url, tmp_path, ping_interval="100ms", ping_timeout="900ms")
        ended.append(daemon)
        daemon.start()
        await simulator.wait_connected()
        market = Market(simulator)
        market.trade()
        await until(database, COUNT, market.sent)
        daemon.signal(signal.SIGSTOP)
        await asyncio.sleep(0.3)
        ((frozen_at,),) = await query(database, "SELECT now()")
        market.trade()
        await asyncio.sleep(1.5)
        daemon.signal(signal.SIGCONT)
        await until(database, "SELECT end_reason FROM ingest.stream_sessions ORDER BY connected_at LIMIT 1", "frozen")
        await until(database, COUNT, market.sent)
        await until(database, "SELECT count(*) FROM ingest.stream_sessions WHERE authenticated_at IS NOT NULL", 2)
    ((covered_until,),) = await query(
        database, "SELECT covered_until FROM ingest.stream_sessions ORDER BY connected_at LIMIT 1"
    )
    assert covered_until < frozen_at


async def test_a_damaged_spool(writer_url: str, database: str, tmp_path: Path) -> None:
    """The daemon starts, logs where it moved the damaged file, and records."""
    spool = tmp_path / "state"
    spool.mkdir()
    (spool / "spool.db").write_bytes(b"this is no database" * 1000)
    async with recording(writer_url) as (market, daemon):
        market.trade()
        await stored(database, market)
        assert daemon.telemetry.counts.spools_damaged == 1
    (aside,) = spool.glob("spool-damaged-*.db")
    assert aside.read_bytes() == b"this is no database" * 1000
