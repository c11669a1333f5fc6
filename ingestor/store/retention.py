"""Drops ticks that are older than somebody wants to keep: whole chunks, or whole monthly partitions."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from ingestor.store import schema
from ingestor.store.upkeep import database_now

LOCK_TIMEOUT = "5s"
"""So long may a drop wait for queries, and the writer for the drop; then it is tried by the next run."""

LOCK_NOT_AVAILABLE = "55P03"

_IS_HYPERTABLE = "SELECT NOT EXISTS (SELECT FROM pg_partitioned_table WHERE partrelid = 'market.ticks'::regclass)"
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


async def drop_old(connection: AsyncConnection, retention: timedelta, report: Callable[[str], None]) -> None:
    """Drop the chunks or partitions all of whose ticks are older than that.

    How far this goes is put on record first: no bar is computed from what is left before it. Not in a transaction.
    """
    try:
        await _drop(connection, await database_now(connection) - retention, report)
    except sa.exc.DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) != LOCK_NOT_AVAILABLE:
            raise
        report(f"Old ticks were not dropped: a query has held them for {LOCK_TIMEOUT}. The next run tries again.")


async def _drop(connection: AsyncConnection, cutoff: datetime, report: Callable[[str], None]) -> None:
    await connection.execute(sa.text(f"SET lock_timeout = '{LOCK_TIMEOUT}'"))
    if await connection.scalar(sa.text(_IS_HYPERTABLE)):
        until, pieces = (await connection.execute(sa.text(_CHUNKS), {"cutoff": cutoff})).one()
        if pieces:
            await _note(connection, until)
            drop = "SELECT count(*) FROM drop_chunks('market.ticks', older_than => CAST(:cutoff AS timestamptz))"
            await connection.execute(sa.text(drop), {"cutoff": until})
    else:
        partitions = (await connection.execute(sa.text(_PARTITIONS), {"cutoff": cutoff})).all()
        pieces = len(partitions)
        for name, until in partitions:
            await _note(connection, until)
            await connection.execute(sa.text(f"DROP TABLE {name}"))
    if pieces:
        report(f"Ticks dropped, as INGESTOR_RETENTION says: {pieces} chunks or partitions, until {until:%Y-%m-%d}.")


async def _note(connection: AsyncConnection, until: datetime) -> None:
    table = schema.settings
    newest = sa.func.greatest(table.c.ticks_since, until)
    await connection.execute(sa.update(table).values(ticks_since=newest))
