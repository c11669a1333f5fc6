"""Collects the facts of a database that `ingestor check` and the demo report."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime, timedelta

import asyncpg

from ingestor.clock import UNCOMPARED, ClockDifference, SystemClock, to_datetime
from ingestor.settings import SHARED, Settings, variable
from ingestor.store.clocks import compare_clocks
from ingestor.store.connect import connect
from ingestor.store.connection import GuardedConnection
from ingestor.store.registry import RegisteredRelay, listed_relays

MINIMUM_SERVER = 15

REFRESHED_WITHIN = timedelta(days=2)
"""Daily maintenance stores every bar, and repairs every stale one, within this time."""

_SERVER = """
SELECT current_setting('server_version') AS version, current_setting('server_version_num')::int / 10000 AS major,
       current_setting('server_encoding') AS encoding, pg_is_in_recovery() AS standby,
       (SELECT extversion FROM pg_extension WHERE extname = 'timescaledb') AS timescaledb,
       (SELECT default_version FROM pg_available_extensions WHERE name = 'timescaledb') AS available,
       (SELECT setting FROM pg_settings WHERE name = 'timescaledb.license') AS license,
       to_regclass('ingest.alembic_version') IS NOT NULL AS migrated
"""
AGGREGATES = """
SELECT count(*) FROM timescaledb_information.continuous_aggregates WHERE view_schema = 'ingest'
"""
_SCHEMA = "SELECT (SELECT version_num FROM ingest.alembic_version) AS revision, s.* FROM ingest.settings s"
_LAST_DAY = "SELECT max(trading_day) FROM ingest.trading_sessions WHERE calendar = $1"
_MAY_LOOK = "SELECT coalesce(has_table_privilege(to_regclass('ingest.stale_bars'), 'SELECT'), false)"
_MAY_SEE_RELAYS = "SELECT coalesce(has_table_privilege(to_regclass('ingest.relays'), 'SELECT'), false)"
_STALE_SINCE = "SELECT min(noted_at) FROM ingest.stale_bars"
# Null where no tick has waited that long for its bar.
_STORED_UNTIL = """
SELECT until_1m FROM ingest.rolled
WHERE EXISTS (SELECT FROM market.ticks WHERE time >= (SELECT until_1m FROM ingest.rolled) AND time < $1)
"""
_PRIVILEGES = """
SELECT format('%s ON %s', privilege, relation) AS missing
FROM (VALUES ('INSERT', 'market.ticks'), ('SELECT', 'market.ticks'), ('INSERT', 'ingest.stream_sessions'),
             ('UPDATE', 'ingest.stream_sessions'), ('INSERT', 'ingest.rejected_messages'),
             ('SELECT', 'ingest.stale_bars'), ('INSERT', 'ingest.stale_bars'), ('UPDATE', 'ingest.stale_bars'),
             ('INSERT', 'ingest.tick_log'), ('SELECT', 'ingest.relays'))
     AS needed (privilege, relation)
WHERE NOT coalesce(has_table_privilege(to_regclass(relation), privilege), false)
"""


@dataclass(frozen=True, slots=True)
class SchemaFacts:
    """The state of a database that `ingestor migrate` has prepared.

    `stored_until` is the end of the stored bars, if ticks after it have waited longer than `REFRESHED_WITHIN`.
    """

    revision: str
    minimum_version: str | None
    calendar: str
    exchange_timezone: str
    coverage_lead: timedelta
    coverage_tail: timedelta
    coverage_margin: timedelta
    stall_timeout: timedelta
    last_trading_day: date | None
    stale_since: datetime | None
    stored_until: datetime | None
    missing_privileges: tuple[str, ...]
    relays: tuple[RegisteredRelay, ...] = ()

    def days_left(self, today: date) -> int:
        """Return how many days ahead the trading calendar is known."""
        return (self.last_trading_day - today).days if self.last_trading_day else 0


@dataclass(frozen=True, slots=True)
class DatabaseFacts:
    """A server and a database on it. `schema` is None where nothing was migrated yet.

    `update` is a version of TimescaleDB that the server has, and this database does not use yet.
    """

    version: str
    major: int
    encoding: str
    standby: bool
    edition: str
    update: str | None
    has_aggregates: bool
    schema: SchemaFacts | None
    clock: ClockDifference = UNCOMPARED

    @property
    def now(self) -> datetime:
        """The time by the server's clock."""
        return to_datetime(SystemClock().wall() - self.clock.ahead)


async def inspect(url: str, *, timeout: float = 10.0) -> DatabaseFacts:
    """Look at a database, for at most so many seconds. Raises StoreError where that can't be done."""
    guarded = GuardedConnection(await connect(url, timeout=timeout, application_name="ingestor check"), timeout)
    try:
        async with guarded as connection, connection.transaction(isolation="read_committed"):
            clock = await compare_clocks(connection, SystemClock())
            (server,) = await connection.fetch(_SERVER)
            schema = await _schema(connection) if server["migrated"] else None
            aggregates = await connection.fetchval(AGGREGATES) if server["timescaledb"] else 0
    finally:
        await guarded.close()
    return DatabaseFacts(
        server["version"],
        server["major"],
        server["encoding"],
        server["standby"],
        _edition(server["timescaledb"], server["license"]),
        server["available"] if server["timescaledb"] not in {None, server["available"]} else None,
        aggregates > 0,
        schema,
        clock,
    )


def _edition(timescaledb: str | None, license_name: str | None) -> str:
    if timescaledb is None:
        return "without TimescaleDB"
    edition = "Apache-2" if license_name == "apache" else "Community"
    return f"with TimescaleDB {timescaledb} ({edition})"


async def _schema(connection: asyncpg.Connection) -> SchemaFacts | None:
    row = await connection.fetchrow(_SCHEMA)
    if row is None:
        return None
    missing = await connection.fetch(_PRIVILEGES)
    may_look = await connection.fetchval(_MAY_LOOK)
    now: datetime = await connection.fetchval("SELECT now()")
    return SchemaFacts(
        revision=row["revision"],
        minimum_version=row["minimum_version"],
        calendar=row["calendar"],
        exchange_timezone=row["exchange_timezone"],
        coverage_lead=row["coverage_lead"],
        coverage_tail=row["coverage_tail"],
        coverage_margin=row["coverage_margin"],
        stall_timeout=row["stall_timeout"],
        last_trading_day=await connection.fetchval(_LAST_DAY, row["calendar"]),
        stale_since=await connection.fetchval(_STALE_SINCE) if may_look else None,
        stored_until=await connection.fetchval(_STORED_UNTIL, now - REFRESHED_WITHIN) if may_look else None,
        missing_privileges=tuple(record["missing"] for record in missing),
        relays=await listed_relays(connection) if await connection.fetchval(_MAY_SEE_RELAYS) else (),
    )


def settings_drift(settings: Settings, facts: SchemaFacts) -> list[str]:
    """Return a sentence for each setting that the database has otherwise. Durations are in seconds."""
    found: list[str] = []
    for column, name in SHARED.items():
        ours, theirs = getattr(settings, name), getattr(facts, column)
        if isinstance(theirs, timedelta):
            theirs = theirs.total_seconds()
        if ours != theirs:
            found.append(f"{variable(name)} is {ours} here and {theirs} in the database")
    return found
