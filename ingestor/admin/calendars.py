"""Keeps the trading sessions of the calendars in the database."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from ingestor.admin import schema
from ingestor.clock import to_datetime
from ingestor.coverage.calendar import TradingSession, sessions

YEARS_BACK = 10
YEARS_AHEAD = 2


# The lock is held as long as the work takes, and nothing happens in its transaction.


async def last_trading_day(connection: AsyncConnection, calendar: str) -> date | None:
    """Return the last day of a calendar that is on record."""
    table = schema.trading_sessions
    found: date | None = await connection.scalar(
        sa.select(sa.func.max(table.c.trading_day)).where(table.c.calendar == calendar)
    )
    return found


async def keep_calendars(
    connection: AsyncConnection, timezone: str, known: Iterable[TradingSession], today: date, *, correct: bool = True
) -> int:
    """Bring the sessions of XNZE to what is `known`, and those of `always` to two years ahead; return the changes.

    Without `correct` only days behind the last one on record are added: what came from a newer source stays. Others
    that do this wait until the caller's transaction ends.
    """
    await connection.execute(sa.text("LOCK TABLE ingest.trading_sessions IN SHARE ROW EXCLUSIVE MODE"))
    first = today.replace(year=today.year - YEARS_BACK, month=1, day=1)
    last = today.replace(year=today.year + YEARS_AHEAD, month=12, day=31)
    exchange = [session for session in known if session.trading_day >= first]
    if not correct:
        newest = await last_trading_day(connection, "XNZE")
        exchange = [session for session in exchange if newest is None or session.trading_day > newest]
    return await _keep(connection, "XNZE", exchange) + await _keep(
        connection, "always", list(sessions("always", timezone, first, last))
    )


async def _keep(connection: AsyncConnection, name: str, wanted: list[TradingSession]) -> int:
    """Insert what is missing, correct what has changed, and delete what is none within the days that are known."""
    if not wanted:
        return 0
    table = schema.trading_sessions
    rows = [
        {
            "calendar": name,
            "trading_day": session.trading_day,
            "opens_at": to_datetime(session.opens_at),
            "closes_at": to_datetime(session.closes_at),
        }
        for session in wanted
    ]
    before = {
        row.trading_day: (row.opens_at, row.closes_at)
        for row in await connection.execute(sa.select(table).where(table.c.calendar == name))
    }
    changed = [row for row in rows if before.get(row["trading_day"]) != (row["opens_at"], row["closes_at"])]
    days = {session.trading_day for session in wanted}
    gone = [day for day in before if day not in days and min(days) <= day <= max(days)]
    if changed:
        statement = insert(table)
        new = statement.excluded
        await connection.execute(
            statement.on_conflict_do_update(
                index_elements=["calendar", "trading_day"],
                set_={"opens_at": new.opens_at, "closes_at": new.closes_at},
            ),
            changed,
        )
    if gone:
        await connection.execute(sa.delete(table).where(table.c.calendar == name, table.c.trading_day.in_(gone)))
    return len(changed) + len(gone)
