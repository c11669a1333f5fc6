"""What `migrate` fills and `maintain` keeps: the trading calendars, and partitions ahead of their months."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, date, datetime

import asyncpg
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from ingestor.admin import schema
from ingestor.admin.engine import create_engine
from ingestor.coverage.calendar import TradingSession, sessions
from ingestor.errors import PoolerError, StoreError
from ingestor.model import SECOND
from ingestor.store.connect import is_pooled
from ingestor.store.refusal import ANSWERED, translated
from ingestor.store.ticks import months_ahead
from ingestor.store.waiting import LockWatch

YEARS_BACK = 10
YEARS_AHEAD = 2

LOCK = 7_306_354_015
"""Any number, the same for all who maintain a database."""

SECOND_CONNECTION = 10.0
"""Seconds in which a pooler should have a second connection to the server."""

# The lock is held as long as the work takes, and nothing happens in its transaction.
_NEVER_END = """
SELECT set_config(name, '0', true) FROM pg_settings
WHERE name IN ('idle_in_transaction_session_timeout', 'transaction_timeout')
"""


@contextlib.asynccontextmanager
async def as_owner(url: str, *, failure: str, verb: str) -> AsyncIterator[AsyncEngine]:
    """Connect for what only the schema's owner may do. Raises StoreError, which begins with `failure`."""
    engine = create_engine(url)
    try:
        with LockWatch(url).watching():
            yield engine
    except sa.exc.DBAPIError as error:
        behind = error.orig.__cause__ if error.orig is not None else None
        told = translated(behind if isinstance(behind, Exception) else error)
        owner = f"{verb} as a role that owns the database, or has CREATE on it and owns what was made before."
        advice = owner if told.sqlstate == "42501" else told.hint
        message = f"{failure}: {told.message.removeprefix(ANSWERED)}"
        raise StoreError(message, sqlstate=told.sqlstate, hint=advice) from error
    except (
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,
    ) as error:
        raise StoreError(f"{failure}: {translated(error)}") from error
    finally:
        await engine.dispose()


@contextlib.asynccontextmanager
async def maintenance(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Begin a transaction of maintenance: others wait until it ends."""
    async with engine.begin() as connection:
        await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
        yield connection


@contextlib.asynccontextmanager
async def without_transactions(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Connect for what can't run in a transaction: each statement is its own. Other maintenance waits until the end.

    Behind a pooler a session keeps no lock, so a transaction on a second connection holds it. Raises PoolerError where
    the pooler has no second one.
    """
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        raw = await connection.get_raw_connection()
        async with _locked_beside(engine, connection) if is_pooled(raw.driver_connection) else _locked(connection):
            yield connection


@contextlib.asynccontextmanager
async def _locked(connection: AsyncConnection) -> AsyncIterator[None]:
    """Hold the lock by the session itself: some servers take one connection only."""
    await connection.execute(sa.select(sa.func.pg_advisory_lock(LOCK)))
    try:
        yield
    finally:
        with contextlib.suppress(sa.exc.DBAPIError):  # a connection that broke has let go of it
            await connection.execute(sa.select(sa.func.pg_advisory_unlock(LOCK)))


@contextlib.asynccontextmanager
async def _locked_beside(engine: AsyncEngine, connection: AsyncConnection) -> AsyncIterator[None]:
    async with engine.begin() as holder:
        await holder.execute(sa.text(_NEVER_END))
        await holder.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
        raw = await connection.get_raw_connection()
        assert raw.driver_connection is not None
        try:
            await raw.driver_connection.execute("SELECT", timeout=SECOND_CONNECTION)
        except TimeoutError:
            raw.driver_connection.terminate()
            raise PoolerError(
                "The connection pooler has no second connection to the server, and continuous aggregates need one.",
                hint="Set default_pool_size to 2 or more, or give this command the server's own address.",
            ) from None
        yield


async def database_now(connection: AsyncConnection) -> datetime:
    """Return what the database's clock shows: by it is judged what is old, and what is still to come."""
    now: datetime = (await connection.execute(sa.select(sa.func.clock_timestamp()))).scalar_one()
    return now


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
            "opens_at": datetime.fromtimestamp(session.opens_at / SECOND, UTC),
            "closes_at": datetime.fromtimestamp(session.closes_at / SECOND, UTC),
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


async def make_partitions(connection: AsyncConnection, today: date) -> list[date]:
    """Make the partitions of this month and of those ahead, where they are missing; return their months."""
    return [
        month
        for month in months_ahead(today)
        if await connection.scalar(sa.text("SELECT ingest.ensure_partition(:month)"), {"month": month})
    ]
