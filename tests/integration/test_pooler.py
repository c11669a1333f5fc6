"""All programs work through a connection pooler: PgBouncer, in each of its modes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ingestor.admin.maintenance import maintain
from ingestor.admin.migrate import migrate
from ingestor.admin.roles import grant_analyst
from ingestor.errors import PoolerError
from ingestor.settings import load_settings
from ingestor.simulator.server import TOKEN, Simulator
from ingestor.store.connect import connect, is_pooled
from ingestor.store.gaps import Bounds, GapStore
from ingestor.store.inspect import inspect
from ingestor.store.ticks import TickStore
from tests.commands import ingestor, ingestor_in_process
from tests.integration.test_coverage_cli import LISTED, TICK, UNTIL, ohlcv, with_a_gap
from tests.integration.test_store import batcher, filled, tick
from tests.pooler import Pooler
from tests.recording import COUNT, Market, running, settings, until
from tests.rest import Request, answer, scripted
from tests.servers import TestServer, query
from tests.sessions import at, execute

Started = Callable[[str, int], Pooler]
MODES = [("transaction", 1), ("transaction", 3), ("session", 3)]

SETTINGS = """
SELECT name, setting FROM pg_settings
WHERE name ~ '^tcp_|_timeout$' OR name IN ('synchronous_commit', 'default_transaction_isolation', 'jit') ORDER BY name
"""
LEFT = """
SELECT (SELECT count(*) FROM pg_prepared_statements WHERE from_sql OR name <> ''),
       (SELECT count(*) FROM pg_class WHERE relpersistence = 't'),
       (SELECT count(*) FROM pg_locks JOIN pg_database d ON d.oid = database
        WHERE locktype = 'advisory' AND datname = current_database())
"""
TICKS = "SELECT symbol, time, price, volume, occurrence FROM market.ticks ORDER BY 1, 2, 3, 4, 5"


@pytest.fixture
def started(server: TestServer) -> Iterator[Started]:
    """Start PgBouncer before the server."""
    poolers: list[Pooler] = []

    def start(mode: str, size: int) -> Pooler:
        poolers.append(Pooler(server.url, mode, size, {server.prefix: "writer"}))
        poolers[-1].start()
        return poolers[-1]

    yield start
    for pooler in poolers:
        pooler.close()


@pytest.mark.usefixtures("bundled_calendar")
@pytest.mark.parametrize(("mode", "size"), MODES)
async def test_every_command_works_through_a_pooler(
    started: Started, empty_database: str, server: TestServer, mode: str, size: int
) -> None:
    """Schema, daemon's writes, gap store and owner's commands work as on a direct connection."""
    pooler = started(mode, size)
    owner, writer = pooler.url(empty_database), pooler.url(server.writer_url(empty_database))
    configuration = load_settings(database_url=owner, retention="3650d")
    said: list[str] = []
    async with asyncio.timeout(60):
        for _ in range(2):  # the second run finds no lock of the first
            await migrate(owner, configuration, said.append)
        one, other = TickStore(writer, write_timeout=30), TickStore(writer, write_timeout=30)
        ticks = [tick(volume=volume) for volume in range(50)]
        again = batcher()
        first = await one.write([filled(batcher(), *ticks)])
        if mode == "session":
            await one.close()
        second = await other.write([filled(again, *ticks)])  # by COPY, then through the staging table
        third = await other.write([filled(again, *ticks), filled(batcher(), tick("B.NZ"))])  # the second way again
        assert [(each.ticks, each.duplicates) for each in (first, second, third)] == [(50, 0), (50, 50), (51, 0)]
        await one.close()
        await other.close()
        async with GapStore(writer) as gap_store:
            report = await gap_store.report(Bounds())
            assert report.timezone == configuration.exchange_timezone
            assert await gap_store.active_symbols(report.made_at) == []
        await maintain(configuration, said.append)
        facts = await inspect(writer)
        assert facts.schema is not None
        assert facts.schema == (await inspect(server.writer_url(empty_database))).schema
        name = server.new_name()
        await grant_analyst(owner, name, password="x" * 20, statement_timeout=5, report=said.append)
    assert len(await query(empty_database, TICKS)) == 101
    assert await query(owner, TICKS) == await query(empty_database, TICKS)
    await server.run(f"DROP OWNED BY {name}", empty_database.rpartition("/")[2].partition("?")[0])
    await server.run(f"DROP ROLE {name}")


async def test_no_session_state_is_left_behind(started: Started, database: str, server: TestServer) -> None:
    """Our writes leave no setting, lock, table or prepared statement in a session that others get."""
    pooler = started("transaction", 1)
    writer = pooler.url(server.writer_url(database))
    store = TickStore(writer, write_timeout=7)
    for _ in range(2):
        await store.write([filled(batcher(), tick())])
    async with GapStore(writer) as gap_store:
        await gap_store.report(Bounds())
    found = await query(writer, SETTINGS)
    assert found == await query(server.writer_url(database), SETTINGS)
    assert await query(writer, LEFT) == [(0, 0, 0)]
    await store.close()


async def test_a_pooler_is_known_by_its_process_id(started: Started, database: str, server: TestServer) -> None:
    """Behind a pooler no statement is prepared by name; without one, named statements stay in use."""
    pooler = started("transaction", 1)
    for url, expected in ((server.writer_url(database), False), (pooler.url(server.writer_url(database)), True)):
        connection = await connect(url, read_write=True)
        assert is_pooled(connection) == expected
        await connection.fetch(TICKS)
        found = await connection.fetchval("SELECT count(*) FROM pg_prepared_statements WHERE name <> ''")
        assert bool(found) != expected
        await connection.close()


async def test_two_writers_share_one_connection(started: Started, database: str, server: TestServer) -> None:
    """Two writers take turns with readers between them, and none waits indefinitely."""
    pooler = started("transaction", 1)
    writer = pooler.url(server.writer_url(database))
    stores = [TickStore(writer, write_timeout=30) for _ in range(2)]
    up, down = batcher(), batcher()

    async with asyncio.timeout(60), GapStore(writer) as gap_store:
        for number in range(5):
            ticks = [tick(volume=number * 100 + each) for each in range(50)]
            await asyncio.gather(
                stores[0].write([filled(up, *ticks)]),
                stores[1].write([filled(down, *ticks[::-1])]),
                gap_store.report(Bounds()),
                inspect(writer),
            )
    for store in stores:
        await store.close()
    assert await query(database, "SELECT count(*) FROM market.ticks") == [(250,)]


async def test_a_pooler_that_allows_no_transactions(started: Started, database: str, server: TestServer) -> None:
    """The error names the pooler and its remedy, and the command ends with 78."""
    url = started("statement", 1).url(server.writer_url(database))
    with pytest.raises(PoolerError, match=r"pool_mode is statement.*pool_mode=transaction"):
        await connect(url)
    status, _, errors = await asyncio.to_thread(ingestor_in_process, "gaps", INGESTOR_DATABASE_URL=url)
    assert (status, "pool_mode=transaction" in errors) == (78, True)


async def test_the_daemon_and_all_commands_in_transaction_mode(
    started: Started, database: str, server: TestServer, tmp_path: Path
) -> None:
    """Daemon with rollup, backfill, reconciliation, chart and replay work, and leave nothing in the shared sessions."""
    url = started("transaction", 3).url(server.writer_url(database))
    await with_a_gap(database)
    prices = {minute: 1.5 + minute for minute in (*range(40, 52), 100, 101)}
    for minute in range(40, 52):
        await execute(database, TICK, at(minute), prices[minute], 100, "A.NZ")
    bars = [ohlcv(price, 100, minute) for minute, price in prices.items()]
    recorded = tmp_path / "recorded.jsonl"
    data = {"date": "2026-11-20T12:00:00+13:00", "price": 2.5, "volume": 7, "symbol": "R.NZ"}
    recorded.write_text(json.dumps({"type": "price", "data": data}) + "\n", encoding="utf-8")

    async with Simulator(port=0, rate=0) as simulator, running(settings(simulator, url)) as daemon:
        await simulator.wait_connected()
        market = Market(simulator)
        market.trade()
        await until(database, f"{COUNT} WHERE symbol = 'AIR.NZ'", market.sent)
        if not server.is_community:
            await until(database, "SELECT count(*) FROM ingest.rollup_1m WHERE symbol = 'A.NZ'", 12)
        assert (daemon.telemetry.counts.write_failures, daemon.telemetry.counts.rollup_failures) == (0, 0)

    def script(asked: Request) -> bytes:
        return LISTED if asked.path == "/info/ticker" else answer({"data": bars})

    async with scripted(script) as rest:
        environment = {"DATABASE_URL": url, "REST_URL": rest.url, "TOKEN": TOKEN}
        for command, words in (
            (("backfill", *UNTIL), "Symbols of gaps: 3 filled"),
            (("reconcile", "--date=2026-11-20", "--symbol=A.NZ"), "Bars compared: 12, the same: 12, different: 0."),
            (("chart", "A.NZ", "--since=2026-11-20", *UNTIL), "with backfilled minutes"),
            (("replay", str(recorded)), "1 messages: 1 ticks new"),
        ):
            status, output, errors = await ingestor(*command, **environment)
            assert status == 0, output + errors
            assert words in " ".join(output.split()), output
    assert await query(database, "SELECT status FROM market.gaps WHERE trading_day = '2026-11-20'") == [("backfilled",)]
    assert await query(url, LEFT) == [(0, 0, 0)]


@pytest.mark.parametrize("command", [("gaps",), ("check",), ("migrate",)])
async def test_commands_behave_the_same(
    started: Started, database: str, server: TestServer, command: tuple[str, ...]
) -> None:
    """A command's output and status are those of a direct connection."""
    pooler = started("transaction", 1)
    urls = [database, pooler.url(database)]
    found = [await asyncio.to_thread(ingestor_in_process, *command, INGESTOR_DATABASE_URL=url) for url in urls]
    assert found[0][0] == found[1][0]
    assert len(found[0][1].splitlines()) == len(found[1][1].splitlines())
