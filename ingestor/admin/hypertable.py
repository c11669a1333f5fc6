"""Moves `market.ticks` from monthly partitions into a hypertable, where TimescaleDB came after the first migration.

The ticks are copied partition by partition while everybody goes on, and writers wait only for the last transaction. It
copies what came meanwhile, counts every day of both tables, and puts the new one in the place of the old one. A run
that ends before that commit leaves the old table as it is, and a copy from which the next run continues.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol, cast

import sqlalchemy as sa
from alembic.script import ScriptDirectory
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from ingestor.admin.aggregates import INSTALLED
from ingestor.admin.engine import DEADLOCK, LOCK_NOT_AVAILABLE, MAINTENANCE_LOCK_TIMEOUT, as_owner, maintenance
from ingestor.admin.migrate import configuration, keep_bars
from ingestor.errors import StoreError
from ingestor.redaction import outside_text
from ingestor.settings import Settings

KEY = "ticks_symbol_time_price_volume_occurrence_key"
INDEX = "ticks_time_idx"
ARRIVAL_INDEX = "ticks_received_at_idx"

COPY = "market.ticks_adopted"
COPY_KEY = "ticks_adopted_symbol_time_price_volume_occurrence_key"
COPY_INDEX = "ticks_adopted_time_idx"
COPY_ARRIVAL_INDEX = "ticks_adopted_received_at_idx"

EVER = (datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC))
ONE_DAY = timedelta(days=1)

_IS_PARTITIONED = "SELECT EXISTS (SELECT FROM pg_partitioned_table WHERE partrelid = to_regclass('market.ticks'))"
_AVAILABLE = "SELECT EXISTS (SELECT FROM pg_available_extensions WHERE name = 'timescaledb')"
# CREATE EXTENSION ends the connection where the library is not loaded, so its settings are looked for first.
_LOADED = "SELECT EXISTS (SELECT FROM pg_settings WHERE name LIKE 'timescaledb.%')"

_BECOME_OWNER = """
SELECT format('SET LOCAL ROLE %I', pg_get_userbyid(relowner)) FROM pg_class WHERE oid = to_regclass('market.ticks')
"""

# Foreign objects that would be dropped with the table or with the relations on it. A view depends by its rule for
# SELECT, and an object that a partition has of its table (P) is not reported again.
_DEPENDENTS = f"""
WITH ours AS (
    SELECT to_regclass(name)::oid AS oid FROM unnest(CAST(:relations AS text[])) AS name
    UNION SELECT inhrelid FROM pg_inherits WHERE inhparent = to_regclass('market.ticks')
)
SELECT DISTINCT CASE WHEN r.oid IS NULL THEN pg_describe_object(d.classid, d.objid, 0)
                     ELSE pg_describe_object('pg_class'::regclass, r.ev_class, 0) END AS name
FROM pg_depend d
LEFT JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid AND r.ev_type = '1'
LEFT JOIN pg_constraint k ON d.classid = 'pg_constraint'::regclass AND k.oid = d.objid
LEFT JOIN pg_class i ON d.classid = 'pg_class'::regclass AND i.oid = d.objid
WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid IN (SELECT oid FROM ours) AND d.deptype IN ('n', 'a')
  AND coalesce(r.ev_class, i.oid, 0) NOT IN (SELECT oid FROM ours)
  AND NOT coalesce(i.relname IN ('{INDEX}', '{ARRIVAL_INDEX}') OR k.conname = '{KEY}' OR k.contype IN ('c', 'n'), false)
  AND NOT EXISTS (SELECT FROM pg_depend p WHERE (p.classid, p.objid, p.deptype) = (d.classid, d.objid, 'P'))
ORDER BY name
"""  # noqa: S608 - constants

_MAKE_COPY = (
    f"""
    CREATE TABLE {COPY} (
        LIKE market.ticks INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING COMMENTS,
        CONSTRAINT {COPY_KEY} UNIQUE (symbol, time, price, volume, occurrence)
    )""",
    f"""
    COMMENT ON TABLE {COPY} IS
    'What ingestor migrate --convert-to-hypertable has copied of market.ticks so far. To give that up, drop it.'""",
    f"SELECT create_hypertable('{COPY}', by_range('time', INTERVAL '7 days'), create_default_indexes => false)",
    f"CREATE INDEX {COPY_ARRIVAL_INDEX} ON {COPY} USING brin (received_at) WITH (autosummarize = on)",
)
_PARTITIONS = """
SELECT CAST(bound[1] AS timestamptz) AS since, CAST(bound[2] AS timestamptz) AS until
FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid,
     regexp_match(pg_get_expr(c.relpartbound, c.oid), 'FROM \\(''([^'']+)''\\) TO \\(''([^'']+)''\\)') AS bound
WHERE inhparent = 'market.ticks'::regclass AND bound IS NOT NULL ORDER BY since
"""
_SIZE = """
SELECT pg_size_pretty(sum(pg_total_relation_size(inhrelid))) FROM pg_inherits WHERE inhparent = 'market.ticks'::regclass
"""

_COPY_TICKS = f"""
INSERT INTO {COPY} SELECT * FROM market.ticks WHERE time >= :since AND time < :until ON CONFLICT DO NOTHING
"""  # noqa: S608 - a constant

_DAYS = """
SELECT date_bin('1 day', time, '2000-01-01 00:00:00+00'::timestamptz) AS day, count(*) AS ticks, {digest} AS digest
FROM {table} AS t WHERE time >= :since AND time < :until GROUP BY day
"""
_COMPARE = f"""
SELECT day, coalesce(old.ticks, 0) AS old, coalesce(new.ticks, 0) AS new,
       (old.ticks, old.digest) IS NOT DISTINCT FROM (new.ticks, new.digest) AS same
FROM ({_DAYS.replace("{table}", "market.ticks")}) AS old FULL JOIN ({_DAYS.replace("{table}", COPY)}) AS new USING (day)
ORDER BY day
"""  # noqa: S608 - constants
# Of the whole rows. XOR needs no order, and since the key is unique, no two rows cancel each other out.
_BY_CONTENT = _COMPARE.format(digest="bit_xor(hash_record_extended(t, 0))")
_BY_NUMBER = _COMPARE.format(digest="0")

# The daemon locks its session's row before it writes ticks. It is kept waiting there and not at its COPY, since
# TimescaleDB looks before that wait at whether a table is a hypertable, and PostgreSQL after it at which table it is.
_LOCK_WRITERS = (
    "LOCK TABLE ingest.stream_sessions IN EXCLUSIVE MODE",
    "LOCK TABLE market.ticks IN SHARE ROW EXCLUSIVE MODE",
)

# Grants that were given by hand are given again.
_KEPT = """
SELECT format('GRANT %s%s ON %s TO %s%s', a.privilege_type, '(' || quote_ident(attname) || ')', c.oid::regclass,
              CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END,
              CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' END)
FROM unnest(CAST(:relations AS text[])) AS name JOIN pg_class c ON c.oid = to_regclass(name),
     LATERAL (SELECT NULL AS attname, relacl AS acl
              UNION ALL SELECT attname, attacl FROM pg_attribute WHERE attrelid = c.oid) AS of, aclexplode(of.acl) AS a
WHERE a.grantee <> c.relowner
UNION ALL SELECT format('COMMENT ON TABLE market.ticks IS %L', obj_description('market.ticks'::regclass))
"""
_TAKE_THE_PLACE = (
    "DROP TABLE market.ticks",
    f"ALTER TABLE {COPY} RENAME TO ticks",
    f"ALTER TABLE market.ticks RENAME CONSTRAINT {COPY_KEY} TO {KEY}",
    f"ALTER INDEX market.{COPY_INDEX} RENAME TO {INDEX}",
    f"ALTER INDEX market.{COPY_ARRIVAL_INDEX} RENAME TO {ARRIVAL_INDEX}",
)


class RelationsRevision(Protocol):
    """A revision that makes the relations on `market.ticks`. The conversion drops them and makes them again.

    Their SQL stays in the revision, which is frozen with it; a later revision that changes them has all these names.
    """

    RELATIONS: tuple[str, ...]
    """The relations, each before those that it reads."""

    def is_community(self, connection: sa.Connection) -> bool:
        """Return whether `market.ticks` is a hypertable of an edition that has continuous aggregates."""
        ...

    def has_aggregates(self, connection: sa.Connection) -> bool:
        """Return whether the bars are continuous aggregates."""
        ...

    def make_index(self, connection: sa.Connection, name: str, table: str) -> None:
        """Make the index on the time of a table of ticks."""
        ...

    def make_relations(self, connection: sa.Connection) -> None:
        """Make the relations for the edition that is found."""
        ...

    def drop_relations(self, connection: sa.Connection) -> None:
        """Drop the relations."""
        ...


async def convert_to_hypertable(url: str, settings: Settings, report: Callable[[str], None]) -> None:
    """Make a hypertable of a partitioned `market.ticks`, in a database at the newest schema.

    `report` gets each step as a sentence. Raises StoreError; what was copied by then is not copied again.
    """
    async with as_owner(url, failure="The conversion failed", verb="Migrate") as engine:
        relations = relations_revision()
        if await _is_partitioned(engine):
            await _ensure_timescaledb(engine)
            await _make_copy(engine, relations, report)
            await _copy_partitions(engine, report)
            await _finish(engine, relations, report)
        elif await _take_the_edition(engine, relations):
            report("market.ticks is a hypertable already; its bars are continuous aggregates now.")
        else:
            report("market.ticks is a hypertable already: there is nothing to convert.")
        await keep_bars(url, engine, settings, report)


async def tell_of_adoption(url: str, report: Callable[[str], None]) -> None:
    """Say that there is `adopt`, where it would have something to do. Raises StoreError."""
    async with as_owner(url, failure="The migration failed", verb="Migrate") as engine, engine.connect() as connection:
        for condition in (_IS_PARTITIONED, _AVAILABLE, _LOADED):
            if not await connection.scalar(sa.text(condition)):
                return
    report(
        "This server has TimescaleDB, and market.ticks has monthly partitions: "
        "`ingestor migrate --convert-to-hypertable` makes a hypertable of it."
    )


async def _is_partitioned(engine: AsyncEngine) -> bool:
    async with engine.connect() as connection:
        return bool(await connection.scalar(sa.text(_IS_PARTITIONED)))


async def _ensure_timescaledb(engine: AsyncEngine) -> None:
    """Create the extension where it is not there yet. Raises StoreError, with what a person must do first."""
    async with maintenance(engine) as connection:
        if await connection.scalar(sa.text(INSTALLED)):
            return
        if not await connection.scalar(sa.text(_AVAILABLE)):
            raise StoreError(
                "TimescaleDB is not on this server.",
                hint="Install it there, add it to shared_preload_libraries, restart the server, and run this again.",
            )
        if not await connection.scalar(sa.text(_LOADED)):
            raise StoreError(
                "TimescaleDB is on this server, but not loaded.",
                hint="Add timescaledb to shared_preload_libraries, restart the server, and run this again.",
            )
        try:
            await connection.execute(sa.text("CREATE EXTENSION timescaledb"))
        except sa.exc.DBAPIError as error:
            raise StoreError(
                f"TimescaleDB can't be created in this database: {outside_text(error.orig)}.",
                sqlstate=getattr(error.orig, "sqlstate", None),
                hint="Let a superuser run CREATE EXTENSION timescaledb in it, then run this again.",
            ) from error


def relations_revision() -> RelationsRevision:
    """Return the newest revision that makes the relations on `market.ticks`, marked by its constant `RELATIONS`."""
    scripts = ScriptDirectory.from_config(configuration()).walk_revisions()
    newest = next(script.module for script in scripts if hasattr(script.module, "RELATIONS"))
    return cast("RelationsRevision", newest)


@contextlib.asynccontextmanager
async def _transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Connect for one transaction as the owner of `market.ticks`, who may be another than a superuser who does this."""
    async with engine.begin() as connection:
        await connection.exec_driver_sql(await connection.scalar(sa.text(_BECOME_OWNER)))
        yield connection


async def _take_the_edition(engine: AsyncEngine, relations: RelationsRevision) -> bool:
    """Make continuous aggregates where bars are views, since TimescaleDB's edition was Apache-2; return whether so."""
    async with _transaction(engine) as connection:
        may, has = [
            await connection.run_sync(function) for function in (relations.is_community, relations.has_aggregates)
        ]
        if may and not has:
            await connection.run_sync(_remake, relations)
        return bool(may and not has)


async def _make_copy(engine: AsyncEngine, relations: RelationsRevision, report: Callable[[str], None]) -> None:
    """Make the table that the ticks are copied to, unless an earlier run has."""
    async with _transaction(engine) as connection:
        await _refuse_dependents(connection, relations)
        if await connection.scalar(sa.text("SELECT to_regclass(:name) IS NOT NULL"), {"name": COPY}):
            report(f"{COPY} is there: going on with what an earlier run has left.")
            return
        for statement in _MAKE_COPY:
            await connection.execute(sa.text(statement))
        await connection.run_sync(relations.make_index, COPY_INDEX, COPY)
        size = await connection.scalar(sa.text(_SIZE))
    report(f"market.ticks is copied to {COPY}, which needs about as much room: {size}.")


async def _refuse_dependents(connection: AsyncConnection, relations: RelationsRevision) -> None:
    ours = ["market.ticks", *relations.RELATIONS]
    if names := (await connection.scalars(sa.text(_DEPENDENTS), {"relations": ours})).all():
        raise StoreError(
            f"These objects depend on market.ticks and would be dropped with it: {', '.join(names)}.",
            hint="Drop them, run this again, and create them again afterwards.",
        )


async def _copy_partitions(engine: AsyncEngine, report: Callable[[str], None]) -> None:
    """Copy one partition after the other, the oldest first, each in a transaction of its own."""
    async with engine.connect() as connection:
        partitions = (await connection.execute(sa.text(_PARTITIONS))).all()
    for since, until in partitions:
        async with _transaction(engine) as connection:
            days, copied = await _compare(connection, _BY_CONTENT, since, until), 0
            if not all(day.same for day in days):
                copied = await _copy(connection, since, until)
                days = await _compare(connection, _BY_CONTENT, since, until)
                _refuse_differences([day for day in days if day.new >= day.old])  # with fewer, some came just now
        if total := sum(day.old for day in days):
            what = f"{copied:,} ticks copied" if copied else f"{total:,} ticks, copied before"
            report(f"{since:%Y-%m}: {what}.")
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(sa.text(f"VACUUM (ANALYZE) {COPY}"))  # while no writer waits for it


async def _compare(connection: AsyncConnection, sql: str, since: datetime, until: datetime) -> Sequence[sa.Row[Any]]:
    """Return each `day`, its number of ticks in the `old` and in the `new` table, and whether they are the `same`."""
    return (await connection.execute(sa.text(sql), {"since": since, "until": until})).all()


async def _copy(connection: AsyncConnection, since: datetime, until: datetime) -> int:
    """Copy what is not in the copy yet; return the number of ticks."""
    return (await connection.execute(sa.text(_COPY_TICKS), {"since": since, "until": until})).rowcount


async def _finish(engine: AsyncEngine, relations: RelationsRevision, report: Callable[[str], None]) -> None:
    """Put the copy in the place of the partitioned table, in one transaction."""
    try:
        async with _transaction(engine) as connection:
            await connection.execute(sa.text(f"SET LOCAL lock_timeout = '{MAINTENANCE_LOCK_TIMEOUT}'"))
            for statement in _LOCK_WRITERS:
                await connection.execute(sa.text(statement))
            if not await connection.scalar(sa.text(_IS_PARTITIONED)):
                report("Another run has done it meanwhile.")
                return
            began = time.monotonic()
            report("The last step: all ticks are counted. Writers wait until it is done.")
            await _refuse_dependents(connection, relations)
            total = await _copy_rest(connection)
            await connection.run_sync(_remake, relations, _TAKE_THE_PLACE)
    except sa.exc.DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) not in {LOCK_NOT_AVAILABLE, DEADLOCK}:
            raise
        raise StoreError(
            f"Another session holds market.ticks, or a view on it, for longer than {MAINTENANCE_LOCK_TIMEOUT}.",
            sqlstate=getattr(error.orig, "sqlstate", None),
            hint="Nothing was changed. Run this again: only the last step is left.",
        ) from error
    waited = time.monotonic() - began
    report(f"market.ticks is a hypertable now, with the same {total:,} ticks. Writers waited for {waited:.1f} s.")


async def _copy_rest(connection: AsyncConnection) -> int:
    """Copy what came since; return the number of all ticks. Raises StoreError where a day still differs.

    Counting takes a fraction of comparing, and ticks are never changed: writers wait for this.
    """
    days = await _compare(connection, _BY_NUMBER, *EVER)
    for day in days:
        if not day.same:
            await _copy(connection, day.day, day.day + ONE_DAY)
            _refuse_differences(await _compare(connection, _BY_CONTENT, day.day, day.day + ONE_DAY))
    return sum(int(day.old) for day in days)


def _refuse_differences(days: Sequence[sa.Row[Any]]) -> None:
    for day in days:
        if not day.same:
            raise StoreError(
                f"The ticks of {day.day:%Y-%m-%d} are not the same: {day.old} in market.ticks, {day.new} in {COPY}.",
                hint=f"Nothing was changed. DROP TABLE {COPY}, then run this again.",
            )


def _remake(connection: sa.Connection, relations: RelationsRevision, between: Sequence[str] = ()) -> None:
    """Drop the relations on `market.ticks`, run the statements `between`, and make them again with their grants."""
    kept = connection.scalars(sa.text(_KEPT), {"relations": ["market.ticks", *relations.RELATIONS]}).all()
    relations.drop_relations(connection)
    for statement in between:
        connection.exec_driver_sql(statement)
    relations.make_relations(connection)
    for statement in kept:
        connection.exec_driver_sql(statement)
