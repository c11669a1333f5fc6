"""A database that gains TimescaleDB after its migration keeps the same ticks in a hypertable."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest

from ingestor.admin import hypertable as adopt_module
from ingestor.admin.hypertable import convert_to_hypertable, tell_of_adoption
from ingestor.admin.migrate import migrate
from ingestor.clock import from_datetime
from ingestor.errors import StoreError
from ingestor.model import SECOND, Micros
from ingestor.settings import load_settings
from ingestor.store.connect import connect
from ingestor.store.ticks import TickStore
from tests.bars import assert_bars, insert, maintained, some_ticks
from tests.clocks import HANG_SECONDS
from tests.commands import ingestor, start
from tests.conftest import EDITIONS
from tests.integration.test_store import batcher, filled, tick
from tests.migration.test_migrations import alembic
from tests.servers import TestServer, execute_all, query, with_parts

pytestmark = pytest.mark.skipif("timescale" not in EDITIONS, reason="needs INGESTOR_TEST_TIMESCALE_URL")

MARCH = datetime(2026, 3, 5, tzinfo=UTC)
NOW: Micros = from_datetime(datetime.now(UTC).replace(microsecond=0))
KINDS = {True: "partitioned", False: "hypertable"}

# A server that has the extension, which at first no role may create.
REFUSE = """
CREATE FUNCTION public.refuse() RETURNS event_trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION 'not now'; END $$;
CREATE EVENT TRIGGER refuse ON ddl_command_start WHEN TAG IN ('CREATE EXTENSION') EXECUTE FUNCTION public.refuse()
"""
ALLOW = "DROP EVENT TRIGGER refuse; DROP FUNCTION public.refuse()"
IS_PARTITIONED = "SELECT EXISTS (SELECT FROM pg_partitioned_table WHERE partrelid = 'market.ticks'::regclass)"
GRANTS = """
SELECT c.relname::text, attname::text, a.grantee, a.privilege_type, a.is_grantable
FROM pg_class c, LATERAL (SELECT NULL AS attname, relacl AS acl
                          UNION ALL SELECT attname, attacl FROM pg_attribute WHERE attrelid = c.oid) AS of,
     aclexplode(of.acl) AS a
WHERE relnamespace = 'market'::regnamespace AND NOT relispartition ORDER BY 1, 2, 3, 4
"""
ROWS = "SELECT * FROM market.ticks ORDER BY symbol, time, price, volume, occurrence"


@pytest.fixture(scope="module")
def template(timescale: TestServer) -> Iterator[str]:
    """Make a database with partitions of five months on a server that has the extension."""
    name = timescale.new_name()
    asyncio.run(_prepare(timescale, name))
    yield name
    asyncio.run(timescale.drop(name))


async def _prepare(server: TestServer, name: str) -> None:
    url = await server.create(name)
    await execute_all(url, REFUSE)
    await migrate(url, load_settings(), lambda _: None)
    await execute_all(url, ALLOW)
    await insert(url, some_ticks(MARCH - timedelta(days=60), 120, 700))
    # No more connections: TimescaleDB's workers would keep the template from being cloned.
    await server.run(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")


@pytest.fixture
async def partitioned(timescale: TestServer, template: str) -> AsyncIterator[str]:
    """Clone that database for one test and return its owner's URL."""
    name = timescale.new_name()
    yield await timescale.create(name, template)
    await timescale.drop(name)


async def _converted(url: str, report: Callable[[str], None] = lambda _: None) -> list[str]:
    lines: list[str] = []

    def both(line: str) -> None:
        lines.append(line)
        report(line)

    await convert_to_hypertable(url, load_settings(), both)
    return lines


async def _kind(url: str) -> str:
    ((is_partitioned,),) = await query(url, IS_PARTITIONED)
    return KINDS[is_partitioned]


def _stop_at(part: str) -> Callable[[str], None]:
    def report(line: str) -> None:
        if part in line:
            raise InterruptedError(line)

    return report


async def test_the_same_ticks_and_bars(partitioned: str, timescale: TestServer) -> None:
    """Every row, bar, name, grant and comment is kept; a second run does nothing, and a downgrade works."""
    await execute_all(
        partitioned, "GRANT SELECT (price) ON market.ticks TO PUBLIC", "GRANT SELECT ON market.latest TO PUBLIC"
    )
    rows, bars = await query(partitioned, ROWS), await assert_bars(partitioned)
    grants = await query(partitioned, GRANTS)
    about = "SELECT obj_description('market.ticks'::regclass), col_description('market.ticks'::regclass, 1)"
    comments = await query(partitioned, about)
    hints: list[str] = []
    await tell_of_adoption(partitioned, hints.append)
    assert len(hints) == 1
    assert "--convert-to-hypertable" in hints[0]

    lines = await _converted(partitioned)

    copied = [line for line in lines if line.startswith("2026-")]
    assert [line[:7] for line in copied] == ["2026-01", "2026-02", "2026-03", "2026-04", "2026-05"]
    assert any("700 ticks" in line for line in lines)
    assert await _kind(partitioned) == "hypertable"
    assert await query(partitioned, ROWS) == rows
    assert await assert_bars(partitioned) == bars
    assert await query(partitioned, about) == comments
    names = "SELECT indexname::text FROM pg_indexes WHERE schemaname = 'market' AND tablename = 'ticks' ORDER BY 1"
    expected = ["ticks_received_at_idx", "ticks_symbol_time_price_volume_occurrence_key", "ticks_time_idx"]
    assert await query(partitioned, names) == [(name,) for name in expected]
    interval = "SELECT time_interval FROM timescaledb_information.dimensions WHERE hypertable_name = 'ticks'"
    assert await query(partitioned, interval) == [(timedelta(days=7),)]
    assert await query(partitioned, "SELECT ingest.ensure_partition('2026-07-01')") == [(False,)]
    assert await query(partitioned, GRANTS) == grants

    assert await _converted(partitioned) == ["market.ticks is a hypertable already: there is nothing to convert."]
    await tell_of_adoption(partitioned, hints.append)
    assert len(hints) == 1
    for arguments in (("check",), ("downgrade", "base")):
        found = await asyncio.to_thread(alembic, partitioned, *arguments)
        assert found.returncode == 0, found.stdout + found.stderr
    assert await query(partitioned, "SELECT to_regnamespace('market') IS NULL") == [(True,)]


async def test_the_daemon_keeps_writing(partitioned: str, timescale: TestServer) -> None:
    """A connection that writes before, during and after, old ticks too, never fails; each tick is stored once."""
    store, instance, written = TickStore(timescale.writer_url(partitioned), write_timeout=10), batcher(), 0
    before = await query(partitioned, "SELECT count(*) FROM market.ticks")

    async def write() -> None:
        nonlocal written
        old = NOW - (written * 1801 % (250 * 86400)) * SECOND
        await store.write([filled(instance, tick(f"{written}.NZ", old), tick(f"{written}.NZ", NOW + SECOND))])
        written += 1

    async def keep_writing() -> None:
        while True:
            await write()

    await write()
    connection = (await store.open()).connection
    writing = asyncio.create_task(keep_writing())
    counts: dict[str, int] = {}
    await _converted(partitioned, lambda line: counts.update({line[:7]: written}))
    at_the_end = written
    while written < at_the_end + 10 and not writing.done():
        await asyncio.sleep(0.01)
    assert (await store.open()).connection is connection
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert 0 < counts["2026-01"] < counts["2026-05"]
    assert written >= at_the_end + 10
    await store.close()
    assert await _kind(partitioned) == "hypertable"
    distinct = "SELECT count(*), count(DISTINCT symbol) FROM market.ticks WHERE symbol ~ '^[0-9]+\\.NZ$'"
    ((ticks, symbols),) = await query(partitioned, distinct)
    assert symbols in {written, written + 1}  # a cancelled commit may have succeeded
    assert ticks == 2 * symbols
    assert await query(partitioned, "SELECT count(*) FROM market.ticks") == [(before[0][0] + ticks,)]
    await maintained(partitioned)  # old ticks came meanwhile
    await assert_bars(partitioned)


async def test_a_killed_conversion_is_resumed(partitioned: str, timescale: TestServer) -> None:
    """After SIGKILL during the copy and in the last step, a second run completes, with a late tick too."""
    bars = await assert_bars(partitioned)
    with pytest.raises(InterruptedError):
        await _converted(partitioned, _stop_at("2026-02"))
    one = "INSERT INTO market.ticks_adopted SELECT * FROM market.ticks_2026_03 LIMIT 1"
    await _kill_while_waiting_for(partitioned, one)
    assert await query(partitioned, "SELECT DISTINCT to_char(time, 'MM') FROM market.ticks_adopted ORDER BY 1") == [
        ("01",), ("02",)
    ]  # fmt: skip
    found = await asyncio.to_thread(alembic, partitioned, "check")
    assert found.returncode == 0, found.stdout + found.stderr
    assert await query(partitioned, "SELECT obj_description('market.ticks_adopted'::regclass) IS NULL") == [(False,)]
    store = TickStore(timescale.writer_url(partitioned), write_timeout=10)
    old = from_datetime(MARCH - timedelta(days=50))
    await store.write([filled(batcher(), tick("LATE.NZ", old))])
    await store.close()

    await _kill_while_waiting_for(partitioned, "SELECT FROM market.latest LIMIT 0")
    assert await _kind(partitioned) == "partitioned"
    lines = await _converted(partitioned)
    assert "going on with what an earlier run has left" in lines[0]
    assert [line for line in lines[1:6] if "copied before" not in line] == []
    assert await _kind(partitioned) == "hypertable"
    assert await query(partitioned, "SELECT count(*) FROM market.ticks WHERE symbol = 'LATE.NZ'") == [(1,)]
    assert {name: count + 1 for name, count in bars.items()} == await assert_bars(partitioned)


async def _kill_while_waiting_for(url: str, statement: str) -> None:
    """Kill the command while it waits for another transaction."""
    holder, watcher = await connect(url), await connect(url)
    transaction = holder.transaction()
    await transaction.start()
    await holder.execute(statement)
    process = await start("migrate", "--convert-to-hypertable", DATABASE_URL=url)
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    async with asyncio.timeout(HANG_SECONDS):
        while not await watcher.fetchval(waiting):
            assert process.returncode is None
            await asyncio.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    await process.wait()
    await transaction.rollback()
    await holder.close()
    await watcher.close()


async def test_a_late_tick(partitioned: str) -> None:
    """A late tick of a month that was copied already is found by the last comparison."""
    with pytest.raises(InterruptedError):
        await _converted(partitioned, _stop_at("2026-04"))
    late = [(MARCH, MARCH, 9.0, 1, 1, "LATE.NZ"), (MARCH - timedelta(days=70), MARCH, 9.0, 1, 1, "LATE.NZ")]
    tasks: list[asyncio.Task[None]] = []

    def report(line: str) -> None:
        if line.startswith("2026-05"):
            tasks.append(asyncio.create_task(insert(partitioned, late)))

    await _converted(partitioned, report)
    await asyncio.gather(*tasks)
    assert await query(partitioned, "SELECT count(*) FROM market.ticks WHERE symbol = 'LATE.NZ'") == [(2,)]
    await assert_bars(partitioned)


async def test_a_tick_during_the_last_step(partitioned: str, timescale: TestServer) -> None:
    """A tick that is committed while the last step waits is copied, at any isolation level of other sessions."""
    name = partitioned.rpartition("/")[2]
    await timescale.run(f"ALTER DATABASE {name} SET default_transaction_isolation = 'repeatable read'")
    writer = await connect(partitioned)
    transaction = writer.transaction()
    await transaction.start()
    await writer.execute("LOCK TABLE ingest.stream_sessions IN ROW EXCLUSIVE MODE")
    await writer.execute("INSERT INTO market.ticks VALUES ($1, $1, 9.0, 1, 1, 'LAST.NZ')", MARCH)
    converting = asyncio.create_task(_converted(partitioned))
    async with asyncio.timeout(60):
        while await query(partitioned, "SELECT count(*) FROM pg_locks WHERE NOT granted") == [(0,)]:
            assert not converting.done(), converting.result()
            await asyncio.sleep(0.01)
    await transaction.commit()
    await writer.close()
    await converting
    assert await query(partitioned, "SELECT count(*) FROM market.ticks WHERE symbol = 'LAST.NZ'") == [(1,)]


async def test_the_table_is_in_use(partitioned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long query ends the last step with a line that names the remedy, and changes nothing."""
    monkeypatch.setattr(adopt_module, "MAINTENANCE_LOCK_TIMEOUT", "200ms")
    connection = await connect(partitioned)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("SELECT FROM market.ticks")
    with pytest.raises(StoreError, match=r"200ms\. Nothing was changed\. Run this again"):
        await _converted(partitioned)
    assert await _kind(partitioned) == "partitioned"
    await transaction.rollback()
    await connection.close()
    await _converted(partitioned)
    assert await _kind(partitioned) == "hypertable"


async def test_foreign_objects_are_kept(partitioned: str) -> None:
    """Foreign views, indexes and triggers on ticks or bars are refused by name before any work."""
    await execute_all(
        partitioned,
        "CREATE SCHEMA desk",
        "CREATE VIEW desk.daily AS SELECT symbol, close FROM market.ohlcv_1d",
        "CREATE MATERIALIZED VIEW desk.march AS SELECT * FROM market.ticks_2026_03",
        "CREATE INDEX by_price ON market.ticks (price)",
        "CREATE FUNCTION desk.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN new; END'",
        "CREATE RULE r AS ON DELETE TO market.ticks DO INSTEAD NOTHING",
        "CREATE TRIGGER t AFTER INSERT ON market.ticks FOR EACH ROW EXECUTE FUNCTION desk.f()",
    )
    with pytest.raises(StoreError, match="depend on market") as caught:
        await _converted(partitioned)
    assert caught.value.message.partition(": ")[2].rstrip(".").split(", ") == [
        "index market.by_price",
        "materialized view desk.march",
        "rule r on table market.ticks",
        "trigger t on table market.ticks",
        "view desk.daily",
    ]
    assert await query(partitioned, "SELECT to_regclass('market.ticks_adopted') IS NULL") == [(True,)]
    await execute_all(
        partitioned, "DROP INDEX market.by_price", "DROP RULE r ON market.ticks", "DROP SCHEMA desk CASCADE"
    )
    await _converted(partitioned)


@pytest.mark.parametrize(
    "change",
    [
        "INSERT INTO market.ticks_adopted VALUES ('2026-03-05 12:00Z', now(), 1.5, 10, 1, 'STRAY.NZ')",
        "INSERT INTO market.ticks_adopted VALUES ('2031-03-05 12:00Z', now(), 1.5, 10, 1, 'STRAY.NZ')",
        "UPDATE market.ticks_adopted SET received_at = now() WHERE time >= '2026-03-05' AND time < '2026-03-06'",
    ],
    ids=["one more", "one in a month without any", "another content"],
)
async def test_different_tables(partitioned: str, change: str) -> None:
    """A copy with a row that the table lacks is refused with its day; then the copy is made again."""
    with pytest.raises(InterruptedError):
        await _converted(partitioned, _stop_at("2026-05"))
    rows = await query(partitioned, ROWS)
    await execute_all(partitioned, change)
    with pytest.raises(StoreError, match=r"The ticks of 20\d\d-03-05 are not the same: \d+ in market\.ticks, \d+ in"):
        await _converted(partitioned)
    assert await _kind(partitioned) == "partitioned"
    assert await query(partitioned, ROWS) == rows
    await execute_all(partitioned, "DROP TABLE market.ticks_adopted")
    await _converted(partitioned)
    assert await query(partitioned, ROWS) == rows


async def test_concurrent_runs(partitioned: str) -> None:
    """The second of two concurrent runs finds the work done."""
    rows = await query(partitioned, ROWS)
    results = await asyncio.gather(_converted(partitioned), _converted(partitioned), return_exceptions=True)
    assert any(isinstance(lines, list) and "is a hypertable now" in "".join(lines) for lines in results), results
    assert await _kind(partitioned) == "hypertable"
    assert await query(partitioned, ROWS) == rows


async def test_a_superuser_converts_for_the_owner(timescale: TestServer) -> None:
    """New objects belong to the owner of the ticks, who can continue."""
    name = timescale.new_name()
    await timescale.run(f"CREATE ROLE {name} LOGIN PASSWORD 'owner' CREATEROLE")
    url = await timescale.create(name)
    owner = with_parts(timescale.url, database=name, user=name, password="owner")
    try:
        await timescale.run(f"ALTER DATABASE {name} OWNER TO {name}")
        await execute_all(url, REFUSE)
        await migrate(owner, load_settings(), lambda _: None)
        with pytest.raises(StoreError, match="Let a superuser run CREATE EXTENSION timescaledb"):
            await _converted(owner)
        await execute_all(url, ALLOW)
        await insert(url, some_ticks(MARCH, 10, 50))
        await _converted(url)
        owners = "SELECT DISTINCT pg_get_userbyid(relowner)::text FROM pg_class "
        assert await query(owner, f"{owners} WHERE relnamespace = 'market'::regnamespace") == [(name,)]
        await migrate(owner, load_settings(), lambda _: None)
        await assert_bars(owner)
    finally:
        await timescale.drop(name)
        await timescale.run(f"DROP ROLE {name}")


async def test_a_server_without_the_extension(plain: TestServer) -> None:
    """A missing extension ends the command with one line, the remedy and exit status 69."""
    if await query(plain.url, "SELECT FROM pg_available_extensions WHERE name = 'timescaledb'"):
        pytest.skip("the named server has the extension")
    name = plain.new_name()
    url = await plain.create(name, plain.template)
    lines: list[str] = []
    await tell_of_adoption(url, lines.append)
    assert lines == []
    status, _, errors = await ingestor("migrate", "--convert-to-hypertable", DATABASE_URL=url)
    assert status == 69
    assert errors.count("\n") == 1
    assert "shared_preload_libraries" in errors
    await plain.drop(name)
