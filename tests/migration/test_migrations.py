from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from ingestor.admin.migrate import migrate
from ingestor.embedded import EmbeddedServer
from ingestor.settings import load_settings
from ingestor.store.connect import connect
from ingestor.store.gaps import Bounds, GapStore
from ingestor.store.ticks import TickStore, WriteResult
from tests.clocks import HANG_SECONDS
from tests.integration.test_store import batcher, filled, tick
from tests.servers import TestServer, with_parts

ROOT = Path(__file__).parents[2]
TICK = "INSERT INTO market.ticks VALUES ($1, now(), 1.5, 10, 1, 'AIR.NZ')"


def alembic(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `alembic` with the URL and nothing else."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "INGESTOR_DATABASE_URL": url}
    command = [sys.executable, "-m", "alembic", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60)


async def value(url: str, sql: str, *arguments: Any) -> Any:
    connection = await connect(url)
    try:
        return await connection.fetchval(sql, *arguments)
    finally:
        await connection.close()


async def run(url: str) -> list[str]:
    lines: list[str] = []
    await migrate(url, load_settings(), lines.append)
    return lines


async def at_once(statement: str, *urls: str) -> None:
    """Run `ingestor migrate` for each database at the same time; all must end with 0.

    The statement, not committed, makes what the migrations make: it is rolled back once all wait for it.
    """
    holder, watcher = await connect(urls[0]), await connect(urls[0])
    transaction = holder.transaction()
    await transaction.start()
    await holder.execute(statement)
    started = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "ingestor", "migrate"),
            env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "INGESTOR_DATABASE_URL": url},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        for url in urls
    ]
    waiting = (
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE application_name = 'ingestor migrate' AND wait_event_type = 'Lock' AND datname = ANY($1)"
    )
    names = [urlsplit(url).path.lstrip("/") for url in urls]
    async with asyncio.timeout(HANG_SECONDS):
        while await watcher.fetchval(waiting, names) < len(urls):
            await asyncio.sleep(0.02)
    await transaction.rollback()
    await holder.close()
    await watcher.close()
    for process in started:
        output, _ = await process.communicate()
        assert process.returncode == 0, output


def month(ahead: int) -> date:
    """Return the first day of the month so many months ahead."""
    years, index = divmod(datetime.now(UTC).month - 1 + ahead, 12)
    return date(datetime.now(UTC).year + years, index + 1, 1)


async def test_alembic_alone(empty_database: str) -> None:
    """`alembic` needs only the URL: up, check, down, up; then the same with data."""
    for arguments in (("upgrade", "head"), ("check",), ("downgrade", "base"), ("upgrade", "head")):
        found = await asyncio.to_thread(alembic, empty_database, *arguments)
        assert found.returncode == 0, found.stderr
    await value(empty_database, "SELECT ingest.ensure_partition('2026-03-01')")
    await value(empty_database, TICK, datetime(2026, 3, 2, tzinfo=UTC))
    found = await asyncio.to_thread(alembic, empty_database, "check")
    assert found.returncode == 0, found.stdout + found.stderr
    found = await asyncio.to_thread(alembic, empty_database, "downgrade", "base")
    assert found.returncode == 0, found.stderr
    assert await value(empty_database, "SELECT to_regnamespace('market') IS NULL")
    assert await value(empty_database, "SELECT count(*) FROM pg_roles WHERE rolname = 'market_write'") == 1
    for arguments in (("upgrade", "head"), ("check",)):
        found = await asyncio.to_thread(alembic, empty_database, *arguments)
        assert found.returncode == 0, found.stdout + found.stderr
    assert await value(empty_database, "SELECT count(*) FROM market.ticks") == 0


async def test_idempotent(empty_database: str, server: TestServer) -> None:
    """Each step is reported in a sentence; a second run changes nothing and says so."""
    first = await run(empty_database)
    expected = [
        r"The schema went from nothing to revision \d{4}\.",
        r"The calendar in force is XNZE, in Pacific/Auckland\.",
        *([r"Partitions were made for \d{4}-\d\d, \d{4}-\d\d, \d{4}-\d\d\."] if server.edition == "plain" else []),
        r"Trading sessions are known until \d{4}-\d\d-\d\d\.",
        *([r"Ticks go to the columnstore at an age of 14 days\."] if server.is_community else []),
    ]
    assert len(first) == len(expected)
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(expected, first, strict=True)), first
    before = await value(empty_database, "SELECT count(*) FROM ingest.trading_sessions")
    second = await run(empty_database)
    (known,) = [line for line in first if line.startswith("Trading")]
    assert second == [first[0].replace("went from nothing to", "is at")[:-1] + " already.", known]
    assert await value(empty_database, "SELECT count(*) FROM ingest.trading_sessions") == before


async def test_concurrent_migrations(empty_database: str) -> None:
    """Instances that start together wait for each other."""
    await at_once("CREATE SCHEMA ingest", *[empty_database] * 4)
    assert await value(empty_database, "SELECT count(*) FROM ingest.settings") == 1
    assert await value(empty_database, "SELECT count(*) FROM ingest.alembic_version") == 1


async def test_everything_is_commented(database: str) -> None:
    """Every table and every column has a comment."""
    missing = await value(
        database,
        "SELECT array_agg(c.relname || '.' || coalesce(a.attname, '')) FROM pg_class c "
        "JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped "
        "WHERE c.relnamespace IN ('market'::regnamespace, 'ingest'::regnamespace) AND c.relkind IN ('r', 'p', 'v') "
        "AND NOT c.relispartition AND c.relname <> 'alembic_version' "
        "AND (obj_description(c.oid) IS NULL OR col_description(c.oid, a.attnum) IS NULL)",
    )
    assert missing is None
    tables = (
        "SELECT count(*) FROM pg_tables WHERE schemaname IN ('market', 'ingest') AND tablename !~ '^ticks_|^alembic'"
    )
    assert await value(database, tables) == 21


async def test_settings_and_calendars(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of the first migration are kept; both calendars reach from ten years back to a year ahead."""
    monkeypatch.setenv("INGESTOR_EXCHANGE_CALENDAR", "always")
    await run(database)
    assert await value(database, "SELECT calendar FROM ingest.settings") == "XNZE"
    assert await value(database, "SELECT coverage_lead FROM ingest.settings") == timedelta(hours=1)
    today = datetime.now(UTC).date()
    for calendar in ("XNZE", "always"):
        sql = "SELECT {}(trading_day) FROM ingest.trading_sessions WHERE calendar = $1"
        assert (await value(database, sql.format("min"), calendar)).year == today.year - 10
        assert (await value(database, sql.format("max"), calendar)) > today + timedelta(days=365)
    opens = "SELECT opens_at FROM ingest.trading_sessions WHERE calendar = 'XNZE' AND trading_day = $1"
    assert await value(database, opens, date(2026, 3, 2)) == datetime(2026, 3, 1, 21, tzinfo=UTC)


async def test_partitions_of_ticks(database: str, server: TestServer) -> None:
    """Ticks are a hypertable of 7-day chunks, or monthly partitions in UTC, with the key and indexes on the times."""
    indexes = await value(
        database,
        "SELECT array_agg(indexname::text) FROM pg_indexes WHERE schemaname = 'market' AND tablename = 'ticks'",
    )
    assert sorted(indexes) == [
        "ticks_received_at_idx",
        "ticks_symbol_time_price_volume_occurrence_key",
        "ticks_time_idx",
    ]
    if server.edition == "timescale":
        interval = "SELECT time_interval FROM timescaledb_information.dimensions WHERE hypertable_name = 'ticks'"
        assert await value(database, interval) == timedelta(days=7)
        assert await value(database, "SELECT ingest.ensure_partition('2026-03-01')") is False
        return
    for day in (date(2026, 3, 15), date(2026, 4, 1)):
        assert await value(database, "SELECT ingest.ensure_partition($1)", day) is True
        assert await value(database, "SELECT ingest.ensure_partition($1)", day) is False
    last = datetime(2026, 3, 31, 23, 59, 59, 999999, tzinfo=UTC)
    await value(database, TICK, last)
    await value(database, TICK, last + timedelta(microseconds=1))
    for name in ("ticks_2026_03", "ticks_2026_04"):
        assert await value(database, f"SELECT count(*) FROM market.{name}") == 1


async def test_partitions_made_by_many_at_once(writer_url: str, database: str, server: TestServer) -> None:
    """Several writers that need the same months at the same time get one partition of each."""
    connections = [await connect(writer_url) for _ in range(6)]
    months = [date(2000, number, 1) for number in range(1, 13)]
    made = await asyncio.gather(
        *(
            _ensure(connection, months if number % 2 else list(reversed(months)))
            for number, connection in enumerate(connections)
        )
    )
    assert sum(made) == (12 if server.edition == "plain" else 0)
    for connection in connections:
        await connection.close()


async def _ensure(connection: asyncpg.Connection, months: list[date]) -> int:
    return sum([await connection.fetchval("SELECT ingest.ensure_partition($1)", day) for day in months])


async def test_no_default_partition(writer_url: str, server: TestServer) -> None:
    """A date out of range makes no partition: the first year is 1990, the last month is 13 months ahead."""
    ensure = "SELECT ingest.ensure_partition($1)"
    for allowed in (date(1990, 1, 1), month(13)):
        assert await value(writer_url, ensure, allowed) is (server.edition == "plain")
    for stray in (date(1989, 12, 31), month(14)):
        if server.edition == "timescale":
            assert await value(writer_url, ensure, stray) is False
            continue
        with pytest.raises(asyncpg.InvalidParameterValueError, match="1990"):
            await value(writer_url, ensure, stray)


async def test_a_role_without_createrole_and_extensions(server: TestServer) -> None:
    """The owner of a database can migrate it; missing privileges are worked around, or reported with the SQL to run."""
    name = server.new_name()
    await server.run(f"CREATE ROLE {name} LOGIN PASSWORD 'owner'")
    await server.create(name)
    await server.run(f"ALTER DATABASE {name} OWNER TO {name}")
    try:
        url = with_parts(server.url, database=name, user=name, password="owner")
        lines = await run(url)
        assert any("from nothing to revision" in line for line in lines)
        assert await value(url, "SELECT has_table_privilege('market_write', 'market.ticks', 'INSERT')")
        # An available extension is either created (if it is trusted), or the SQL for a superuser is reported.
        made = await value(url, "SELECT count(*) FROM pg_extension WHERE extname = 'timescaledb'")
        reported = [line for line in lines if "CREATE EXTENSION timescaledb" in line]
        assert (made, len(reported)) in ([(0, 0)] if server.edition == "plain" else [(1, 0), (0, 1)])
        assert not any("\n" in line for line in lines)
    finally:
        await server.drop(name)
        await server.run(f"DROP ROLE {name}")


async def test_the_first_role_that_may_not_create_roles() -> None:
    """Without CREATEROLE the tables are made, and one line gives the SQL that completes the daemon's login."""
    with EmbeddedServer() as server:
        await value(server.url(), "CREATE ROLE owner LOGIN PASSWORD 'owner'")
        await value(server.url(), "CREATE DATABASE market OWNER owner")
        lines = await run(with_parts(server.url("market"), database="market", user="owner", password="owner"))
        first, *others = [text for text in lines if "market_write" in text]
        (reader,) = [text for text in lines if "The role market_read" in text]
        assert "\n" not in "".join(lines)
        assert any("from nothing to revision" in text for text in lines)
        connection = await connect(server.url("market"))
        await connection.execute(first.partition("superuser run: ")[2])
        for text in others:
            await connection.execute(text.partition("in addition: ")[2])
        await connection.execute(reader.partition("superuser run: ")[2])
        await connection.execute("CREATE ROLE daemon LOGIN PASSWORD 'daemon' IN ROLE market_write")
        await connection.execute("SET ROLE owner; CREATE TABLE market.later (); RESET ROLE")
        assert await connection.fetchval("SELECT has_table_privilege('market_read', 'market.later', 'SELECT')")
        await connection.close()
        store = TickStore(
            with_parts(server.url("market"), database="market", user="daemon", password="daemon"), write_timeout=10
        )
        assert await store.write([filled(batcher(), tick())]) == WriteResult(1, 1, 0, 0)
        await store.close()
        async with GapStore(
            with_parts(server.url("market"), database="market", user="daemon", password="daemon")
        ) as one:
            assert await one.fillable(Bounds()) == []


async def test_several_databases_of_a_new_server_at_once() -> None:
    """Concurrent migrations of several databases do not collide over the server's roles."""
    with EmbeddedServer() as server:
        for number in range(4):
            await value(server.url(), f"CREATE DATABASE market_{number}")
        await at_once("CREATE ROLE market_write", *(server.url(f"market_{number}") for number in range(4)))
        granted = "SELECT has_table_privilege('market_write', 'market.ticks', 'INSERT')"
        for number in range(4):
            assert await value(server.url(f"market_{number}"), granted) is True


async def test_temporary_tables_are_granted_where_they_were_taken_away(empty_database: str) -> None:
    """If a database denies temporary tables to the public, the migration grants them for the staging table."""
    name = empty_database.rpartition("/")[2].partition("?")[0]
    await value(empty_database, f"REVOKE TEMPORARY ON DATABASE {name} FROM PUBLIC")
    await run(empty_database)
    may = "SELECT has_database_privilege('market_write', current_database(), 'TEMPORARY')"
    assert await value(empty_database, may) is True
