"""The owner's connections: SQLAlchemy's engine, and the lock that lets one owner's tool work at a time."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from datetime import datetime

import asyncpg
import sqlalchemy as sa
from alembic.util import CommandError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from ingestor.errors import PoolerError, StoreError
from ingestor.redaction import outside_text
from ingestor.store.connect import connect, is_pooled
from ingestor.store.refusal import ANSWERED, SERVER_ERRORS, translated
from ingestor.store.waiting import LockWatch

LOCK = 7_306_354_015
"""Any number, the same for all who maintain a database."""

MAINTENANCE_LOCK_TIMEOUT = "5s"
"""A drop or a conversion waits this long for a query, and the writer for it; then it is given up until the next run."""

LOCK_NOT_AVAILABLE = "55P03"
"""SQLSTATE of a lock that was waited for too long."""

DEADLOCK = "40P01"
"""SQLSTATE of a lock that was given up since two transactions waited for each other."""

SECOND_CONNECTION = 10.0
"""Seconds in which a pooler should have a second connection to the server."""

_NEVER_END = """
SELECT set_config(name, '0', true) FROM pg_settings
WHERE name IN ('idle_in_transaction_session_timeout', 'transaction_timeout')
"""


def create_engine(url: str) -> AsyncEngine:
    """Return a SQLAlchemy engine that connects by the same URL in the same way.

    SQLAlchemy's own reading of a URL knows neither `sslmode` nor several hosts. Prepared statements have no name, since
    one with a name stays on the session, which behind a pooler serves another client next.
    """

    async def creator() -> asyncpg.Connection:
        return await connect(url, application_name="ingestor migrate", read_write=True)

    return create_async_engine(
        "postgresql+asyncpg://",
        async_creator=creator,
        poolclass=NullPool,
        isolation_level="READ COMMITTED",
        connect_args={"prepared_statement_cache_size": 0, "prepared_statement_name_func": lambda: ""},
    )


@contextlib.asynccontextmanager
async def as_owner(url: str, *, failure: str, verb: str) -> AsyncIterator[AsyncEngine]:
    """Connect for what only the schema's owner may do. Raises StoreError, which begins with `failure`."""
    engine = create_engine(url)
    try:
        with LockWatch(url).watching():
            yield engine
    except sa.exc.DBAPIError as error:
        behind = error.orig.__cause__ if error.orig is not None else None
        refused = translated(behind if isinstance(behind, Exception) else error)
        owner = f"{verb} as a role that owns the database, or has CREATE on it and owns what was made before."
        advice = owner if refused.sqlstate == "42501" else refused.hint
        message = f"{failure}: {refused.message.removeprefix(ANSWERED)}"
        raise StoreError(message, sqlstate=refused.sqlstate, hint=advice) from error
    except CommandError as error:  # of a migration, or of Alembic itself
        raise StoreError(f"{failure}: {outside_text(error)}") from error
    except SERVER_ERRORS as error:  # those that SQLAlchemy does not know
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
    """Return what the database's clock shows: it decides what is old and what is still to come."""
    now: datetime = (await connection.execute(sa.select(sa.func.clock_timestamp()))).scalar_one()
    return now
