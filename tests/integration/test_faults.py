"""Each row of the promise, broken on purpose: real servers, real processes, real signals, a real wire."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from ingestor.model import Tick
from ingestor.simulator.server import TOKEN, Simulator
from ingestor.store.connect import connect
from tests.disks import fill, small_disk
from tests.integration.test_daemon import NOW, heard, running, settings, until
from tests.processes import DaemonProcess, ServerProcess
from tests.proxy import Proxy
from tests.servers import TestServer, query

COUNT = "SELECT count(*) FROM market.ticks"
ENDS = "SELECT end_reason FROM ingest.stream_sessions ORDER BY connected_at"
TOTALS = "SELECT sum(ticks)::int, sum(duplicates)::int, sum(rejected)::int FROM ingest.stream_sessions"


class Market:
    """Sends ticks that differ from each other, so that each has a row of its own."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self.sent = 0

    def trade(self, count: int = 100) -> None:
        self._simulator.send([Tick("AIR.NZ", NOW, 0.5, self.sent + number) for number in range(count)])
        self.sent += count

    def refused(self) -> None:
        """Trade at a price that a careful administrator would not allow."""
        self._simulator.send([Tick("AIR.NZ", NOW, -0.5, 1)])

    async def trade_for(self, seconds: float) -> None:
        """Trade a little every few milliseconds."""
        async with asyncio.timeout(seconds):
            while True:
                self.trade(5)
                await asyncio.sleep(0.01)


@pytest.fixture
async def process(server: TestServer) -> AsyncIterator[ServerProcess]:
    """The server's process; at the end of the test it runs, whatever was done to it."""
    process = await ServerProcess.of(server.url)
    yield process
    await process.revive()


@contextlib.asynccontextmanager
async def recording(url: str, **changes: Any) -> AsyncIterator[tuple[Market, Any]]:
    """A market and a daemon that hears it."""
    async with Simulator(port=0, rate=0) as simulator, running(settings(simulator, url, **changes)) as daemon:
        await simulator.wait_connected()
        yield Market(simulator), daemon


async def stored(url: str, market: Market) -> None:
    """Wait until each tick has its row, and see that none was counted twice."""
    await until(url, COUNT, market.sent)
    assert (await query(url, TOTALS))[0][:2] == (market.sent, 0)


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_a_server_that_goes_and_comes(writer_url: str, database: str, process: ServerProcess, how: str) -> None:
    """A server that is restarted, or dies without a word, costs nothing; the stream is not touched."""
    async with recording(writer_url) as (market, daemon):
        market.trade()
        await until(database, COUNT, market.sent)
        market.trade()
        await asyncio.to_thread(getattr(process, how))
        market.trade()
        await heard(daemon, market.sent)
        await asyncio.sleep(0.3)
        assert daemon.buffer.spooled_batches > 0
        await process.start()
        await stored(database, market)
        market.trade()
        await stored(database, market)
    assert await query(database, ENDS) == [("stopped",)]


async def test_a_server_that_hangs(writer_url: str, database: str, process: ServerProcess) -> None:
    """A write that hangs is given up and done again; meanwhile everything is on disk within a second or so."""
    async with recording(writer_url, write_timeout="500ms", spool_after="200ms") as (market, daemon):
        market.trade()
        await until(database, COUNT, market.sent)
        process.pause()
        market.trade()
        await heard(daemon, market.sent)
        async with asyncio.timeout(10):
            while daemon.buffer.in_memory or not daemon.telemetry.counts.write_failures:
                await asyncio.sleep(0.01)
        market.trade()
        process.resume()
        await stored(database, market)
    assert await query(database, ENDS) == [("stopped",)]


async def test_connections_that_are_terminated(writer_url: str, database: str) -> None:
    """An administrator who ends our connections, over and over, costs nothing."""
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
    """A disk of 48 MiB in the server's world."""
    name = f"/tmp/ingestor-tablespace-{process.pid}"
    with contextlib.ExitStack() as stack:
        try:
            disk = stack.enter_context(small_disk(process.outside(name), 48 * 2**20))
        except PermissionError as error:
            pytest.skip(str(error))
        process.give(disk)
        yield disk


async def test_a_server_whose_disk_is_full(
    writer_url: str, database: str, server: TestServer, process: ServerProcess, tablespace: Path
) -> None:
    """What the server has no room for waits here, and is written when there is room."""
    name = server.new_name()
    inside = "/" + str(tablespace.relative_to(process.root))
    await server.run(f"CREATE TABLESPACE {name} LOCATION '{inside}'")
    short = database.rpartition("/")[2]
    await server.run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{short}'")
    await server.run(f"ALTER DATABASE {short} SET TABLESPACE {name}")
    try:
        async with recording(writer_url) as (market, daemon):
            market.trade()
            await until(database, COUNT, market.sent)
            filler = fill(tablespace)
            while not daemon.telemetry.counts.write_failures:
                market.trade(2000)
                await asyncio.sleep(0.02)
            await heard(daemon, market.sent)
            filler.unlink()
            await stored(database, market)
        assert await query(database, ENDS) == [("stopped",)]
    finally:
        await server.drop(short)
        await server.run(f"DROP TABLESPACE {name}")


async def test_an_answer_to_a_commit_that_is_lost(writer_url: str, database: str) -> None:
    """Whether the commit was done nobody knows, so it is done again, and counts once: ticks and rejections."""
    async with Proxy(writer_url) as proxy:
        async with Simulator(port=0, rate=0) as simulator:
            async with running(settings(simulator, proxy.url, write_timeout="1s")) as daemon:
                await simulator.wait_connected()
                market = Market(simulator)
                for _ in range(3):
                    market.trade()
                    await until(database, COUNT, market.sent)
                    proxy.mutes_server = True  # whatever is committed now, we do not hear of it
                    simulator.send_raw("nonsense")
                    market.trade()
                    await asyncio.sleep(0.2)
                    proxy.cut()
                    proxy.mutes_server = False
                await stored(database, market)
                assert daemon.telemetry.counts.write_failures >= 3
    assert await query(database, TOTALS) == [(market.sent, 0, 3)]
    assert await query(database, "SELECT count(*) FROM ingest.rejected_messages") == [(3,)]


async def test_a_wire_to_the_database_that_is_cut(writer_url: str, database: str) -> None:
    """Resets at any moment, in the middle of a message too, and an answer that is late, cost nothing."""
    async with Proxy(writer_url, seed=1) as proxy, recording(proxy.url, write_timeout="1s") as (market, _):
        for turn in range(20):
            market.trade(50)
            await asyncio.sleep(0.03)
            proxy.delay = 0.02 if turn % 3 == 0 else 0.0
            (proxy.cut if turn % 2 else proxy.cut_in_the_middle)()
        proxy.delay = 0.0
        await stored(database, market)
    assert await query(database, ENDS) == [("stopped",)]


async def test_a_standby_is_left_for_the_primary(
    writer_url: str, database: str, server: TestServer, process: ServerProcess
) -> None:
    """A server in recovery takes nothing: it is tried until it is promoted, and nothing is lost."""
    async with recording(writer_url) as (market, daemon):
        market.trade()
        await until(database, COUNT, market.sent)
        await asyncio.to_thread(process.stop)
        standby = process.data / "standby.signal"
        standby.touch()
        process.give(standby)
        await process.start()
        market.trade()
        await heard(daemon, market.sent)
        failures = daemon.telemetry.counts.write_failures
        async with asyncio.timeout(15):
            while daemon.telemetry.counts.write_failures < failures + 2:
                await asyncio.sleep(0.01)
        assert await query(database, COUNT) == [(100,)]
        await server.run("SELECT pg_promote()")
        await stored(database, market)


async def test_a_server_that_becomes_read_only(writer_url: str, database: str, server: TestServer) -> None:
    """25006 in the middle of everything: the connection is left, and another one that takes writes is found."""
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
        async with asyncio.timeout(15):
            while daemon.telemetry.counts.write_failures < 2:
                await asyncio.sleep(0.01)
        await server.run(f"ALTER DATABASE {name} SET default_transaction_read_only = off")
        await stored(database, market)


@pytest.mark.parametrize(
    ("breaks", "mends", "remedy"),
    [
        ("REVOKE market_write FROM {role}", "GRANT market_write TO {role}", "GRANT market_write TO it"),
        ("ALTER ROLE {role} NOLOGIN", "ALTER ROLE {role} LOGIN", "check the user, the password"),
        ("ALTER TABLE market.ticks RENAME TO gone", "ALTER TABLE market.gone RENAME TO ticks", "ingestor migrate"),
        (
            "UPDATE ingest.alembic_version SET version_num = '0000'",
            "UPDATE ingest.alembic_version SET version_num = '0001'",
            "ingestor migrate",
        ),
    ],
    ids=["privilege", "login", "table", "older schema"],
)
async def test_what_a_person_must_mend(
    writer_url: str, database: str, server: TestServer, breaks: str, mends: str, remedy: str
) -> None:
    """It is tried again every few seconds, with the remedy in one line; meanwhile everything is on disk."""
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
            async with asyncio.timeout(10):
                while not any(remedy in line.get("detail", "") for line in lines) or daemon.buffer.in_memory:
                    await asyncio.sleep(0.01)
            await admin.execute(mends.format(role=server.prefix))
            await admin.close()
            await stored(database, market)
    assert await query(database, ENDS) == [("stopped",)]


async def test_a_tick_that_the_database_refuses(writer_url: str, database: str) -> None:
    """One bad row in the middle of the stream costs nobody anything: it is kept beside the others, and counted."""
    admin = await connect(database)
    await admin.execute("ALTER TABLE market.ticks ADD CONSTRAINT local_rule CHECK (price > 0)")
    await admin.close()
    async with recording(writer_url) as (market, daemon):
        market.trade()
        market.refused()
        market.trade()
        await until(database, COUNT, market.sent)
        assert daemon.telemetry.counts.rejected == {"database:23514": 1}
    assert await query(database, TOTALS) == [(market.sent, 0, 1)]
    assert await query(database, "SELECT reason FROM ingest.rejected_messages") == [("database:23514",)]


async def test_a_slow_database_never_breaks_the_stream(writer_url: str, database: str) -> None:
    """While a write is held back for many keepalives, pings are answered and the session goes on."""
    blocker = await connect(database)
    changes = {"ping_interval": "50ms", "ping_timeout": "500ms", "write_timeout": "10m", "spool_after": "100ms"}
    async with recording(writer_url, **changes) as (market, daemon):
        async with blocker.transaction():
            await blocker.execute("LOCK TABLE ingest.stream_sessions IN ACCESS EXCLUSIVE MODE")
            with contextlib.suppress(TimeoutError):
                await market.trade_for(3)
            await heard(daemon, market.sent)
            assert daemon.buffer.spooled_batches > 0
        await blocker.close()
        await stored(database, market)
    assert await query(database, ENDS) == [("stopped",)]


async def test_what_was_spooled_while_writes_were_slow_is_not_written_twice(writer_url: str, database: str) -> None:
    """A batch that went to disk while its commit was on the way leaves it with the commit."""
    blocker = await connect(database)
    async with recording(writer_url, spool_after="50ms") as (market, daemon):
        for _ in range(3):
            async with blocker.transaction():
                await blocker.execute("LOCK TABLE ingest.stream_sessions IN ACCESS EXCLUSIVE MODE")
                market.trade()
                async with asyncio.timeout(5):
                    while not daemon.buffer.spooled_batches:
                        await asyncio.sleep(0.01)
            await stored(database, market)
        await blocker.close()
        assert daemon.telemetry.counts.ticks_written == market.sent


def process_of(
    simulator_url: str, database: str, directory: Path, name: str = "daemon", **changes: Any
) -> DaemonProcess:
    """A daemon's process with its own spool."""
    defaults = {
        "stream_url": simulator_url,
        "token": TOKEN,
        "database_url": database,
        "exchange_calendar": "always",
        "spool_dir": directory / name,
        "instance": name,
        "reconnect_max_delay": "100ms",
        "heartbeat": "100ms",
        "ping_interval": "100ms",
        "ping_timeout": "2s",
        "log_format": "json",
    }
    return DaemonProcess(directory / f"{name}.log", **{**defaults, **changes})


@pytest.fixture
def ended() -> Iterator[list[DaemonProcess]]:
    """Processes that end with the test."""
    processes: list[DaemonProcess] = []
    yield processes
    for each in processes:
        each.end()


async def test_killed_while_the_database_is_away(
    writer_url: str, database: str, server: TestServer, tmp_path: Path, ended: list[DaemonProcess]
) -> None:
    """What reached the spool is written by the next process; from there to the next session is no coverage."""
    name = database.rpartition("/")[2]
    await server.run(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    async with Simulator(port=0, rate=0, record=True) as simulator:
        daemon = process_of(simulator.stream_url, writer_url, tmp_path)
        ended.append(daemon)
        daemon.start()
        await simulator.wait_connected()
        market = Market(simulator)
        for _ in range(10):
            market.trade()
            await asyncio.sleep(0.05)
        spooled = market.sent
        await asyncio.sleep(1.0)
        market.trade()  # of these nobody knows
        daemon.kill()
        await simulator.wait_connected(0)
        await server.run(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        daemon.start()
        await simulator.wait_connected()
        await until(database, "SELECT count(*) FROM ingest.stream_sessions WHERE end_reason = 'crashed'", 1)
        rows = (await query(database, COUNT))[0][0]
        assert spooled <= rows <= market.sent
        market.trade()
        await until(database, COUNT, rows + 100)
        daemon.signal(signal.SIGTERM)
        assert await asyncio.to_thread(daemon.wait) == 0
    (crashed, next_one) = await query(
        database,
        "SELECT ticks, covered_until, authenticated_at, end_reason FROM ingest.stream_sessions ORDER BY connected_at",
    )
    ((last_row,),) = await query(
        database, f"SELECT max(received_at) FROM market.ticks WHERE received_at < '{next_one[2]}'"
    )
    assert crashed[0] == rows
    assert crashed[1] >= last_row
    assert crashed[1] < next_one[2]
    assert (crashed[3], next_one[3]) == ("crashed", "stopped")


async def test_killed_at_any_moment(writer_url: str, database: str, tmp_path: Path, ended: list[DaemonProcess]) -> None:
    """SIGKILL in the middle of a busy market: what is covered is there, and nothing is there twice."""
    chance = random.Random(7)
    async with Simulator(port=0, rate=0, record=True) as simulator:
        daemon = process_of(simulator.stream_url, writer_url, tmp_path)
        ended.append(daemon)
        market = Market(simulator)
        for _ in range(4):
            daemon.start()
            await simulator.wait_connected()
            with contextlib.suppress(TimeoutError):
                await market.trade_for(0.7 + chance.random() * 0.5)
            daemon.kill()
            await simulator.wait_connected(0)
        daemon.start()
        await simulator.wait_connected()
        await until(database, "SELECT count(*) FROM ingest.stream_sessions WHERE end_reason IS NOT NULL", 4)
        daemon.signal(signal.SIGTERM)
        assert await asyncio.to_thread(daemon.wait) == 0
        accounts = simulator.accounts
    sessions = await query(
        database,
        "SELECT (extract(epoch FROM covered_until) * 1000000)::bigint, ticks FROM ingest.stream_sessions "
        "ORDER BY connected_at",
    )
    assert len(sessions) == len(accounts) == 5
    stored_volumes = {row[0] for row in await query(database, "SELECT volume FROM market.ticks")}
    for account, (covered_until, ticks) in zip(accounts, sessions, strict=True):
        volumes = [tick.volume for tick in account.ticks]
        kept = [volume for volume in volumes if volume in stored_volumes]
        assert kept == volumes[: len(kept)]  # without a hole
        assert ticks == len(kept)
        latency = 400_000  # of a busy machine
        assert sum(at < covered_until - latency for at in account.sent_at) <= len(kept)
    assert (await query(database, TOTALS))[0][1] == 0


async def test_stopped_while_the_database_is_away(
    writer_url: str, database: str, server: TestServer, tmp_path: Path, ended: list[DaemonProcess]
) -> None:
    """SIGTERM without a database: exit 0 soon, all on disk; the next start writes it and the session's end."""
    name = database.rpartition("/")[2]
    await server.run(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    async with Simulator(port=0, rate=0) as simulator:
        daemon = process_of(simulator.stream_url, writer_url, tmp_path)
        ended.append(daemon)
        daemon.start()
        await simulator.wait_connected()
        market = Market(simulator)
        market.trade()
        await asyncio.sleep(0.3)
        daemon.signal(signal.SIGTERM)
        assert await asyncio.to_thread(daemon.wait, 10) == 0
        await server.run(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        daemon.start()
        await stored(database, market)
        await until(database, "SELECT count(*) FROM ingest.stream_sessions WHERE end_reason = 'stopped'", 1)
    assert "left_in_spool" in daemon.log.read_text()


async def test_two_processes_and_one_spool(writer_url: str, tmp_path: Path, ended: list[DaemonProcess]) -> None:
    """The second one ends with 78 and says what to do; the first one goes on."""
    async with Simulator(port=0, rate=0) as simulator:
        first = process_of(simulator.stream_url, writer_url, tmp_path, "first")
        second = process_of(simulator.stream_url, writer_url, tmp_path, "second", spool_dir=tmp_path / "first")
        ended += [first, second]
        first.start()
        await simulator.wait_connected()
        second.start()
        assert await asyncio.to_thread(second.wait, 20) == 78
        assert f"in use by another ingestor (process {first.pid})" in second.log.read_text()
        assert first.is_running


async def test_two_instances(writer_url: str, database: str, tmp_path: Path, ended: list[DaemonProcess]) -> None:
    """Two of them on one feed, each killed in its turn: the union of what they heard, nothing twice."""
    async with Simulator(port=0, rate=0, max_streams=4) as simulator:
        pair = [process_of(simulator.stream_url, writer_url, tmp_path, name) for name in ("one", "two")]
        ended += pair
        for each in pair:
            each.start()
        await simulator.wait_connected(2)
        market = Market(simulator)
        for turn in range(4):
            with contextlib.suppress(TimeoutError):
                await market.trade_for(0.4)
            pair[turn % 2].kill()
            with contextlib.suppress(TimeoutError):
                await market.trade_for(0.4)
            pair[turn % 2].start()
            await simulator.wait_connected(2)
        market.trade()
        await until(database, COUNT, market.sent)
        for each in pair:
            each.signal(signal.SIGTERM)
            assert await asyncio.to_thread(each.wait) == 0
    assert await query(database, "SELECT count(*), max(occurrence) FROM market.ticks") == [(market.sent, 1)]


async def test_a_process_that_is_stopped_and_continued(
    writer_url: str, database: str, tmp_path: Path, ended: list[DaemonProcess]
) -> None:
    """Frozen for longer than the keepalive: what waited in its socket is kept, the time is not covered."""
    async with Simulator(port=0, rate=0) as simulator:
        daemon = process_of(simulator.stream_url, writer_url, tmp_path, ping_interval="100ms", ping_timeout="900ms")
        ended.append(daemon)
        daemon.start()
        await simulator.wait_connected()
        market = Market(simulator)
        market.trade()
        await until(database, COUNT, market.sent)
        daemon.signal(signal.SIGSTOP)
        await asyncio.sleep(0.3)
        ((frozen_at,),) = await query(database, "SELECT now()")
        market.trade()
        await asyncio.sleep(1.5)
        daemon.signal(signal.SIGCONT)
        await until(database, "SELECT end_reason FROM ingest.stream_sessions ORDER BY connected_at LIMIT 1", "frozen")
        await until(database, COUNT, market.sent)
        await until(database, "SELECT count(*) FROM ingest.stream_sessions WHERE authenticated_at IS NOT NULL", 2)
    ((covered_until,),) = await query(
        database, "SELECT covered_until FROM ingest.stream_sessions ORDER BY connected_at LIMIT 1"
    )
    assert covered_until < frozen_at


async def test_a_damaged_spool(writer_url: str, database: str, tmp_path: Path) -> None:
    """The daemon starts, says where it put the file, and records."""
    spool = tmp_path / "state"
    spool.mkdir()
    (spool / "spool.db").write_bytes(b"this is no database" * 1000)
    async with recording(writer_url) as (market, daemon):
        market.trade()
        await stored(database, market)
        assert daemon.telemetry.counts.spools_damaged == 1
    (aside,) = spool.glob("spool-damaged-*.db")
    assert aside.read_bytes() == b"this is no database" * 1000


@pytest.mark.parametrize(
    ("fault", "reasons"),
    [
        ("cut", {"closed"}),
        ("cut_in_the_middle", {"closed", "protocol_error"}),
        ("hold", {"keepalive"}),
    ],
)
async def test_a_wire_to_the_feed_that_breaks(writer_url: str, database: str, fault: str, reasons: set[str]) -> None:
    """A reset, one in the middle of a frame, and a half-open connection: each ends the session, and is made again."""
    async with Simulator(port=0, rate=0, max_streams=9) as simulator, Proxy(simulator.stream_url, seed=3) as proxy:
        configuration = settings(simulator, writer_url, stream_url=proxy.url, ping_timeout="300ms")
        async with running(configuration) as daemon:
            await simulator.wait_connected()
            market = Market(simulator)
            market.trade()
            await until(database, COUNT, market.sent)
            getattr(proxy, fault)()
            simulator.send([Tick("LOST.NZ", NOW, 1.0, number) for number in range(100)])
            await until(database, "SELECT count(*) FROM ingest.stream_sessions WHERE ended_at IS NOT NULL", 1)
            proxy.release()
            async with asyncio.timeout(10):
                while daemon.telemetry.counts.sessions < 2:
                    await asyncio.sleep(0.01)
            await until(database, "SELECT count(*) FROM ingest.stream_sessions WHERE authenticated_at IS NOT NULL", 2)
            market.trade()
            await until(database, "SELECT count(*) FROM market.ticks WHERE symbol = 'AIR.NZ'", market.sent)
    ends = await query(database, ENDS)
    assert ends[0][0] in reasons
    assert ends[-1] == ("stopped",)


async def test_a_slow_wire(writer_url: str, database: str) -> None:
    """A delay below the keepalive's patience changes nothing but the time of arrival."""
    async with Simulator(port=0, rate=0) as simulator, Proxy(simulator.stream_url) as proxy:
        proxy.delay = 0.1
        async with running(settings(simulator, writer_url, stream_url=proxy.url, ping_timeout="2s")):
            await simulator.wait_connected()
            market = Market(simulator)
            with contextlib.suppress(TimeoutError):
                await market.trade_for(1)
            await stored(database, market)
    assert await query(database, ENDS) == [("stopped",)]
