"""The rollup beside writers, other rollups, killed ones and limits of the server."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import pytest

from ingestor.admin.bars import store_bars
from ingestor.errors import StoreError
from ingestor.simulator.server import Simulator
from ingestor.store.connect import connect
from ingestor.store.inspect import inspect
from ingestor.store.queries import QUERIES
from ingestor.store.rollup import MAX_SPAN, Rollup, RollupSize
from tests.bars import assert_bars, insert, maintained, some_ticks
from tests.recording import running, settings, until
from tests.servers import TestServer, execute_all, query

OLD = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(days=3)
STORED = "SELECT count(*) FROM ingest.rollup_1m"
WAITING = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"


@pytest.fixture(autouse=True)
def without_aggregates(server: TestServer) -> None:
    """Skip an edition in which TimescaleDB stores the bars."""
    if server.is_community:
        pytest.skip("TimescaleDB Community stores the bars")


@pytest.fixture
async def ticks(database: str) -> int:
    """Insert ticks of two days; return the number of their minutes."""
    rows = some_ticks(OLD, 2, 600)
    await insert(database, rows)
    return len({(row[5], row[0].replace(second=0, microsecond=0)) for row in rows})


async def rolled_up(url: str, *, waits: bool = False) -> int:
    """Run the rollup; return how many bars it has stored."""
    async with Rollup(url, timeout=60, waits=waits) as rollup:
        return sum([step.bars async for step in rollup.steps()])


async def test_a_killed_rollup(database: str, writer_url: str, ticks: int) -> None:
    """A rollup that is killed before its commit leaves nothing, and the next one stores each bar once."""
    connection = await connect(database)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("SELECT ingest.announce_rollup(now())")
    await connection.execute("SELECT ingest.roll_up(now(), false)")
    connection.terminate()  # as the end of a killed process
    await until(database, STORED, 0)
    assert await rolled_up(writer_url) == ticks
    assert await query(database, STORED) == [(ticks,)]
    await assert_bars(database)


async def test_two_rollups(database: str, writer_url: str, ticks: int) -> None:
    """One of two rollups does the work: a daemon's leaves it to the other, and `ingestor maintain` waits for it."""
    connection = await connect(database)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("SELECT * FROM ingest.rollup_state FOR UPDATE")
    # A daemon tries while another process is in the middle of a step.
    assert await connection.fetchval("SELECT until_1m FROM ingest.rollup_state") < OLD
    other = await connect(writer_url)
    assert await other.fetchval("SELECT ingest.roll_up(now(), false)") is None
    assert await other.fetchval("SELECT ingest.repair_bars(10, false)") is None
    await other.close()
    await transaction.rollback()
    await connection.close()
    lines: list[str] = []
    stored = await asyncio.gather(rolled_up(writer_url), rolled_up(writer_url), store_bars(database, lines.append))
    assert sum(count or 0 for count in stored) <= ticks
    assert await query(database, STORED) == [(ticks,)]
    await assert_bars(database)


async def test_a_writer_that_began_before_the_announcement(database: str, writer_url: str, ticks: int) -> None:
    """The rollup waits for a transaction that may contain ticks that are not noted as late."""
    writer = await connect(database)
    transaction = writer.transaction()
    await transaction.start()
    await writer.execute(QUERIES["lock_ticks"])
    row = (OLD + timedelta(minutes=1), OLD, 7.5, 1, 1, "SLOW.NZ")
    await writer.execute("INSERT INTO market.ticks (time, received_at, price, volume, occurrence, symbol) "
                         "VALUES ($1, $2, $3, $4, $5, $6)", *row)  # fmt: skip
    rolling = asyncio.create_task(rolled_up(writer_url))
    await until(database, WAITING, 1)
    assert await query(database, STORED) == [(0,)]
    await transaction.commit()
    await writer.close()
    assert await rolling == ticks + 1
    assert await query(database, "SELECT count(*) FROM ingest.stale_bars") == [(0,)]
    await assert_bars(database)


async def limit_rows(database: str, action: str) -> None:
    """Let the server act on a transaction that stores more than 60 bars."""
    await execute_all(
        database,
        f"""
        CREATE FUNCTION public.limit_rows() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF (SELECT count(*) FROM added) > 60 THEN
                {action};
            END IF;
            RETURN NULL;
        END $$
        """,
        "CREATE TRIGGER limit_rows AFTER INSERT ON ingest.rollup_1m REFERENCING NEW TABLE AS added "
        "FOR EACH STATEMENT EXECUTE FUNCTION public.limit_rows()",
    )


TERMINATE = "PERFORM pg_terminate_backend(pg_backend_pid()), pg_sleep(60)"


@pytest.mark.parametrize("limit", ["rollup", "transaction_timeout", "watchdog", "disk"])
async def test_a_server_that_limits_transactions(
    server: TestServer, database: str, writer_url: str, ticks: int, limit: str
) -> None:
    """If a step exceeds a limit, the next ones store a shorter span, on a new connection if the old one was ended."""
    size = RollupSize()
    action = {"watchdog": TERMINATE, "disk": "RAISE EXCEPTION 'no space' USING ERRCODE = '53100'"}.get(limit)
    await limit_rows(database, action or "PERFORM pg_sleep(60)")
    if limit == "transaction_timeout":
        if (await query(database, "SELECT current_setting('server_version_num')::int >= 170000")) == [(False,)]:
            pytest.skip("transaction_timeout is new in PostgreSQL 17")
        name = urlsplit(database).path[1:]
        await server.run(f"ALTER ROLE {server.prefix} IN DATABASE {name} SET transaction_timeout = '1s'")
    async with Rollup(writer_url, timeout=1 if limit == "rollup" else 60, size=size) as rollup:
        steps = [step async for step in rollup.steps()]
    assert sum(step.bars for step in steps) == ticks
    assert sum(step.bars == 0 for step in steps) < len(steps) / 2
    await assert_bars(database)


async def test_the_next_rollup_knows_the_size(server: TestServer, database: str, writer_url: str, ticks: int) -> None:
    """A rollup that cannot connect again after its connection was ended fails, and the next one begins smaller."""
    name = urlsplit(database).path[1:]
    size = RollupSize()
    await limit_rows(database, TERMINATE)
    async with Rollup(writer_url, timeout=60, size=size) as rollup:
        await server.run(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false", "postgres")
        with pytest.raises(StoreError, match="not currently accepting connections"):
            await anext(rollup.steps())
        await server.run(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true", "postgres")
    assert size.span.value == MAX_SPAN // 2
    async with Rollup(writer_url, timeout=60, size=size) as rollup:
        assert sum([step.bars async for step in rollup.steps()]) == ticks
    await assert_bars(database)


async def test_the_daemon_survives_a_watchdog(database: str, writer_url: str, ticks: int) -> None:
    """The daemon stores a backlog although the server ends long transactions with their connections."""
    await limit_rows(database, TERMINATE)
    async with Simulator(port=0, rate=0) as simulator, running(settings(simulator, writer_url)) as daemon:
        await until(database, STORED, ticks)
    assert daemon.telemetry.counts.rollup_failures == 0
    await assert_bars(database)


async def test_the_daemon_stores_bars_while_it_records(database: str, writer_url: str, ticks: int) -> None:
    """The daemon stores the bars of the ticks that it finds, unless INGESTOR_ROLLUP is off."""
    async with Simulator(port=0, rate=0) as simulator:
        async with running(settings(simulator, writer_url, rollup="off")):
            await simulator.wait_connected()
            await until(database, "SELECT count(*) FROM ingest.stream_sessions", 1)
        assert await query(database, STORED) == [(0,)]
        async with running(settings(simulator, writer_url)) as daemon:
            await until(database, STORED, ticks)
        assert daemon.telemetry.counts.bars_stored == ticks
    await assert_bars(database)


async def test_a_daemon_stops_while_its_rollup_waits(database: str, writer_url: str, ticks: int) -> None:
    """The daemon ends at once although a statement of its rollup is not answered."""
    holder = await connect(database)
    transaction = holder.transaction()
    await transaction.start()
    await holder.execute("LOCK TABLE ingest.rollup_1m")
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    async with Simulator(port=0, rate=0) as simulator:
        async with running(settings(simulator, writer_url)) as daemon:
            await until(database, waiting, 1)
        assert daemon.telemetry.counts.rollup_failures == 0
    await transaction.rollback()
    await holder.close()
    assert await rolled_up(writer_url, waits=True) == ticks
    await assert_bars(database)


async def test_ticks_without_bars_are_found(database: str) -> None:
    """`inspect` tells how far bars are stored, once a tick after that has waited for days."""
    now = datetime.now(UTC)
    await insert(database, [(now - timedelta(hours=40), now, 1.5, 1, 1, "A.NZ")])
    assert await _stored_until(database) is None
    await insert(database, [(now - timedelta(hours=50), now, 1.5, 1, 1, "A.NZ")])
    assert await _stored_until(database) == datetime(1, 1, 1, tzinfo=UTC)
    await maintained(database)
    assert await _stored_until(database) is None


async def _stored_until(url: str) -> datetime | None:
    facts = await inspect(url)
    assert facts.schema is not None
    return facts.schema.stored_until
