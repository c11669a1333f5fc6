from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from ingestor.settings import load
from ingestor.store.connect import connect
from ingestor.store.migrate import migrate
from tests.servers import TestServer, with_parts

ROOT = Path(__file__).parents[2]
TICK = "INSERT INTO market.ticks VALUES ($1, now(), 1.5, 10, 1, 'AIR.NZ')"


def alembic(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command itself, with the URL and nothing else."""
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
    await migrate(url, load(), lines.append)
    return lines


async def test_alembic_by_itself(empty_database: str) -> None:
    """`alembic` needs the URL alone: up, clean, down, up again, and clean once more with partitions made."""
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


async def test_idempotent(empty_database: str) -> None:
    """A second run changes nothing, and says so."""
    first = await run(empty_database)
    assert any("from nothing to revision" in line for line in first)
    before = await value(empty_database, "SELECT count(*) FROM ingest.trading_sessions")
    second = await run(empty_database)
    assert any("already" in line for line in second)
    assert not any("Partitions" in line for line in second)
    assert await value(empty_database, "SELECT count(*) FROM ingest.trading_sessions") == before


async def test_several_at_once(empty_database: str) -> None:
    """Instances that start together wait for each other."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "INGESTOR_DATABASE_URL": empty_database}
    command = [sys.executable, "-m", "ingestor", "migrate"]
    started = [
        await asyncio.create_subprocess_exec(
            *command, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        for _ in range(4)
    ]
    for process in started:
        output, _ = await process.communicate()
        assert process.returncode == 0, output
    assert await value(empty_database, "SELECT count(*) FROM ingest.settings") == 1
    assert await value(empty_database, "SELECT count(*) FROM ingest.alembic_version") == 1


async def test_everything_is_commented(database: str) -> None:
    """Every table and every column says what it is."""
    missing = await value(
        database,
        "SELECT array_agg(c.relname || '.' || coalesce(a.attname, '')) FROM pg_class c "
        "JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped "
        "WHERE c.relnamespace IN ('market'::regnamespace, 'ingest'::regnamespace) AND c.relkind IN ('r', 'p') "
        "AND NOT c.relispartition AND c.relname <> 'alembic_version' "
        "AND (obj_description(c.oid) IS NULL OR col_description(c.oid, a.attnum) IS NULL)",
    )
    assert missing is None


async def test_settings_and_calendars(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of the first migration stay; both calendars reach ten years back and a year ahead."""
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


async def test_how_ticks_are_cut(database: str, server: TestServer) -> None:
    """A hypertable of 7-day chunks, or monthly partitions in UTC; the unique key is the only index."""
    indexes = await value(
        database,
        "SELECT array_agg(indexname::text) FROM pg_indexes WHERE schemaname = 'market' AND tablename = 'ticks'",
    )
    assert indexes == ["ticks_symbol_time_price_volume_occurrence_key"]
    if server.edition == "timescale":
        interval = "SELECT time_interval FROM timescaledb_information.dimensions WHERE hypertable_name = 'ticks'"
        assert await value(database, interval) == timedelta(days=7)
        assert await value(database, "SELECT ingest.ensure_partition('2026-03-01')") is False
        return
    for month in (date(2026, 3, 15), date(2026, 4, 1)):
        assert await value(database, "SELECT ingest.ensure_partition($1)", month) is True
        assert await value(database, "SELECT ingest.ensure_partition($1)", month) is False
    last = datetime(2026, 3, 31, 23, 59, 59, 999999, tzinfo=UTC)
    await value(database, TICK, last)
    await value(database, TICK, last + timedelta(microseconds=1))
    for name in ("ticks_2026_03", "ticks_2026_04"):
        assert await value(database, f"SELECT count(*) FROM market.{name}") == 1


async def test_partitions_made_by_many_at_once(writer_url: str, database: str, server: TestServer) -> None:
    """Several writers that need the same months at the same time get one partition of each."""
    connections = [await connect(writer_url) for _ in range(6)]
    months = [date(2000, month, 1) for month in range(1, 13)]
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
    return sum([await connection.fetchval("SELECT ingest.ensure_partition($1)", month) for month in months])


@pytest.mark.parametrize("month", [date(1989, 12, 1), datetime.now(UTC).date() + timedelta(days=500)])
async def test_no_partition_of_nowhere(writer_url: str, server: TestServer, month: date) -> None:
    """A stray date makes no partition."""
    if server.edition == "timescale":
        assert await value(writer_url, "SELECT ingest.ensure_partition($1)", month) is False
        return
    with pytest.raises(asyncpg.InvalidParameterValueError, match="1990"):
        await value(writer_url, "SELECT ingest.ensure_partition($1)", month)


async def test_a_role_that_may_make_neither_role_nor_extension(server: TestServer) -> None:
    """The owner of a database can migrate it; what it may not do is done without, or said with the SQL to run."""
    name = server.new_name()
    await server.run(f"CREATE ROLE {name} LOGIN PASSWORD 'owner'")
    await server.create(name)
    await server.run(f"ALTER DATABASE {name} OWNER TO {name}")
    try:
        url = with_parts(server.url, database=name, user=name, password="owner")
        lines = await run(url)
        assert any("from nothing to revision" in line for line in lines)
        assert await value(url, "SELECT has_table_privilege('market_write', 'market.ticks', 'INSERT')")
    finally:
        await server.drop(name)
        await server.run(f"DROP ROLE {name}")


async def test_temporary_tables_are_granted_where_they_were_taken_away(empty_database: str) -> None:
    """The staged way needs a temporary table; a database that keeps strangers from them gets the grant."""
    name = empty_database.rpartition("/")[2].partition("?")[0]
    await value(empty_database, f"REVOKE TEMPORARY ON DATABASE {name} FROM PUBLIC")
    await run(empty_database)
    may = "SELECT has_database_privilege('market_write', current_database(), 'TEMPORARY')"
    assert await value(empty_database, may) is True
