"""Bloated keys are rebuilt beside writers, readers, other rebuilds and the remains of killed ones."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from ingestor.admin import keys
from ingestor.admin.engine import as_owner
from ingestor.clock import from_datetime
from ingestor.errors import StoreError
from ingestor.model import SECOND
from ingestor.store.connect import connect
from ingestor.store.ticks import TickStore
from ingestor.store.waiting import lock_waits
from tests.bars import insert, maintained
from tests.integration.test_store import batcher, filled, tick
from tests.pooler import Pooler
from tests.recording import until
from tests.servers import TestServer, execute_all, query

NOW = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
OLD = (NOW - timedelta(days=80)).replace(day=10)
"""In a partition and a chunk that ended more than 14 days ago."""

SYMBOLS, COUNT = 40, 12_000

TICKS = "SELECT * FROM market.ticks ORDER BY symbol, time, price, volume, occurrence"
KEYS = """
SELECT c.oid::regclass::text, x.oid::regclass::text, pg_relation_size(x.oid)
FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid JOIN pg_index i ON i.indrelid = c.oid AND i.indisunique
JOIN pg_class x ON x.oid = i.indexrelid
WHERE inhparent = 'market.ticks'::regclass AND pg_relation_size(c.oid) > 0 ORDER BY 1, x.oid
"""
TOO_LONG = "another transaction lasted longer than 100ms. The next run tries again."
LEFTOVERS = "SELECT count(*) FROM pg_index JOIN pg_class x ON x.oid = indexrelid WHERE NOT indisvalid"
WAITING = """
SELECT {} FROM pg_locks JOIN pg_stat_activity USING (pid)
WHERE locktype = 'virtualxid' AND NOT granted AND datname = current_database()
"""
HELD = f"""
SELECT count(*) FROM pg_locks JOIN pg_database d ON d.oid = database
WHERE locktype = 'advisory' AND objid = {keys.LOCK % 2**32} AND datname = current_database()
"""


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "MIN_BYTES", 64 * 1024)


async def fill(url: str, since: datetime) -> None:
    """Insert ticks by time, of all symbols in turn: the pages of the key are split in the middle."""
    rows = [
        (since + timedelta(seconds=number // SYMBOLS), NOW, 1.5, number, 1, f"S{number % SYMBOLS:02}.NZ")
        for number in range(COUNT)
    ]
    await insert(url, rows)
    await execute_all(url, "ANALYZE market.ticks")


@pytest.fixture
async def ticks(database: str) -> list[tuple[Any, ...]]:
    """Fill a closed partition; return its ticks by their key."""
    await fill(database, OLD)
    return await query(database, TICKS)


async def rebuilt(url: str) -> list[str]:
    """Rebuild keys; return the report."""
    lines: list[str] = []
    async with as_owner(url, failure="Maintenance failed", verb="Maintain") as engine:
        await keys.rebuild_keys(engine, lines.append)
    return lines


@contextlib.asynccontextmanager
async def old_snapshot(url: str) -> AsyncIterator[None]:
    """Hold a snapshot, for which a rebuild waits, but no lock of the ticks."""
    connection = await connect(url)
    async with connection.transaction(isolation="repeatable_read"):
        await connection.fetch("SELECT 1 FROM ingest.settings")
        yield
    await connection.close()


@contextlib.asynccontextmanager
async def waiting_rebuild(url: str) -> AsyncIterator[asyncio.Task[list[str]]]:
    """Yield a rebuild that waits for an old snapshot, and goes on at the end of the block."""
    async with old_snapshot(url):
        task = asyncio.create_task(rebuilt(url))
        await until(url, WAITING.format("count(*)"), 1)
        yield task


async def assert_exactly_once(url: str, writer_url: str, expected: list[tuple[Any, ...]]) -> None:
    """The ticks are the expected ones, and the key refuses each of them."""
    assert await query(url, TICKS) == expected
    connection = await connect(url)
    with pytest.raises(asyncpg.UniqueViolationError):
        await connection.copy_records_to_table("ticks", schema_name="market", records=expected[:1])
    await connection.close()
    store = TickStore(writer_url, write_timeout=10)
    time, _, price, volume, _, symbol = expected[0]
    written = await store.write([filled(batcher(), tick(symbol, from_datetime(time), price, volume))])
    await store.close()
    assert (written.ticks, written.duplicates) == (1, 1)


async def test_a_bloated_key(database: str, writer_url: str, ticks: list[tuple[Any, ...]]) -> None:
    """A closed partition's key is rebuilt once, smaller, and is still the key; a recent one is left alone."""
    await fill(database, NOW - timedelta(days=1))
    expected = await query(database, TICKS)
    before = {table: size for table, _, size in await query(database, KEYS)}
    names = [row[:2] for row in await query(database, KEYS)]
    first, line = [line for line in await maintained(database) if line.startswith("Keys")]
    assert first.startswith("Keys to rebuild: 1, of ")
    after = {table: size for table, _, size in await query(database, KEYS)}
    (changed,) = [table for table in before if after[table] != before[table]]
    assert (await query(database, f"SELECT max(time) FROM {changed}"))[0][0] < OLD + timedelta(days=1)
    assert after[changed] == pytest.approx(keys.packed_size(COUNT, [8, 8, 8, 8, 4]), rel=0.05)
    assert after[changed] < 0.7 * before[changed]
    mib = [f"{size[changed] / 1024**2:.1f}" for size in (before, after)]
    assert line == f"Keys: the key of {changed} went from {mib[0]} to {mib[1]} MiB."
    assert [row[:2] for row in await query(database, KEYS)] == names
    assert await rebuilt(database) == []
    await assert_exactly_once(database, writer_url, expected)


async def test_late_ticks_bloat_a_key_again(database: str, ticks: list[tuple[Any, ...]]) -> None:
    """A few late ticks do not cause another rebuild, many do."""
    assert len(await rebuilt(database)) == 2
    await insert(database, [(OLD + timedelta(hours=1), NOW, 2.5, number, 1, "A.NZ") for number in range(100)])
    await execute_all(database, "ANALYZE market.ticks")
    assert await rebuilt(database) == []
    await fill(database, OLD + timedelta(hours=2))
    assert len(await rebuilt(database)) == 2
    assert await rebuilt(database) == []


async def test_keys_of_stored_bars(database: str, server: TestServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of stored bars is rebuilt, also of recent ones, and they stay the same."""
    if server.is_community:
        return  # TimescaleDB stores the bars
    rows = [
        (NOW - timedelta(minutes=number // 10), NOW, 1.5, number, 1, f"S{number % 10:03}.NZ") for number in range(COUNT)
    ]
    await insert(database, rows)
    await maintained(database)
    await execute_all(database, "ANALYZE ingest.rollup_1m")
    monkeypatch.setattr(keys, "MAX_RATIO", 0.9)
    bars = "SELECT * FROM market.ohlcv_1m ORDER BY symbol, time"
    before = await query(database, bars)
    assert "Keys: the key of ingest.rollup_1m" in [line.partition(" went ")[0] for line in await rebuilt(database)]
    assert await query(database, bars) == before


async def test_writes_during_a_rebuild(database: str, writer_url: str, ticks: list[tuple[Any, ...]]) -> None:
    """A rebuild that waits keeps neither writers nor readers waiting, and their ticks are in the new key."""
    store = TickStore(writer_url, write_timeout=10)
    late = from_datetime(OLD) + SECOND
    async with asyncio.timeout(30), waiting_rebuild(database) as task:
        one, other = tick("S01.NZ", late, 9.5), tick("LATE.NZ", late)
        first = await store.write([filled(batcher(), one, other)])
        second = await store.write([filled(batcher(), one)])
        assert (first.ticks, first.duplicates, second.duplicates) == (2, 0, 1)
        assert len(await query(database, TICKS)) == COUNT + 2
        connection = await connect(database)
        assert [wait.lock for wait in await lock_waits(connection)] == ["an older transaction"]
        await connection.close()
        assert not task.done()
    assert len(await task) == 2
    third = await store.write([filled(batcher(), one, other)])
    await store.close()
    assert third.duplicates == 2
    await assert_exactly_once(database, writer_url, await query(database, TICKS))
    assert len(await query(database, TICKS)) == COUNT + 2
    assert await query(database, LEFTOVERS) == [(0,)]


async def test_two_rebuilds_at_a_time(database: str, ticks: list[tuple[Any, ...]]) -> None:
    """The second one skips the work and says so; other maintenance does not wait."""
    async with asyncio.timeout(30), waiting_rebuild(database) as task:
        assert await rebuilt(database) == ["Keys: another process rebuilds them at this moment."]
        assert any("another process rebuilds them" in line for line in await maintained(database, retention="3650d"))
        assert not task.done()
    assert len(await task) == 2
    assert await rebuilt(database) == []


@pytest.mark.parametrize("killed_by", ["cancellation", "the server"])
async def test_a_killed_rebuild(database: str, writer_url: str, ticks: list[tuple[Any, ...]], killed_by: str) -> None:
    """The next run drops the unusable index of a killed one, and rebuilds the key."""
    async with asyncio.timeout(30), waiting_rebuild(database) as task:
        if killed_by == "cancellation":
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await query(database, WAITING.format("pg_terminate_backend(pid)"))
            with pytest.raises(StoreError, match=r"^Maintenance failed: "):
                await task
        assert await query(database, LEFTOVERS) == [(1,)]
    await until(database, HELD, 0)  # the server ends a cancelled statement a moment later
    assert len(await rebuilt(database)) == 2
    assert await query(database, LEFTOVERS) == [(0,)]
    await assert_exactly_once(database, writer_url, ticks)


async def test_a_reader_that_holds_the_ticks(
    database: str, ticks: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long transaction causes a sentence for its partition, no wait and no error; the next run does the work."""
    reader = await connect(database)
    async with reader.transaction(isolation="repeatable_read"):
        await reader.fetch("SELECT 1 FROM market.ticks")
        with monkeypatch.context() as patch:
            patch.setattr(keys, "LOCK_TIMEOUT", "100ms")
            first, second = await rebuilt(database), await rebuilt(database)
        begin, missed, left = first
        assert begin.startswith("Keys to rebuild: 1, of ")
        assert missed.partition(" was not rebuilt: ")[2] == TOO_LONG
        assert re.search(r'_ccnew"? was not dropped: ', left)
        assert second == [left]
        assert await query(database, LEFTOVERS) == [(1,)]
    await reader.close()
    assert len(await rebuilt(database)) == 2
    assert await query(database, LEFTOVERS) == [(0,)]
    assert await query(database, TICKS) == ticks


async def test_a_transaction_that_holds_the_old_index(
    database: str, writer_url: str, ticks: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transaction without a snapshot delays only the drop of the old index: the new one is in use."""
    idle = await connect(database)
    async with idle.transaction(isolation="read_committed"):
        await idle.execute("SELECT FROM market.ticks")  # a fetch keeps its portal, and that a snapshot
        with monkeypatch.context() as patch:
            patch.setattr(keys, "LOCK_TIMEOUT", "100ms")
            _, done, left = await rebuilt(database)
        assert " went from " in done
        assert re.search(r'_ccold"? was not dropped: ', left)
        assert left.endswith(TOO_LONG)
    await idle.close()
    assert await rebuilt(database) == []
    assert await query(database, LEFTOVERS) == [(0,)]
    await assert_exactly_once(database, writer_url, ticks)


async def test_a_snapshot_that_holds_everything(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After three waits the other keys are left to the next run, and no unusable index stays."""
    for month in range(5):
        await fill(database, OLD - timedelta(days=31 * month))
    async with old_snapshot(database):
        with monkeypatch.context() as patch:
            patch.setattr(keys, "LOCK_TIMEOUT", "100ms")
            lines = await rebuilt(database)
        assert [line for line in lines if "left to the next run" in line] == [lines[-1]]
        assert lines[-1] == "Keys: 2 more are left to the next run."
        assert len(lines) == 1 + 3 + 1
        assert await query(database, LEFTOVERS) == [(0,)]
    assert len(await rebuilt(database)) == 6


async def test_a_disk_without_room(database: str, ticks: list[tuple[Any, ...]]) -> None:
    """An error of the server ends the run with its cause; the unusable index is dropped."""
    name = database.rpartition("/")[2]
    await fill(database, OLD + timedelta(hours=2))
    await execute_all(
        database,
        f"ALTER DATABASE {name} SET temp_file_limit = '64kB'",
        f"ALTER DATABASE {name} SET maintenance_work_mem = '1MB'",
        f"ALTER DATABASE {name} SET max_parallel_maintenance_workers = 0",
    )
    with pytest.raises(StoreError, match=r"^Maintenance failed: .*temp_file_limit"):
        await rebuilt(database)
    assert await query(database, LEFTOVERS) == [(0,)]


async def test_limits_of_the_server(database: str, ticks: list[tuple[Any, ...]]) -> None:
    """A time limit for statements does not end a rebuild."""
    name = database.rpartition("/")[2]
    await execute_all(database, f"ALTER DATABASE {name} SET statement_timeout = '500ms'")
    async with asyncio.timeout(30), waiting_rebuild(database) as task:
        await until(database, f"{WAITING.format('count(*)')} AND clock_timestamp() - query_start > '500ms'", 1)
    assert len(await task) == 2


async def test_an_index_of_another_program(database: str, ticks: list[tuple[Any, ...]]) -> None:
    """An unusable index that no rebuild left stays."""
    (table, _, _), *_ = await query(database, KEYS)
    await execute_all(
        database,
        f"CREATE INDEX theirs ON {table} (volume)",
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = (SELECT oid FROM pg_class WHERE relname = 'theirs')",
    )
    assert len(await rebuilt(database)) == 2
    assert await query(database, LEFTOVERS) == [(1,)]


async def test_through_a_pooler(database: str, server: TestServer, ticks: list[tuple[Any, ...]]) -> None:
    """Through a pooler nothing is rebuilt, and the report says how to."""
    pooler = Pooler(server.url, "transaction", 1, {server.prefix: "writer"})
    pooler.start()
    try:
        (line,) = await rebuilt(pooler.url(database))
    finally:
        pooler.close()
    assert line.startswith("Keys to rebuild: 1, of ")
    assert line.endswith("give this command the server's own address.")
