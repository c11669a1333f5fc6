"""The continuous aggregates of TimescaleDB Community: refreshed from the oldest tick on, kept up to date, repaired.

Elsewhere bars are stored in tables, and nothing here has anything to do. Nothing here can run in a transaction.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from ingestor.admin.bars import REPORT_INTERVAL
from ingestor.settings import Settings
from ingestor.store.inspect import AGGREGATES

VIEWS = tuple(f"ingest.aggregate_{name}" for name in ("1m", "5m", "1h", "1d"))

INSTALLED = "SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb')"
_DAY = timedelta(days=1)

MAX_SPAN = timedelta(days=7)
"""The most time that is computed in one step."""

MAX_REPAIRS = 5_000
"""The most stale minutes that are repaired in one step."""

MIN_SHARE = timedelta(hours=1) / MAX_SPAN
"""The least share of both: a shorter span has no complete hour."""

STEP_SECONDS = 5.0
"""Seconds after which the next step is smaller, so that progress is reported in time."""

TOO_LARGE = {"57014", "53000", "53100", "53200", "53400", "54000"}
"""SQLSTATEs of a step that exceeds a limit of the server, and leaves the connection: time, disk, memory, size."""
_ADD_JOB = """
SELECT add_job('ingest.refresh_bars', interval '5 minutes') WHERE NOT EXISTS (
    SELECT FROM timescaledb_information.jobs WHERE proc_schema = 'ingest' AND proc_name = 'refresh_bars')
"""
_STEP = """
CALL ingest.refresh_bars(
    0, jsonb_build_object('span', CAST(CAST(:span AS interval) AS text), 'repairs', CAST(:repairs AS integer)))
"""
_STATE = """
SELECT announced_until AS until, (SELECT count(*) FROM ingest.stale_bars WHERE time < announced_until) AS stale
FROM ingest.rollup_state
"""
_TICKS_AFTER = """
SELECT CAST(coalesce(config ->> 'compress_after', config ->> 'after') AS interval) FROM timescaledb_information.jobs
WHERE hypertable_schema = 'market' AND hypertable_name = 'ticks'
  AND proc_name IN ('policy_compression', 'policy_columnstore')
"""
# TimescaleDB has a columnstore policy of an aggregate only beside a refresh policy, so our job does it.
_OUR_JOB = "FROM timescaledb_information.jobs WHERE proc_schema = 'ingest' AND proc_name = 'refresh_bars'"
_BARS_AFTER = f"SELECT CAST(config ->> 'columnstore_after' AS interval) {_OUR_JOB}"
_SET_BARS_AFTER = f"""
SELECT alter_job(job_id, config => jsonb_build_object('columnstore_after', CAST(CAST(:after AS interval) AS text)))
{_OUR_JOB}
"""


async def has_aggregates(connection: AsyncConnection) -> bool:
    """Whether the bars of this database are continuous aggregates."""
    return bool(await connection.scalar(sa.text(INSTALLED)) and await connection.scalar(sa.text(AGGREGATES)))


async def keep_aggregates(
    connection: AsyncConnection, columnstore_after: timedelta | None, report: Callable[[str], None]
) -> None:
    """Compute the bars that are missing or stale, and add the job and the policies that are missing.

    To be called again after an interruption: what was computed is not computed twice.
    """
    await repair_aggregates(connection, report)
    await connection.execute(sa.text(_ADD_JOB))
    await _keep_columnstore(connection, columnstore_after, report)


async def repair_aggregates(
    connection: AsyncConnection, report: Callable[[str], None], *, monotonic: Callable[[], float] = time.monotonic
) -> None:
    """Compute the bars that are missing and repair those that are stale; report every `REPORT_INTERVAL` and at the end.

    Each step is committed, so an interrupted run goes on where it was. A step that takes longer than `STEP_SECONDS`, or
    than the server allows, is followed by one of half its size.
    """
    last, share = monotonic(), 1.0
    before = first = (await connection.execute(sa.text(_STATE))).one()
    while True:
        began = monotonic()
        is_done = await _step(connection, share)
        is_quick = is_done and monotonic() - began <= STEP_SECONDS
        share = min(share * 2, 1.0) if is_quick else max(share / 2, MIN_SHARE)
        if is_done:
            state = (await connection.execute(sa.text(_STATE))).one()
            if state == before:
                break
            before = state
        if monotonic() - last >= REPORT_INTERVAL:
            last = monotonic()
            report(f"Bars: computed until {before.until:%Y-%m-%d %H:%M} UTC, {before.stale:,} stale minutes left.")
    if before != first:
        report(f"Bars: computed until {before.until:%Y-%m-%d %H:%M} UTC, {before.stale:,} stale minutes left.")


async def _step(connection: AsyncConnection, share: float) -> bool:
    """Do one step of a share of the largest size; return whether the server has let it finish."""
    try:
        await connection.execute(
            sa.text(_STEP), {"span": MAX_SPAN * share, "repairs": max(1, round(MAX_REPAIRS * share))}
        )
    except sa.exc.DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) not in TOO_LARGE or share <= MIN_SHARE:
            raise
        return False
    return True


async def _keep_columnstore(
    connection: AsyncConnection, after: timedelta | None, report: Callable[[str], None]
) -> None:
    """Let chunks of ticks and of bars go to the columnstore at this age, or never."""
    of_ticks: timedelta | None = await connection.scalar(sa.text(_TICKS_AFTER))
    of_bars: timedelta | None = await connection.scalar(sa.text(_BARS_AFTER))
    if of_bars != after:
        await connection.execute(sa.text(_SET_BARS_AFTER), {"after": after})
    if of_ticks != after:
        if of_ticks is not None:
            await connection.execute(sa.text("CALL remove_columnstore_policy('market.ticks', if_exists => true)"))
        if after is not None:
            add = (
                "CALL add_columnstore_policy('market.ticks', after => CAST(:after AS interval), if_not_exists => true)"
            )
            await connection.execute(sa.text(add), {"after": after})
    if (of_ticks, of_bars) != (after, after):
        age = "never" if after is None else f"at an age of {after / _DAY:g} days"
        report(f"Ticks and bars go to the columnstore {age}.")


def columnstore_after(settings: Settings) -> timedelta | None:
    """Return the age at which ticks go to the columnstore."""
    return None if settings.columnstore_after is None else timedelta(seconds=settings.columnstore_after)
