"""The database restarts, hangs, fills up, refuses and loses commits; its wire is cut: real servers, real signals."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import structlog

from ingestor.errors import StoreError
from ingestor.service.daemon import Daemon
from ingestor.service.process import StopRequest
from ingestor.simulator.server import Simulator
from ingestor.store.connect import connect
from ingestor.store.inspect import inspect
from ingestor.store.version import SCHEMA_REVISION
from tests.clocks import HANG_SECONDS
from tests.disks import fill, small_disk
from tests.processes import ServerProcess
from tests.proxy import Proxy
from tests.recording import COUNT, ENDS, TOTALS, Market, received, recording, running, settings, stored, until
from tests.servers import TestServer, query


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_a_server_restart(writer_url: str, database: str, process: ServerProcess, how: str) -> None:
    """A restart or a crash of the server loses nothing and does not affect the stream."""
    async with recording(writer_url) as (market, daemon):
        market.trade()
        await until(database, COUNT, market.sent)
        market.trade()
        await asyncio.to_thread(getattr(process, how))
        market.trade()
        await received(daemon, market.sent)
        await asyncio.sleep(0.3)
        assert daemon.buffer.spooled_batches > 0
        await process.start()
        await stored(database, market)
        market.trade()
        await stored(database, market)
    assert await query(database, ENDS) == [("stopped",)]


async def test_a_server_that_hangs(writer_url: str, database: str, process: ServerProcess) -> None:
    """A hanging write is aborted and retried; within a second or so everything is on disk."""
    async with recording(writer_url, write_timeout="500ms", spool_after="200ms") as (market, daemon):
        market.trade()
        await until(database, COUNT, market.sent)
        process.pause()
        market.trade()
        await received(daemon, market.sent)
        async with asyncio.timeout(HANG_SECONDS):
            while daemon.buffer.in_memory or not daemon.telemetry.counts.write_failures:
                await asyncio.sleep(0.01)
        market.trade()
        process.resume()
        await stored(database, market)
    assert await query(database, ENDS) == [("stopped",)]


async def test_a_second_signal_does_not_wait_for_a_server_that_hangs(
    writer_url: str, database: str, process: ServerProcess
) -> None:
    """A second signal does not wait for the write's timeout; unwritten batches are on disk."""
    request = StopRequest()
    async with Simulator(port=0, rate=0) as simulator:
        daemon = Daemon(settings(simulator, writer_url, write_timeout="60s", stop_timeout="60s"))
        task = asyncio.create_task(daemon.run(request))
        await simulator.wait_connected()
        market = Market(simulator)
        market.trade()
        await until(database, COUNT, market.sent)
        process.pause()
        market.trade()
        await received(daemon, market.sent)
        request()
        request()
        await asyncio.wait_for(task, HANG_SECONDS)
        assert daemon.buffer.in_memory == ()
        process.resume()
        async with running(settings(simulator, writer_url)):
            await stored(database, market)


RESTORE = """
WITH gone AS (DELETE FROM market.ticks WHERE volume >= 100 RETURNING 1)
UPDATE ingest.stream_sessions SET (ticks, last_batch, covered_until) = (ticks - (SELECT count(*) FROM gone), 2, $1)
RETURNING covered_until
"""


async def test_a_database_that_lost_acknowledged_commits(writer_url: str, database: str) -> None:
    """After a restore the session covers nothing and ends; a new one continues, and later ticks are stored."""
    async with recording(writer_url) as (market, daemon):
        market.trade()
        await until(database, COUNT, market.sent)
        connection = await connect(database)
        proved = await connection.fetchval("SELECT covered_until FROM ingest.stream_sessions")
        market.trade()
        await until(database, COUNT, market.sent)
        await connection.fetchval(RESTORE, proved)
        market.trade()
        await until(database, ENDS, "commits_lost")
        async with asyncio.timeout(HANG_SECONDS):
            while daemon.telemetry.stream.state != "streaming" or daemon.telemetry.counts.sessions < 2:
                await asyncio.sleep(0.01)
        market.trade()
        await until(database, COUNT, market.sent - 100)
        rows = await connection.fetch("SELECT covered_until FROM ingest.stream_sessions ORDER BY connected_at")
        assert [row["covered_until"] == proved for row in rows] == [True, False]
        await connection.close()


@contextlib.asynccontextmanager
async def locked(url: str, table: str) -> AsyncIterator[None]:
    """Lock a table against all readers."""
    connection = await connect(url)
    async with connection.transaction():
        await connection.execute(f"LOCK TABLE {table}")
        yield
    await connection.close()


async def test_check_of_a_server_that_hangs(writer_url: str, database: str) -> None:
    """`check` gives up on a server that hangs."""
    async with locked(database, "ingest.trading_sessions"):
        with pytest.raises(StoreError):
            await asyncio.wait_for(inspect(writer_url, timeout=0.2), HANG_SECONDS)


async def test_a_stop_during_the_coverage_query(writer_url: str, database: str, process: ServerProcess) -> None:
    """A stop cancels the coverage query and the calendar query of a server that hangs."""
    request = StopRequest()
    looking = (
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database() "
        "AND application_name IN ('ingestor check', 'ingestor gaps')"
    )
    async with locked(database, "ingest.trading_sessions"), Simulator(port=0, rate=0) as simulator:
        daemon = Daemon(settings(simulator, writer_url, write_timeout="60s", stop_timeout="60s"))
        task = asyncio.create_task(daemon.run(request))
        await until(database, looking, 1)
        process.pause()
        request()
        request()
        await asyncio.wait_for(task, HANG_SECONDS)
        process.resume()


async def test_terminated_connections(writer_url: str, database: str) -> None:
    """Connections that an administrator terminates, repeatedly, lose nothing."""
    async with recording(writer_url) as (market, _):
        admin = await connect(database)
        for _ in range(10):
            market.trade()
            await admin.fetch(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = 'ingestor' AND datname = current_database() "
                "AND pid <> pg_backend_pid()"
            )
            await asyncio.sleep(0.05)
        await admin.close()
        await stored(database, market)
    assert await query(database, ENDS) == [("stopped",)]


@pytest.fixture
def tablespace(process: ServerProcess) -> Iterator[Path]:
    """Put a tablespace on a disk of 48 MiB."""
    name = f"/tmp/ingestor-tablespace-{process.pid}"
    with contextlib.ExitStack() as stack:
        try:
            disk = stack.enter_context(small_disk(process.host_path(name), 48 * 2**20))
        except PermissionError as error:
            pytest.skip(str(error))
        process.chown(disk)
        yield disk


async def test_a_full_disk_of_the_server(
    writer_url: str, database: str, server: TestServer, process: ServerProcess, tablespace: Path
) -> None:
    """Batches wait on this machine while the server's disk is full, and are stored when it has space."""
    name = server.new_name()
    inside = "/" + str(tablespace.relative_to(process.root))
    await server.run(f"CREATE TABLESPACE {name} LOCATION '{inside}'")
    short = database.rpartition("/")[2]
    await server.move(short, name)
    try:
        async with recording(writer_url) as (market, daemon):
            market.trade()
            await until(database, COUNT, market.sent)
            filler = fill(tablespace)
            while not daemon.telemetry.counts.write_failures:
                market.trade(2000)
                await asyncio.sleep(0.02)
            await received(daemon, market.sent)
            filler.unlink()
            await stored(database, market)
        assert await query(database, ENDS) == [("stopped",)]
    finally:
        await server.drop(short)
        await server.run(f"DROP TABLESPACE {name}")


async def test_a_lost_answer_to_a_commit(writer_url: str, database: str) -> None:
    """A commit with an unknown outcome is repeated and counted once, for ticks and rejections."""
    async with Proxy(writer_url) as proxy:
        async with Simulator(port=0, rate=0) as simulator:
            async with running(settings(simulator, proxy.url, write_timeout="1s")) as daemon:
                await simulator.wait_connected()
                market = Market(simulator)
                for _ in range(3):
                    market.trade()
                    await until(database, COUNT, market.sent)
                    proxy.mutes_server = True  # the answer to any later commit is lost
                    simulator.send_raw("nonsense")
                    market.trade()
                    await asyncio.sleep(0.2)
                    proxy.cut()
                    proxy.mutes_server = False
                await stored(database, market)
                assert daemon.telemetry.counts.write_failures >= 3
    assert await query(database, TOTALS) == [(market.sent, 0, 3)]
    assert await query(database, "SELECT count(*) FROM ingest.rejected_messages") == [(3,)]


async def test_cuts_of_the_database_wire(writer_url: str, database: str) -> None:
    """Resets at any moment, also within a message, and late answers lose nothing."""
    async with Proxy(writer_url, seed=1) as proxy, recording(proxy.url, write_timeout="1s") as (market, _):
        for turn in range(20):
            market.trade(50)
            await asyncio.sleep(0.03)
            proxy.delay = 0.02 if turn % 3 == 0 else 0.0
            (proxy.cut if turn % 2 else proxy.cut_in_the_middle)()
        proxy.delay = 0.0
        await stored(database, market)
    assert await query(database, ENDS) == [("stopped",)]


async def test_the_daemon_moves_from_a_standby_to_the_primary(
    writer_url: str, database: str, server: TestServer, process: ServerProcess
) -> None:
    """A server in recovery is retried until it is promoted, and nothing is lost."""
    async with recording(writer_url) as (market, daemon):
        market.trade()
        await until(database, COUNT, market.sent)
        await asyncio.to_thread(process.stop)
        standby = process.data / "standby.signal"
        standby.touch()
        process.chown(standby)
        await process.start()
        market.trade()
        await received(daemon, market.sent)
        failures = daemon.telemetry.counts.write_failures
        async with asyncio.timeout(HANG_SECONDS):
            while daemon.telemetry.counts.write_failures < failures + 2:
                await asyncio.sleep(0.01)
        assert await query(database, COUNT) == [(100,)]
        await server.run("SELECT pg_promote()")
        await stored(database, market)


async def test_a_server_that_becomes_read_only(writer_url: str, database: str, server: TestServer) -> None:
    """After error 25006 the daemon leaves the connection and finds a server that accepts writes."""
    name = database.rpartition("/")[2]
    async with recording(writer_url) as (market, daemon):
        market.trade()
        await until(database, COUNT, market.sent)
        await server.run(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        await server.run(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'ingestor' "
            f"AND datname = '{name}'"
        )
        market.trade()
        async with asyncio.timeout(HANG_SECONDS):
            while daemon.telemetry.counts.write_failures < 2:
                await asyncio.sleep(0.01)
        await server.run(f"ALTER DATABASE {name} SET default_transaction_read_only = off")
        await stored(database, market)


@pytest.mark.parametrize(
    ("breaks", "repairs", "remedy"),
    [
        ("REVOKE market_write FROM {role}", "GRANT market_write TO {role}", "GRANT market_write TO it"),
        ("ALTER ROLE {role} NOLOGIN", "ALTER ROLE {role} LOGIN", "check the user, the password"),
        ("ALTER TABLE market.ticks RENAME TO gone", "ALTER TABLE market.gone RENAME TO ticks", "ingestor migrate"),
        (
            "UPDATE ingest.alembic_version SET version_num = '0000'",
            f"UPDATE ingest.alembic_version SET version_num = '{SCHEMA_REVISION}'",
            "ingestor migrate",
        ),
    ],
    ids=["privilege", "login", "table", "older schema"],
)
async def test_errors_that_require_operator_action(
    writer_url: str, database: str, server: TestServer, quick: None, breaks: str, repairs: str, remedy: str
) -> None:
    """The error is retried every few seconds with its remedy in one line; meanwhile everything is on disk."""
    with structlog.testing.capture_logs() as lines:
        async with recording(writer_url) as (market, daemon):
            market.trade()
            await until(database, COUNT, market.sent)
            admin = await connect(database)
            await admin.execute(breaks.format(role=server.prefix))
            await admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'ingestor' "
                "AND datname = current_database() AND pid <> pg_backend_pid()"
            )
            market.trade()
            async with asyncio.timeout(HANG_SECONDS):
                while not any(remedy in line.get("detail", "") for line in lines) or daemon.buffer.in_memory:
                    await asyncio.sleep(0.01)
            await admin.execute(repairs.format(role=server.prefix))
            await admin.close()
            await stored(database, market)
    assert await query(database, ENDS) == [("stopped",)]


async def test_a_refused_tick(writer_url: str, database: str) -> None:
    """A refused row in the middle of the stream is kept as a rejection and counted; all others are stored."""
    admin = await connect(database)
    await admin.execute("ALTER TABLE market.ticks ADD CONSTRAINT local_rule CHECK (price > 0)")
    await admin.close()
    async with recording(writer_url) as (market, daemon):
        market.trade()
        market.refused()
        market.trade()
        await until(database, COUNT, market.sent)
    assert daemon.telemetry.counts.rejected == {"database:23514": 1}  # stopped: the counts follow the commit
    assert await query(database, TOTALS) == [(market.sent, 0, 1)]
    assert await query(database, "SELECT reason FROM ingest.rejected_messages") == [("database:23514",)]


async def test_a_slow_database_never_breaks_the_stream(writer_url: str, database: str) -> None:
    """While a write is held back for many keepalives, pings are answered and the session continues."""
    blocker = await connect(database)
    changes = {"ping_interval": "50ms", "ping_timeout": "500ms", "write_timeout": "10m", "spool_after": "100ms"}
    async with recording(writer_url, **changes) as (market, daemon):
        async with blocker.transaction():
            await blocker.execute("LOCK TABLE ingest.stream_sessions IN ACCESS EXCLUSIVE MODE")
            with contextlib.suppress(TimeoutError):
                await market.trade_for(3)
            await received(daemon, market.sent)
            assert daemon.buffer.spooled_batches > 0
        await blocker.close()
        await stored(database, market)
    assert await query(database, ENDS) == [("stopped",)]


async def test_batches_spooled_during_slow_writes_are_written_once(writer_url: str, database: str) -> None:
    """A batch that was spooled during its commit is removed from the disk after the commit."""
    blocker = await connect(database)
    async with recording(writer_url, spool_after="50ms") as (market, daemon):
        for _ in range(3):
            async with blocker.transaction():
                await blocker.execute("LOCK TABLE ingest.stream_sessions IN ACCESS EXCLUSIVE MODE")
                market.trade()
                async with asyncio.timeout(HANG_SECONDS):
                    while not daemon.buffer.spooled_batches:
                        await asyncio.sleep(0.01)
            await stored(database, market)
        await blocker.close()
    assert daemon.telemetry.counts.ticks_written == market.sent
