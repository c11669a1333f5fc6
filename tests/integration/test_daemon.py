from __future__ import annotations

import asyncio
import contextlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import structlog

from ingestor.admin.migrate import migrate
from ingestor.errors import ConfigurationError, IngestorError
from ingestor.model import SECOND, EndReason, Tick
from ingestor.service.daemon import Daemon
from ingestor.service.process import StopRequest
from ingestor.simulator.server import TOKEN, Simulator
from ingestor.store.connect import connect
from tests.clocks import HANG_SECONDS
from tests.disks import fill, small_disk
from tests.recording import NOW, received, running, settings, until
from tests.servers import TestServer, query
from tests.unit.test_decoder import DOCUMENTED

TICKS = "SELECT coalesce(sum(ticks), 0)::bigint FROM ingest.stream_sessions"


async def test_the_documented_messages_become_eight_rows(writer_url: str, database: str) -> None:
    """The documented samples are stored as eight rows with the right UTC instants."""
    async with Simulator(port=0, rate=0) as simulator, running(settings(simulator, writer_url)):
        await simulator.wait_connected()
        for symbol, time, price, volume in DOCUMENTED:
            data = {"date": f"2021-09-29T{time}", "price": price, "volume": volume, "symbol": symbol}
            simulator.send_raw(json.dumps({"type": "price", "data": data}))
        await until(database, "SELECT count(*) FROM market.ticks", 8)
    rows = await query(database, "SELECT symbol, time, price, volume FROM market.ticks ORDER BY received_at")
    assert [(row[0], row[2], row[3]) for row in rows] == [(s, p, v) for s, _, p, v in DOCUMENTED]
    assert rows[0][1] == datetime(2021, 9, 28, 20, 33, 30, tzinfo=UTC)
    assert rows[-1][1] == datetime(2021, 9, 28, 20, 41, 27, tzinfo=UTC)


async def test_a_busy_market_is_stored_completely(writer_url: str, database: str) -> None:
    """Every tick that was sent has exactly one row."""
    async with Simulator(port=0, rate=2000, record=True) as simulator:
        async with running(settings(simulator, writer_url)):
            await simulator.wait_connected()
            await asyncio.sleep(2)
            await simulator.stop_market()
            await until(
                database,
                "SELECT coalesce(sum(ticks), 0)::bigint FROM ingest.stream_sessions",
                simulator.ticks_sent,
            )
        (account,) = simulator.accounts
    assert account.sent == len(account.ticks) > 1000
    sent = sorted((t.symbol, t.time, t.price, t.volume) for t in account.ticks)
    rows = await query(
        database,
        "SELECT symbol, (extract(epoch FROM time) * 1000000)::bigint, price, volume FROM market.ticks",
    )
    assert sorted(rows) == sent
    (session,) = await query(
        database,
        "SELECT end_reason, ticks, duplicates, rejected, covered_until <= ended_at, "
        "covered_until >= authenticated_at FROM ingest.stream_sessions",
    )
    assert session == ("stopped", len(sent), 0, 0, True, True)


async def test_garbage_is_rejected_with_its_reason(writer_url: str, database: str) -> None:
    """An unreadable message becomes a rejection, and the stream continues."""
    async with Simulator(port=0, rate=0) as simulator, running(settings(simulator, writer_url)):
        await simulator.wait_connected()
        simulator.send_raw("nonsense")
        simulator.send_raw(b"{}")
        simulator.send_raw(b"\xff\xfe", text=True)
        simulator.send_raw('{"type": "weather"}')
        simulator.send([Tick("AIR.NZ", NOW, 0.5, 100)])
        await until(database, "SELECT count(*) FROM market.ticks", 1)
    rows = await query(database, "SELECT reason, raw FROM ingest.rejected_messages ORDER BY batch, position")
    assert rows == [
        ("not_json", b"nonsense"),
        ("binary_frame", b"{}"),
        ("invalid_utf8", b"\xff\xfe"),
        ("unknown_type", b'{"type": "weather"}'),
    ]
    assert await query(database, "SELECT count(*), sum(rejected) FROM ingest.stream_sessions") == [(1, 4)]


async def test_pongs_cover_quiet_time(writer_url: str, database: str) -> None:
    """In a quiet time, coverage follows the answered pings."""
    async with Simulator(port=0, rate=0) as simulator, running(settings(simulator, writer_url)):
        await until(
            database,
            "SELECT max(covered_until - authenticated_at) > interval '300 ms' FROM ingest.stream_sessions",
            True,
        )
    rows = await query(database, "SELECT last_message_at, covered_until <= ended_at FROM ingest.stream_sessions")
    assert rows == [(None, True)]


async def test_a_cut_connection_is_reopened(writer_url: str, database: str) -> None:
    """Each connection is a session with its end reason; ticks that the server replays are not stored twice."""
    tick = Tick("AIR.NZ", NOW, 0.5, 100)
    async with Simulator(port=0, rate=0, faults=["replay"]) as simulator:
        async with running(settings(simulator, writer_url)):
            await simulator.wait_connected()
            simulator.send([tick, tick])
            await until(database, "SELECT count(*) FROM market.ticks", 2)
            simulator.drop_all()
            await simulator.wait_connected(0)
            await simulator.wait_connected(1)
            await until(database, "SELECT coalesce(sum(duplicates), 0)::bigint FROM ingest.stream_sessions", 2)
    assert await query(database, "SELECT occurrence FROM market.ticks ORDER BY 1") == [(1,), (2,)]
    rows = await query(
        database, "SELECT end_reason, ticks, duplicates FROM ingest.stream_sessions ORDER BY connected_at"
    )
    assert rows == [("closed", 2, 0), ("stopped", 2, 2)]


@pytest.mark.parametrize(
    ("fault", "changes", "reason"),
    [
        ("half-open=10ms", {"ping_timeout": "100ms"}, "keepalive"),
        ("stall=10ms", {"stall_timeout": "200ms"}, "stall"),
        ("drop=10ms", {}, "closed"),
    ],
)
async def test_faults_end_a_session(
    writer_url: str, database: str, fault: str, changes: dict[str, Any], reason: str
) -> None:
    """A half-open, a mute and a cut connection each end with their own reason, and are reopened."""
    async with Simulator(port=0, rate=0, faults=[fault], max_streams=1000) as simulator:
        async with running(settings(simulator, writer_url, **changes)):
            await until(database, "SELECT count(*) >= 2 FROM ingest.stream_sessions WHERE ended_at IS NOT NULL", True)
    rows = await query(database, "SELECT DISTINCT end_reason FROM ingest.stream_sessions WHERE end_reason <> 'stopped'")
    assert rows == [(reason,)]


async def test_an_oversized_frame(writer_url: str, database: str) -> None:
    """A message over 1 MiB ends the session with its reason, and the next session continues."""
    async with Simulator(port=0, rate=0) as simulator, running(settings(simulator, writer_url)):
        await simulator.wait_connected()
        simulator.send_raw("x" * (2**20 + 1))
        await simulator.wait_connected(0)
        await simulator.wait_connected(1)
        await until(
            database, "SELECT end_reason FROM ingest.stream_sessions WHERE ended_at IS NOT NULL", "message_too_big"
        )


async def test_stream_limit_is_retried(writer_url: str, database: str) -> None:
    """A reached stream limit is retried, and the attempt is recorded."""
    async with Simulator(port=0, rate=0, max_streams=1) as simulator:
        async with running(settings(simulator, writer_url, instance="first")):
            await simulator.wait_connected()
            async with running(settings(simulator, writer_url, instance="second", spool_dir="second")):
                await until(
                    database,
                    "SELECT end_reason FROM ingest.stream_sessions WHERE instance = 'second'",
                    "stream_limit",
                )


async def test_a_refused_token_requires_operator_action(writer_url: str, database: str) -> None:
    """A token that was never accepted ends the daemon with 78, and is not shown in the message."""
    async with Simulator(port=0, rate=0) as simulator:
        daemon = Daemon(settings(simulator, writer_url, token="tk_wrong_token_00001"))
        with pytest.raises(ConfigurationError, match="not authorised") as caught:
            await asyncio.wait_for(daemon.run(StopRequest()), HANG_SECONDS)
    assert "tk_wrong" not in str(caught.value)
    assert await query(database, "SELECT end_reason, authenticated_at FROM ingest.stream_sessions") == [
        ("not_authorised", None)
    ]


@pytest.mark.parametrize(("fault", "reason"), [("reject", "not_authorised"), ("no-access", "no_access")])
async def test_a_token_that_worked_before_is_retried(writer_url: str, database: str, fault: str, reason: str) -> None:
    """Once a token was accepted, a refusal is the provider's fault, and the daemon does not exit."""
    async with Simulator(port=0, rate=0, faults=[fault]) as simulator:
        async with running(settings(simulator, writer_url)):
            await simulator.wait_connected()
            simulator.drop_all()
            await until(database, f"SELECT count(*) FROM ingest.stream_sessions WHERE end_reason = '{reason}'", 1)


async def test_a_database_that_is_migrated_later(empty_database: str, quick: None) -> None:
    """Ticks that arrive before the schema exists are kept, and are stored once it does."""
    async with Simulator(port=0, rate=0) as simulator:
        configuration = settings(simulator, empty_database)
        async with running(configuration) as daemon:
            await simulator.wait_connected()
            simulator.send([Tick("AIR.NZ", NOW, 0.5, 100)])
            async with asyncio.timeout(HANG_SECONDS):
                while not daemon.telemetry.counts.write_failures:
                    await asyncio.sleep(0.01)
            await migrate(empty_database, configuration, lambda _: None)
            await until(empty_database, "SELECT count(*) FROM market.ticks", 1)


async def test_a_full_buffer_closes_the_stream(empty_database: str, quick: None) -> None:
    """If the buffer is full, the stream is closed with that reason, and no tick is dropped silently."""
    ticks = [Tick("AIR.NZ", NOW, 0.5, number) for number in range(20_000)]
    async with Simulator(port=0, rate=0) as simulator:
        configuration = settings(simulator, empty_database, spool_max_bytes="1MiB", ping_timeout="60s")
        async with running(configuration) as daemon:
            await simulator.wait_connected()
            simulator.send(ticks)
            await simulator.wait_connected(0)
            assert daemon.buffer.blocked_by is EndReason.BUFFER_FULL
            await migrate(empty_database, configuration, lambda _: None)
            await simulator.wait_connected(1)
    rows = await query(
        empty_database,
        "SELECT end_reason, ticks = (SELECT count(*) FROM market.ticks) FROM ingest.stream_sessions "
        "ORDER BY connected_at",
    )
    assert rows[0] == ("buffer_full", True)


async def test_a_stop_while_the_database_is_unavailable(empty_database: str, quick: None) -> None:
    """Unwritten ticks go to the spool, the exit status is 0, and the next start writes them."""
    async with Simulator(port=0, rate=0) as simulator:
        configuration = settings(simulator, empty_database)
        async with running(configuration) as daemon:
            await simulator.wait_connected()
            simulator.send([Tick("AIR.NZ", NOW, 0.5, 100)] * 7)
            await received(daemon, 7)
        assert daemon.buffer.spooled_batches > 0
        await migrate(empty_database, configuration, lambda _: None)
        async with running(configuration):
            await until(empty_database, "SELECT count(*) FROM market.ticks", 7)
    rows = await query(empty_database, "SELECT end_reason, ticks FROM ingest.stream_sessions ORDER BY connected_at")
    assert rows == [("stopped", 7), ("stopped", 0)]


async def test_lost_messages_are_reported(empty_database: str, tmp_path: Path) -> None:
    """Without a database and with a full disk the exit status is 1, and the message counts the lost messages."""
    with contextlib.ExitStack() as stack:
        try:
            disk = stack.enter_context(small_disk(tmp_path / "disk", 2**20))  # without space for the ballast
        except PermissionError as error:
            pytest.skip(str(error))
        async with Simulator(port=0, rate=0) as simulator:
            request = StopRequest()
            daemon = Daemon(settings(simulator, empty_database, spool_dir=disk, stop_timeout="1s"))
            task = asyncio.create_task(daemon.run(request))
            await simulator.wait_connected()
            fill(disk)
            simulator.send([Tick("AIR.NZ", NOW, 0.5, number) for number in range(30_000)])
            await simulator.wait_connected(0)
            request()
            with pytest.raises(IngestorError, match=r"[0-9]{4,5} messages could be written neither"):
                await asyncio.wait_for(task, HANG_SECONDS)


async def test_a_second_signal_is_immediate(empty_database: str, writer_url: str, database: str) -> None:
    """After a second signal the daemon does not wait for the database, and still loses nothing."""
    blocker = await connect(database)
    async with Simulator(port=0, rate=0) as simulator:
        configuration = settings(simulator, writer_url, stop_timeout="10m", write_timeout="10m", spool_after="60s")
        async with blocker.transaction():
            await blocker.execute("LOCK TABLE ingest.stream_sessions IN ACCESS EXCLUSIVE MODE")
            request = StopRequest()
            daemon = Daemon(configuration)
            task = asyncio.create_task(daemon.run(request))
            await simulator.wait_connected()
            simulator.send([Tick("AIR.NZ", NOW, 0.5, 100)] * 7)
            await received(daemon, 7)
            request()
            await simulator.wait_connected(0)
            request()
            await asyncio.wait_for(task, HANG_SECONDS)
        await blocker.close()
        async with running(configuration):
            await until(database, "SELECT count(*) FROM market.ticks", 7)


async def test_a_refused_token_outranks_the_database(empty_database: str) -> None:
    """A refused token ends the daemon with 78 also while the database is unavailable."""
    async with Simulator(port=0, rate=0) as simulator:
        daemon = Daemon(settings(simulator, empty_database, token="tk_wrong_token_00001", stop_timeout="1s"))
        with pytest.raises(ConfigurationError, match="not authorised"):
            await asyncio.wait_for(daemon.run(StopRequest()), HANG_SECONDS)


@pytest.mark.parametrize("status", ["302 Found", "401 Unauthorized", "403 Forbidden", "404 Not Found"])
async def test_a_refused_handshake(writer_url: str, status: str) -> None:
    """A refused or redirected handshake requires operator action; the token is sent nowhere else."""
    received = bytearray()
    async with Simulator(port=0, rate=0) as elsewhere:

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            received.extend(await reader.readuntil(b"\r\n\r\n"))
            location = f"Location: {elsewhere.stream_url}\r\nContent-Length: 0\r\n\r\n"
            writer.write(f"HTTP/1.1 {status}\r\n{location}".encode())
            received.extend(await reader.read())
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            daemon = Daemon(settings(elsewhere, writer_url, stream_url=f"ws://127.0.0.1:{port}/ws"))
            with pytest.raises(ConfigurationError, match=status[:3]):
                await asyncio.wait_for(daemon.run(StopRequest()), HANG_SECONDS)
        assert elsewhere.accounts == []
    assert b"GET /ws" in received
    assert TOKEN.encode() not in received


@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Service Unavailable"])
async def test_a_busy_server_is_retried(writer_url: str, status: str) -> None:
    """An overloaded or unavailable server is retried."""
    tries = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal tries
        tries += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
        await writer.drain()
        writer.close()

    async with Simulator(port=0, rate=0) as unused, await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with running(settings(unused, writer_url, stream_url=f"ws://127.0.0.1:{port}/ws")):
            async with asyncio.timeout(HANG_SECONDS):
                while tries < 3:
                    await asyncio.sleep(0.01)


@pytest.mark.parametrize("form", ["seconds", "date"])
async def test_retry_after_is_honoured(writer_url: str, form: str) -> None:
    """A server that sends Retry-After is not tried earlier."""
    said = {
        "seconds": b"Retry-After: 60\r\n",
        "date": b"Date: Fri, 20 Nov 2026 10:00:00 GMT\r\nRetry-After: Fri, 20 Nov 2026 10:01:00 GMT\r\n",
    }

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 429 Too Many Requests\r\n" + said[form] + b"Content-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async with Simulator(port=0, rate=0) as unused, await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with running(settings(unused, writer_url, stream_url=f"ws://127.0.0.1:{port}/ws")) as daemon:
            async with asyncio.timeout(HANG_SECONDS):
                while (stream := daemon.telemetry.stream).retry_at is None:
                    await asyncio.sleep(0.01)
    assert 60 * SECOND <= stream.retry_at - stream.since <= 66 * SECOND
    assert "asks to wait for 60 s" in stream.detail


async def test_compression_is_used(writer_url: str) -> None:
    """permessage-deflate is negotiated."""
    async with Simulator(port=0, rate=0) as simulator, running(settings(simulator, writer_url)):
        await simulator.wait_connected()
        (account,) = simulator.accounts
        assert [extension.name for extension in account.connection.protocol.extensions] == ["permessage-deflate"]


async def test_a_database_that_is_unavailable_at_the_start(writer_url: str, database: str, server: TestServer) -> None:
    """The daemon receives ticks from the start, and stores them once the database is available."""
    await server.run(f"ALTER DATABASE {database.rpartition('/')[2]} ALLOW_CONNECTIONS false")
    async with Simulator(port=0, rate=0) as simulator, running(settings(simulator, writer_url)) as daemon:
        await simulator.wait_connected()
        simulator.send([Tick("AIR.NZ", NOW, 0.5, 100)])
        async with asyncio.timeout(HANG_SECONDS):
            while not daemon.telemetry.counts.write_failures:
                await asyncio.sleep(0.01)
        await server.run(f"ALTER DATABASE {database.rpartition('/')[2]} ALLOW_CONNECTIONS true")
        await until(database, "SELECT count(*) FROM market.ticks", 1)


async def test_an_expiring_calendar(writer_url: str, database: str) -> None:
    """Some weeks before the calendar's end, log and metrics report it with the remedy."""
    connection = await connect(database)
    await connection.execute("DELETE FROM ingest.trading_sessions WHERE trading_day > now() + interval '20 days'")
    await connection.execute("UPDATE ingest.settings SET calendar = 'XNZE'")
    await connection.close()
    async with Simulator(port=0, rate=0) as simulator:
        with structlog.testing.capture_logs() as logs:
            async with running(settings(simulator, writer_url)) as daemon, asyncio.timeout(HANG_SECONDS):
                while daemon.telemetry.counts.calendar_days_left is None:
                    await asyncio.sleep(0.01)
    assert 10 < daemon.telemetry.counts.calendar_days_left <= 20
    (warning,) = [entry for entry in logs if entry["event"] == "calendar_expiring"]
    assert "ingestor maintain" in warning["remedy"]
