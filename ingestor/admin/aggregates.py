"""The continuous aggregates of TimescaleDB Community: refreshed from the oldest tick on, kept up to date, repaired.

Elsewhere bars are views, and nothing here has anything to do. Nothing here can run in a transaction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from ingestor.admin import schema
from ingestor.admin.engine import database_now
from ingestor.settings import Settings
from ingestor.store.inspect import AGGREGATES

REFRESH_SPAN = timedelta(days=30)
"""So much is computed in one transaction, so that what is interrupted goes on about where it was."""

WINDOW_TOO_SMALL = "22023"
"""SQLSTATE of a window without a whole bucket in it: nothing of it was computed before."""


@dataclass(frozen=True, slots=True)
class Level:
    """One width of bars, and its policy: every `every`, it computes bars older than `end` and younger than `start`.

    A query computes younger bars itself (real-time aggregation). Older ranges with late ticks are on the list of stale
    ranges.
    """

    name: str
    width: timedelta
    start: timedelta
    end: timedelta
    every: timedelta

    @property
    def view(self) -> str:
        """Its relation."""
        return f"market.ohlcv_{self.name}"


_MINUTE, _HOUR, _DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)

# All of them look back for a week, so that nothing is missed where the server's jobs did not run for some days. That is
# cheap: only what has changed is computed.
LEVELS = (
    Level("1m", _MINUTE, start=7 * _DAY, end=_MINUTE, every=_MINUTE),
    Level("5m", 5 * _MINUTE, start=7 * _DAY, end=5 * _MINUTE, every=5 * _MINUTE),
    Level("1h", _HOUR, start=7 * _DAY, end=_HOUR, every=30 * _MINUTE),
    Level("1d", _DAY, start=7 * _DAY, end=_DAY, every=6 * _HOUR),
)
"""Each is made of the one before it, so that one is brought up to date first."""

INSTALLED = "SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb')"
_CHUNKS = """
SELECT range_start, range_end FROM timescaledb_information.chunks
WHERE hypertable_schema = 'market' AND hypertable_name = 'ticks' ORDER BY range_start
"""
_POLICY = """
SELECT EXISTS (
    SELECT FROM timescaledb_information.jobs j JOIN timescaledb_information.continuous_aggregates a
        ON j.hypertable_name IN (a.view_name, a.materialization_hypertable_name)
    WHERE j.proc_name = 'policy_refresh_continuous_aggregate' AND a.view_schema = 'market' AND a.view_name = :name)
"""
_ADD_POLICY = """
SELECT add_continuous_aggregate_policy('{view}', start_offset => CAST(:start AS interval),
    end_offset => CAST(:end AS interval), schedule_interval => CAST(:every AS interval), if_not_exists => true)
"""
_COLUMNSTORE = """
SELECT CAST(coalesce(config ->> 'compress_after', config ->> 'after') AS interval) FROM timescaledb_information.jobs
WHERE hypertable_schema = 'market' AND hypertable_name = 'ticks'
  AND proc_name IN ('policy_compression', 'policy_columnstore')
"""


async def has_aggregates(connection: AsyncConnection) -> bool:
    """Whether the bars of this database are continuous aggregates."""
    return bool(await connection.scalar(sa.text(INSTALLED)) and await connection.scalar(sa.text(AGGREGATES)))


async def keep_aggregates(
    connection: AsyncConnection, columnstore_after: timedelta | None, report: Callable[[str], None]
) -> None:
    """Compute what never was, level by level from the oldest tick on, and then add the policies that are missing.

    In this order, since a policy begins with a recent window, and rows older than what was computed last would vanish
    from the views. To be called again after an interruption: what was computed is not computed twice.
    """
    for level in LEVELS:
        if not await connection.scalar(sa.text(_POLICY), {"name": f"ohlcv_{level.name}"}):
            await _compute(connection, level, report)
            await connection.execute(
                sa.text(_ADD_POLICY.format(view=level.view)),
                {"start": level.start, "end": level.end, "every": level.every},
            )
    await _keep_columnstore(connection, columnstore_after, report)


async def repair_aggregates(connection: AsyncConnection, report: Callable[[str], None]) -> None:
    """Refresh the ranges of late ticks and everything else that is missing, and empty the list.

    It goes through all that there is, from the oldest tick on: behind jobs that stood still, or a window that was
    computed by itself, bars would be hidden that never were computed. Without aggregates it
    only empties the list.
    """
    rows = (await connection.execute(sa.select(schema.stale_ranges))).all()
    if await has_aggregates(connection):
        for level in LEVELS:
            await _compute(connection, level, lambda _: None)
        if rows:
            since, until = min(row.range_from for row in rows), max(row.range_until for row in rows)
            report(f"Bars recomputed for late ticks: {since:%Y-%m-%d %H:%M} to {until:%Y-%m-%d %H:%M} UTC.")
    table = schema.stale_ranges.c
    for row in rows:  # but for those that have been noted again since
        is_same = (table.range_from == row.range_from) & (table.range_until == row.range_until)
        await connection.execute(sa.delete(schema.stale_ranges).where(is_same, table.noted_at == row.noted_at))


async def _compute(connection: AsyncConnection, level: Level, report: Callable[[str], None]) -> None:
    """Compute what was not, or has changed: in steps, from the oldest chunk on, and not where there are none."""
    chunks = (await connection.execute(sa.text(_CHUNKS))).all()
    while chunks:
        first = chunks[0].range_start
        step = [chunk for chunk in chunks if chunk.range_start < first + REFRESH_SPAN]
        chunks = chunks[len(step) :]
        margin = level.width + _HOUR  # a day may have 25 hours; only the whole buckets within are computed
        await _refresh(connection, level, first - margin, step[-1].range_end + margin)
        until = min(step[-1].range_end, await database_now(connection))
        report(f"Bars of {level.name}: computed until {until:%Y-%m-%d}.")


async def _refresh(connection: AsyncConnection, level: Level, since: datetime, until: datetime) -> None:
    """Compute the whole buckets between two instants: neither what is not over yet, nor where ticks were dropped.

    The former would hide what comes later, the latter would delete the bars.
    """
    ticks_since: datetime | None = await connection.scalar(sa.select(schema.settings.c.ticks_since))
    since = since if ticks_since is None else max(since, ticks_since)
    until = min(until, await database_now(connection) - level.end)
    if until - since < level.width:
        return
    window = "CAST(:since AS timestamptz), CAST(:until AS timestamptz)"
    refresh = f"CALL refresh_continuous_aggregate('{level.view}', {window})"
    try:
        await connection.execute(sa.text(refresh), {"since": since, "until": until})
    except sa.exc.DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) != WINDOW_TOO_SMALL:
            raise


async def _keep_columnstore(
    connection: AsyncConnection, after: timedelta | None, report: Callable[[str], None]
) -> None:
    """Let chunks go to the columnstore at this age, or never."""
    found: timedelta | None = await connection.scalar(sa.text(_COLUMNSTORE))
    if found == after:
        return
    if found is not None:
        await connection.execute(sa.text("CALL remove_columnstore_policy('market.ticks', if_exists => true)"))
    if after is not None:
        add = "CALL add_columnstore_policy('market.ticks', after => CAST(:after AS interval), if_not_exists => true)"
        await connection.execute(sa.text(add), {"after": after})
    report(f"Ticks go to the columnstore {'never' if after is None else f'at an age of {after / _DAY:g} days'}.")


def columnstore_after(settings: Settings) -> timedelta | None:
    """Return the age at which ticks go to the columnstore."""
    return None if settings.columnstore_after is None else timedelta(seconds=settings.columnstore_after)
