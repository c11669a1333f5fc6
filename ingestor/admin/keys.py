"""Rebuilds keys that have grown far beyond their contents: those of closed partitions or chunks, and of stored bars.

Rows arrive by time and a key sorts by symbol, so its pages are split in the middle and stay half empty. REINDEX
CONCURRENTLY packs them while everybody reads and writes. It can't run in a transaction, and it needs the space of the
new index until the old one is dropped.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from ingestor.admin.engine import DEADLOCK, LOCK_NOT_AVAILABLE, database_now
from ingestor.admin.retention import IS_HYPERTABLE
from ingestor.store.connect import is_pooled

LOCK = 7_306_354_016
"""Any number, the same for all who rebuild keys of a database. Other maintenance does not wait for a rebuild."""

CLOSED_AFTER = timedelta(days=14)
"""Age of the end of a partition or chunk after which few ticks are expected in it."""

MIN_BYTES = 8 * 1024**2
"""Size from which on an index is worth a rebuild."""

MAX_RATIO = 1.3
"""An index is rebuilt if it is larger than a packed one by more than this. The estimate of a packed one is better."""

LOCK_TIMEOUT = "60s"
"""Time for which a rebuild waits for another transaction. No query waits for the rebuild meanwhile."""

MAX_TIMEOUTS = 3
"""After so many of these waits the run leaves the other indexes to the next one: each cost the work on an index."""

_FILL = 0.9
"""Part of a page that PostgreSQL fills when it builds an index."""

_MIB = 1024**2

_LIMITS = """
SELECT set_config(name, CASE name WHEN 'lock_timeout' THEN :lock_timeout ELSE '0' END, false) FROM pg_settings
WHERE name IN ('lock_timeout', 'statement_timeout', 'transaction_timeout')
"""
_PARTITIONS = """
SELECT inhrelid AS oid,
       CAST((regexp_match(pg_get_expr(c.relpartbound, c.oid), 'TO \\(''([^'']+)''\\)'))[1] AS timestamptz) AS until
FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid WHERE inhparent = 'market.ticks'::regclass
"""
_CHUNKS = """
SELECT CAST(format('%I.%I', chunk_schema, chunk_name) AS regclass) AS oid, range_end AS until
FROM timescaledb_information.chunks
WHERE hypertable_schema = 'market' AND hypertable_name = 'ticks' AND NOT is_compressed
"""
_ROLLUPS = """
SELECT to_regclass('ingest.rollup_' || width) FROM unnest(ARRAY['1m', '5m', '1h', '1d']) AS width
"""
# The number of rows is that of the last ANALYZE or VACUUM, scaled to today's size as the planner does. An average width
# is cut to a whole number, so it is increased. A column that was never analysed has none: its index has to wait.
_KEYS = f"""
SELECT c.oid::regclass::text AS "table", i.indexrelid::regclass::text AS name, pg_relation_size(i.indexrelid) AS size,
       c.reltuples / nullif(c.relpages, 0) * (pg_relation_size(c.oid) / current_setting('block_size')::integer) AS rows,
       (SELECT array_agg(CASE WHEN a.attlen > 0 THEN a.attlen ELSE s.avg_width + 1 END)
        FROM pg_attribute a LEFT JOIN pg_stats s
            ON (s.schemaname, s.tablename, s.attname) = (c.relnamespace::regnamespace::name, c.relname, a.attname)
        WHERE a.attrelid = c.oid AND a.attnum = ANY (i.indkey)) AS widths
FROM (SELECT oid, until FROM ({{pieces}}) AS piece WHERE until <= :cutoff
      UNION ALL SELECT rollup, 'infinity' FROM ({_ROLLUPS}) AS rollups (rollup)) AS t
JOIN pg_class c USING (oid) JOIN pg_index i ON i.indrelid = c.oid AND i.indisunique AND i.indisvalid
WHERE pg_relation_size(i.indexrelid) >= :min_bytes
ORDER BY t.until, 1
"""  # noqa: S608 - constants
_LEFTOVERS = f"""
SELECT t.oid::regclass::text AS "table", x.oid::regclass::text AS name
FROM (SELECT oid FROM ({{pieces}}) AS piece UNION ALL {_ROLLUPS}) AS t (oid)
JOIN pg_index i ON i.indrelid = t.oid AND NOT i.indisvalid JOIN pg_class x ON x.oid = i.indexrelid
WHERE x.relname ~ '_cc(new|old)[0-9]*$' ORDER BY x.oid
"""  # noqa: S608 - constants


@dataclass(frozen=True, slots=True)
class Index:
    """The index of a key, and its table. Both names are quoted where SQL needs it."""

    table: str
    name: str
    size: int
    """In bytes."""


def packed_size(rows: float, widths: Sequence[int]) -> float:
    """Return the bytes of a B-tree index that was just built, from the widths of its columns in bytes.

    An entry has a header of 8 bytes, columns that begin at multiples of 8, and a line pointer of 4.
    """
    return rows * (8 + sum(-(-width // 8) * 8 for width in widths) + 4) / _FILL


def is_bloated(size: int, rows: float | None, widths: Sequence[int | None]) -> bool:
    """Whether an index is far larger than its contents need; unknown numbers say no."""
    known = [width for width in widths if width is not None]
    if rows is None or rows <= 0 or len(known) < len(widths):
        return False
    return size > MAX_RATIO * packed_size(rows, known)


async def rebuild_keys(engine: AsyncEngine, report: Callable[[str], None]) -> None:
    """Rebuild what is worth it, one index after the other, the oldest ticks' first; only one process does it at a time.

    A run that is interrupted leaves an unusable index, which the next one drops.
    """
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        raw = await connection.get_raw_connection()
        if is_pooled(raw.driver_connection):
            await _report_pooler(connection, report)
            return
        async with _turn(connection) as is_ours:
            if not is_ours:
                report("Keys: another process rebuilds them at this moment.")
                return
            await connection.execute(sa.text(_LIMITS), {"lock_timeout": LOCK_TIMEOUT})
            held = await _drop_leftovers(connection, report)
            await _rebuild_all(connection, held, report)


@contextlib.asynccontextmanager
async def _turn(connection: AsyncConnection) -> AsyncIterator[bool]:
    """Hold the session's lock, if it is free: the value says so. The end of the connection releases it as well."""
    is_ours = bool(await connection.scalar(sa.select(sa.func.pg_try_advisory_lock(LOCK))))
    try:
        yield is_ours
    finally:
        if is_ours:
            with contextlib.suppress(sa.exc.SQLAlchemyError):
                await connection.execute(sa.select(sa.func.pg_advisory_unlock(LOCK)))


async def _report_pooler(connection: AsyncConnection, report: Callable[[str], None]) -> None:
    """Say what is not done: through a pooler neither the lock nor the limits of a session last."""
    if indexes := await _bloated(connection):
        report(
            f"Keys to rebuild: {_total(indexes)}. A connection pooler does not allow it: "
            "give this command the server's own address."
        )


async def _rebuild_all(connection: AsyncConnection, held: Sequence[str], report: Callable[[str], None]) -> None:
    """Rebuild the keys of all tables but those that are `held`, where each attempt would leave another index."""
    indexes = [index for index in await _bloated(connection) if index.table not in held]
    if indexes:
        report(f"Keys to rebuild: {_total(indexes)}.")
    timeouts = 0
    for number, index in enumerate(indexes, start=1):
        timeouts += not await _rebuild(connection, index, report)
        if timeouts == MAX_TIMEOUTS and number < len(indexes):
            report(f"Keys: {len(indexes) - number} more are left to the next run.")
            return


async def _rebuild(connection: AsyncConnection, index: Index, report: Callable[[str], None]) -> bool:
    """Rebuild one index; return False if another transaction lasted too long, before or after the replacement."""
    if not (before := await _size(connection, index.name)):
        return True  # retention or a conversion has dropped it meanwhile
    try:
        is_finished = await _run(connection, f"REINDEX INDEX CONCURRENTLY {index.name}")
    except sa.exc.DBAPIError:
        with contextlib.suppress(sa.exc.SQLAlchemyError):  # the new index takes space, and the disk may be full
            await _drop_leftovers(connection, report, index.table)
        raise
    after = await _size(connection, index.name)
    if is_finished or after < before:
        report(f"Keys: the key of {index.table} went from {before / _MIB:,.1f} to {after / _MIB:,.1f} MiB.")
    else:
        report(f"Keys: the key of {index.table} was not rebuilt: {_too_long()}")
    if not is_finished:
        await _drop_leftovers(connection, report, index.table)
    return is_finished


async def _bloated(connection: AsyncConnection) -> list[Index]:
    cutoff = await database_now(connection) - CLOSED_AFTER
    sql = sa.text(_KEYS.format(pieces=await _pieces(connection)))
    rows = await connection.execute(sql, {"cutoff": cutoff, "min_bytes": MIN_BYTES})
    return [Index(row.table, row.name, row.size) for row in rows if is_bloated(row.size, row.rows, row.widths)]


async def _drop_leftovers(
    connection: AsyncConnection, report: Callable[[str], None], table: str | None = None
) -> list[str]:
    """Drop the unusable indexes that rebuilds left, of one table or all; return the tables that keep one."""
    rows = await connection.execute(sa.text(_LEFTOVERS.format(pieces=await _pieces(connection))))
    held = []
    for row in rows.all():
        if table not in {None, row.table} or await _run(connection, f"DROP INDEX CONCURRENTLY IF EXISTS {row.name}"):
            continue
        report(f"Keys: the unusable index {row.name} was not dropped: {_too_long()}")
        held.append(row.table)
    return held


async def _run(connection: AsyncConnection, statement: str) -> bool:
    """Run a statement; return whether it was finished. If not, another transaction lasted too long."""
    try:
        await connection.exec_driver_sql(statement)
    except sa.exc.DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) not in {LOCK_NOT_AVAILABLE, DEADLOCK}:
            raise
        return False
    return True


async def _pieces(connection: AsyncConnection) -> str:
    """Return the query for the parts of the table of ticks."""
    return _CHUNKS if await connection.scalar(sa.text(IS_HYPERTABLE)) else _PARTITIONS


async def _size(connection: AsyncConnection, index: str) -> int:
    sql = "SELECT coalesce(pg_relation_size(to_regclass(:index)), 0)"
    size: int = await connection.scalar(sa.text(sql), {"index": index})
    return size


def _total(indexes: Sequence[Index]) -> str:
    size = sum(index.size for index in indexes) / _MIB
    return f"{len(indexes)}, of {size:,.1f} MiB in total"


def _too_long() -> str:
    return f"another transaction lasted longer than {LOCK_TIMEOUT}. The next run tries again."
