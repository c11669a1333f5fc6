"""Drops ticks that are older than the retention: whole chunks, or whole monthly partitions."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from ingestor.admin import schema
from ingestor.admin.engine import DEADLOCK, LOCK_NOT_AVAILABLE, MAINTENANCE_LOCK_TIMEOUT, database_now, maintenance

IS_HYPERTABLE = "SELECT NOT EXISTS (SELECT FROM pg_partitioned_table WHERE partrelid = 'market.ticks'::regclass)"
_CHUNKS = """
SELECT max(range_end) AS until, count(*) AS pieces FROM timescaledb_information.chunks
WHERE hypertable_schema = 'market' AND hypertable_name = 'ticks' AND range_end <= :cutoff
"""
_PARTITIONS = """
SELECT name, until FROM (
    SELECT c.oid::regclass::text AS name,
           CAST((regexp_match(pg_get_expr(c.relpartbound, c.oid), 'TO \\(''([^'']+)''\\)'))[1] AS timestamptz) AS until
    FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid WHERE i.inhparent = 'market.ticks'::regclass) AS partitions
WHERE until <= :cutoff ORDER BY until
"""


_STORED = (
    "SELECT until_1m >= :until AND NOT EXISTS (SELECT FROM ingest.stale_bars WHERE time < :until) FROM ingest.rolled"
)


async def drop_old(engine: AsyncEngine, retention: timedelta, report: Callable[[str], None]) -> None:
    """Drop the chunks or partitions all of whose ticks are older than that, in a transaction for each partition.

    How far this goes is put on record with it: no bar is computed from what is left before it.
    """
    try:
        pieces, until = 0, None
        async with maintenance(engine) as connection:
            cutoff = await database_now(connection) - retention
            is_hypertable = await connection.scalar(sa.text(IS_HYPERTABLE))
            if is_hypertable:
                pieces, until = await _drop_chunks(connection, cutoff)
        while not is_hypertable:
            async with maintenance(engine) as connection:
                dropped = await _drop_partition(connection, cutoff)
            if dropped is None:
                break
            pieces, until = pieces + 1, dropped
        if until is not None:
            report(f"Ticks dropped, as INGESTOR_RETENTION says: {pieces} chunks or partitions, until {until:%Y-%m-%d}.")
    except sa.exc.DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) not in {LOCK_NOT_AVAILABLE, DEADLOCK}:
            raise
        report(
            f"Old ticks were not dropped: a query held them for {MAINTENANCE_LOCK_TIMEOUT}. The next run tries again."
        )


async def _drop_chunks(connection: AsyncConnection, cutoff: datetime) -> tuple[int, datetime | None]:
    """Drop what a hypertable has before that; return how many chunks, and how far they went."""
    await _limit_wait(connection)
    until, pieces = (await connection.execute(sa.text(_CHUNKS), {"cutoff": cutoff})).one()
    if not pieces or not await _bars_are_stored(connection, until):
        return 0, None
    await _record_drop(connection, until)
    drop = "SELECT count(*) FROM drop_chunks('market.ticks', older_than => CAST(:cutoff AS timestamptz))"
    return await connection.scalar(sa.text(drop), {"cutoff": until}), until


async def _drop_partition(connection: AsyncConnection, cutoff: datetime) -> datetime | None:
    """Drop the oldest partition that ends before that; return how far it went, or None where there is none."""
    await _limit_wait(connection)
    found = (await connection.execute(sa.text(_PARTITIONS), {"cutoff": cutoff})).first()
    if found is None or not await _bars_are_stored(connection, found.until):
        return None
    await _record_drop(connection, found.until)
    await connection.execute(sa.text(f"DROP TABLE {found.name}"))
    until: datetime = found.until
    return until


async def _bars_are_stored(connection: AsyncConnection, until: datetime) -> bool:
    """Return whether the bars of all time before `until` are stored. No writer commits a late tick meanwhile."""
    await connection.execute(sa.text("SELECT pg_advisory_xact_lock(hashtext('market.ticks'))"))
    return bool(await connection.scalar(sa.text(_STORED), {"until": until}))


async def _limit_wait(connection: AsyncConnection) -> None:
    """Limit the waits for locks in this transaction, after that for other maintenance."""
    await connection.execute(sa.text(f"SET LOCAL lock_timeout = '{MAINTENANCE_LOCK_TIMEOUT}'"))


async def _record_drop(connection: AsyncConnection, until: datetime) -> None:
    table = schema.settings
    newest = sa.func.greatest(table.c.ticks_since, until)
    await connection.execute(sa.update(table).values(ticks_since=newest))
