"""Errors name the cause of a failure in words, also where the driver reports only its own state."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest
import structlog

from ingestor.admin.engine import as_owner
from ingestor.errors import StoreError
from ingestor.simulator.server import TOKEN, Simulator
from ingestor.store.connect import connect
from ingestor.store.connection import GuardedConnection
from ingestor.store.copy_in import PIECE, copy_rows
from tests.clocks import HANG_SECONDS
from tests.commands import ingestor_in_process
from tests.http import Window
from tests.processes import DaemonProcess, ServerProcess
from tests.recording import Market, recording, stored
from tests.servers import TestServer
from tests.sessions import execute

SHUT_DOWN = "The database closed the connection: terminating connection due to administrator command (57P01)."
CLOSED = "The connection to the database broke: the server closed it in the middle of an operation."
PRIVATE = re.compile("cannot switch|middle of operation|asyncpg|<class|Error\\b")
"""Terms of the driver and of libraries that no message may contain."""


BAR = """
INSERT INTO market.bars (symbol, time, resolution, open, high, low, close, volume, source)
VALUES ('SUM020.NZ', '2026-11-19 21:30+00', '1 minute', 6.5, 6.6, 6.4, 6.45, 70, 'financefeast')
"""


async def _failure(url: str, what: str, begun: asyncio.Semaphore, ends: asyncio.Event) -> str:
    """Return the daemon's error for a connection that is lost in use, or idle."""
    guarded = GuardedConnection(await connect(url), 60)
    begun.release()
    try:
        async with guarded as connection:
            if what == "query":
                await connection.execute("SELECT pg_sleep(60)")
            await ends.wait()
            await connection.execute("SELECT 1")
    except StoreError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGINT, SHUT_DOWN), (signal.SIGQUIT, CLOSED)], ids=["fast", "immediate"]
)
async def test_a_server_that_shuts_down(
    writer_url: str, database: str, process: ServerProcess, number: signal.Signals, words: str
) -> None:
    """The interrupted query reports the server's reason; later queries report a closed connection."""
    begun, ends = asyncio.Semaphore(0), asyncio.Event()
    observer = await connect(database)
    uses = [asyncio.create_task(_failure(writer_url, what, begun, ends)) for what in ("query", "idle")]
    for _ in uses:
        await begun.acquire()
    while await observer.fetchval("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'") == 0:
        await asyncio.sleep(0.02)
    observer.terminate()
    os.kill(process.pid, number)
    while process.is_running:
        await asyncio.sleep(0.02)
    ends.set()
    query, idle = await asyncio.gather(*uses)
    assert query.startswith(words)
    assert not PRIVATE.search(query + idle)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_session_that_ends_in_copy(
    database: str,
    process: ServerProcess,
    caplog: pytest.LogCaptureFixture,
    number: signal.Signals,
) -> None:
    """A COPY whose session is ended reports the reason and stops sending; asyncio logs nothing."""
    guarded = GuardedConnection(await connect(database), 60)

    def rows() -> Iterator[bytes]:
        os.kill(guarded.connection.get_server_pid(), number)
        yield bytes(200 * PIECE)

    with pytest.raises(StoreError) as raised:
        async with guarded as connection:
            await copy_rows(connection, "market", "ticks", rows(), lambda: None)
    assert str(raised.value).startswith((SHUT_DOWN, CLOSED))  # a reset may overtake the server's last message
    assert [record for record in caplog.records if record.name == "asyncio"] == []
    assert process.is_running
    async with asyncio.timeout(HANG_SECONDS):
        while True:  # if one session is killed, the server ends all others and recovers
            with contextlib.suppress(StoreError):
                await (await connect(database)).close()
                break
            await asyncio.sleep(0.02)


async def test_an_owner_whose_session_ends(database: str) -> None:
    """Migration and maintenance report the same reason, without the class of a library."""
    with pytest.raises(StoreError) as raised:
        async with as_owner(database, failure="It failed", verb="") as engine, engine.connect() as connection:
            await connection.exec_driver_sql("SELECT pg_terminate_backend(pg_backend_pid())")
    assert str(raised.value).startswith(f"It failed: {SHUT_DOWN}")
    assert not PRIVATE.search(str(raised.value))


async def test_a_daemon_whose_server_restarts(writer_url: str, database: str, process: ServerProcess) -> None:
    """All log lines about a server that restarts repeatedly are in words."""
    with structlog.testing.capture_logs() as lines:
        async with recording(writer_url) as (market, daemon):
            for number in (signal.SIGINT, signal.SIGQUIT):
                market.trade()
                await stored(database, market)
                failures = daemon.telemetry.counts.write_failures
                os.kill(process.pid, number)
                async with asyncio.timeout(HANG_SECONDS):
                    while process.is_running or daemon.telemetry.counts.write_failures < failures + 2:
                        market.trade(1)
                        await asyncio.sleep(0.02)
                await process.start()
            await stored(database, market)
    details = [str(line["detail"]) for line in lines if line["event"] == "database_write_failed"]
    assert details
    assert [detail for detail in details if PRIVATE.search(detail)] == []


async def test_a_daemon_keeps_the_cause_of_an_outage(
    writer_url: str, database: str, process: ServerProcess, tmp_path: Path
) -> None:
    """While its database is gone, a daemon's /readyz keeps the cause and its begin, beside the growing true age."""
    async with Simulator(port=0, rate=0) as simulator:
        daemon = DaemonProcess(
            tmp_path / "log",
            stream_url=simulator.stream_url,
            token=TOKEN,
            database_url=writer_url,
            exchange_calendar="always",
            heartbeat="100ms",
            spool_dir=tmp_path / "spool",
        )
        daemon.skew = 3 * 86_400  # an age by another clock than its own would be days
        daemon.start()
        try:
            await simulator.wait_connected()
            market = Market(simulator)
            market.trade()
            await stored(database, market)
            async with Window(await daemon.page()) as window:
                ages: list[int] = []
                process.kill()
                since = set()
                async with asyncio.timeout(HANG_SECONDS):
                    while len(ages) < 3:
                        market.trade(1)
                        await asyncio.sleep(0.05)
                        for problem in (await window.get("/readyz"))[1]["problems"]:
                            if found := re.fullmatch(r"(.+) Nothing was committed for (\d+) s\.", problem["detail"]):
                                assert problem["check"] == "database"
                                assert "Connection refused" in found[1] or found[1].startswith(
                                    (SHUT_DOWN[:12], CLOSED[:12])
                                )
                                assert not PRIVATE.search(found[1])
                                since.add(problem["since"])
                                ages = [*ages, int(found[2])] if int(found[2]) not in ages else ages
                assert ages == sorted(ages)
                assert len(since) == 1
                assert ages[-1] < 86_400
                await process.start()
                async with asyncio.timeout(HANG_SECONDS):
                    while not (await window.get("/readyz"))[1]["ready"]:
                        await asyncio.sleep(0.05)
            await stored(database, market)
            assert await asyncio.to_thread(daemon.stop) == 0, daemon.tail()
        finally:
            daemon.end()


@pytest.mark.parametrize(
    "error",
    [
        asyncpg.InternalClientError("cannot switch to state 15; another operation (2) is in progress"),
        asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"),
    ],
)
async def test_a_closed_connection_of_an_owner(error: Exception, database: str) -> None:
    """An error that SQLAlchemy does not recognise is reported without a traceback."""
    with pytest.raises(StoreError, match="It failed: The connection to the database broke: the server closed it"):
        async with as_owner(database, failure="It failed", verb=""):
            raise error


@pytest.mark.usefixtures("bundled_calendar")
async def test_commands_that_end_well(server: TestServer, database: str, tmp_path: Path) -> None:
    """A successful command writes nothing to standard error but a log without warnings."""
    recorded = tmp_path / "recorded.jsonl"
    price = {"date": "2021-09-29T09:33:30", "price": 2.61, "volume": 5000, "symbol": "SUM020.NZ"}
    recorded.write_text(json.dumps({"type": "price", "data": price}) + "\n", encoding="utf-8")
    analyst = server.new_name()
    await execute(database, BAR)
    async with Simulator(port=0, rate=0) as simulator:
        settings = {
            "stream_url": simulator.stream_url,
            "rest_url": simulator.rest_url,
            "token": TOKEN,
            "database_url": database,
            "log_format": "json",
            "spool_dir": str(tmp_path / "spool"),
        }
        environment = {f"INGESTOR_{name.upper()}": value for name, value in settings.items()}
        said = {}
        for arguments in (
            ["migrate"],
            ["maintain"],
            ["grant-analyst", analyst, "--no-password"],
            ["replay", str(recorded)],
            ["check"],
            ["gaps"],
            ["gaps", "--format=json"],
            ["chart", "SUM020.NZ"],
            ["backfill", "--dry-run"],
        ):
            status, _, errors = await asyncio.to_thread(ingestor_in_process, *arguments, **environment)
            said[" ".join(arguments)] = (status, _alarms(errors))
        daemon = DaemonProcess(tmp_path / "log", **settings)
        daemon.start()
        try:
            await simulator.wait_connected()
            status = await asyncio.to_thread(daemon.stop)
        finally:
            daemon.end()
        said["run"] = (status, _alarms(daemon.log.read_text(encoding="utf-8")))
    assert said == dict.fromkeys(said, (0, []))
    await server.run(f"DROP OWNED BY {analyst}", database.rpartition("/")[2])
    await server.run(f"DROP ROLE {analyst}")


def _alarms(text: str) -> list[str]:
    """Return the lines of a log other than the ordinary ones."""
    levels = [(json.loads(line)["level"] if line.startswith("{") else "", line) for line in text.splitlines()]
    return [line for level, line in levels if level not in {"info", "debug"}]
