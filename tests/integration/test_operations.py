"""A running daemon is observed from outside: health, readiness, metrics, the service manager's socket and its port."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from ingestor.service.coverage_monitor import CoverageMonitor
from ingestor.service.daemon import Daemon
from ingestor.service.process import StopRequest
from ingestor.settings import variable
from ingestor.simulator.server import TOKEN, Simulator
from ingestor.telemetry import liveness
from ingestor.web import app
from tests.clocks import HANG_SECONDS
from tests.http import Window, mute
from tests.processes import DaemonProcess
from tests.proxy import Proxy
from tests.recording import TOTALS, Market, recording, running, settings, stored
from tests.servers import execute_all, query


@contextlib.asynccontextmanager
async def seen(daemon: Daemon) -> AsyncIterator[Window]:
    """Yield an HTTP client of a daemon in this process, once it listens."""
    async with asyncio.timeout(HANG_SECONDS):
        while not daemon.http.is_bound:
            await asyncio.sleep(0.01)
    async with Window(daemon.http.url) as window:
        yield window


async def until_answer(window: Window, path: str, **expected: Any) -> Any:
    """Wait until an answer has these values, and return it."""
    async with asyncio.timeout(HANG_SECONDS):
        while True:
            _, found = await window.get(path)
            if all(found[key] == value for key, value in expected.items()):
                return found
            await asyncio.sleep(0.02)


async def until_metric(window: Window, value: float, metric: str, **labels: str) -> None:
    """Wait until a metric has a value."""
    async with asyncio.timeout(HANG_SECONDS):
        while await window.metric(metric, **labels) != value:
            await asyncio.sleep(0.02)


async def test_a_healthy_daemon(writer_url: str, database: str) -> None:
    """A daemon that receives and writes is alive and ready; its counters agree with the database."""
    async with recording(writer_url) as (market, daemon), seen(daemon) as window:
        market.trade(300)
        market.trade(1)
        await stored(database, market)
        assert await window.get("/healthz") == (200, {"alive": True, "loops": {"reader": "ok", "writer": "ok"}})
        await until_answer(window, "/readyz", ready=True, problems=[])
        daemon_sum = (await query(database, TOTALS))[0][0]
        assert await window.metric("ingestor_ticks_written_total") == daemon_sum == 301
        assert await window.metric("ingestor_session_state", state="streaming") == 1
        await until_metric(window, 0, "ingestor_buffer_bytes")  # a heartbeat may be on its way
        _, status = await window.get("/status")
        assert status["counts"]["ticks_written"] == status["connections"][0]["ticks"] == 301
        assert [tick["volume"] for tick in status["ticks"][:3]] == [300, 299, 298]
        assert status["stream"]["state"] == "streaming"
        assert status["market"]["open"] is True
        assert len(status["history"]["ticks"]) == 360
        await until_metric(window, 0, "ingestor_open_gaps")  # calendar and gaps are read once the database has answered
        assert await window.metric("ingestor_oldest_open_gap_seconds") == 0
        async with asyncio.timeout(HANG_SECONDS):
            while (days := (await window.get("/status"))[1]["calendar_days_left"]) is None:
                await asyncio.sleep(0.02)
        assert await window.metric("ingestor_calendar_remaining_seconds") == 86_400 * days


async def test_the_relays_of_a_database(writer_url: str, database: str) -> None:
    """The status lists the relays that report, and those that have fallen silent while they had clients."""
    await query(
        database,
        "INSERT INTO ingest.relays (id, instance, clients, started_at, seen_at) "
        "SELECT gen_random_uuid(), name, 3 * (name <> 'stopped')::int, "
        "clock_timestamp() - began, clock_timestamp() - ago FROM (VALUES "
        "('dealing', interval '1 day', interval '0'), ('research', '1 day', '5 minutes'), "
        "('stopped', '1 day', '5 minutes'), ('gone', '1 day', '2 hours'), ('dealing', '2 days', '25 hours'), "
        "('replaced', '1 day', '9 minutes'), ('replaced', '8 minutes', '1 s')) "
        "AS found (name, began, ago) RETURNING 1",
    )
    async with recording(writer_url) as (_, daemon), seen(daemon) as window:
        async with asyncio.timeout(HANG_SECONDS):
            while (relays := (await window.get("/status"))[1]["relays"]) is None:
                await asyncio.sleep(0.02)
    assert [(each["instance"], each["clients"], each["listening"]) for each in relays] == [
        ("dealing", 3, True),
        ("replaced", 3, True),
        ("research", 3, False),
    ]
    assert all(each["started_at"] < each["seen_at"] for each in relays)


async def test_an_unavailable_database(writer_url: str, database: str, quick: None) -> None:
    """A failed write makes the daemon unready at once, never unhealthy, and shows in metrics and on the page."""
    async with Proxy(writer_url) as proxy, recording(proxy.url) as (market, daemon), seen(daemon) as window:
        market.trade()
        await stored(database, market)
        await until_answer(window, "/readyz", ready=True)
        proxy.refuses = True
        proxy.cut()
        market.trade()
        async with asyncio.timeout(HANG_SECONDS):
            red = await until_answer(window, "/readyz", ready=False)
        assert [problem["check"] for problem in red["problems"]] == ["database"]
        assert (await window.get("/healthz"))[0] == 200
        assert await window.metric("ingestor_ready", check="database") == 0
        assert await window.metric("ingestor_ready", check="stream") == 1
        _, status = await window.get("/status")
        assert status["ready"]["problems"][0]["since"] == red["problems"][0]["since"]
        assert status["buffer"]["bytes"] > 0
        proxy.refuses = False
        await until_answer(window, "/readyz", ready=True)
        await stored(database, market)
        async with asyncio.timeout(HANG_SECONDS):  # the rows are visible before the commit is acknowledged
            while await window.metric("ingestor_ticks_written_total") != market.sent:
                await asyncio.sleep(0.02)


async def test_a_database_that_fails_only_the_coverage_query(writer_url: str, database: str) -> None:
    """If the coverage query fails, old gaps are not shown indefinitely, and the recorder continues."""
    parts = {"new_coverage_monitor": partial(CoverageMonitor, coverage_interval=0.05, max_age=0.1)}
    async with recording(writer_url, parts=parts) as (market, daemon), seen(daemon) as window:
        async with asyncio.timeout(HANG_SECONDS):
            while await window.metric("ingestor_open_gaps") is None:
                await asyncio.sleep(0.02)
        await execute_all(database, "REVOKE SELECT ON market.gaps FROM market_write")
        async with asyncio.timeout(HANG_SECONDS):
            while await window.metric("ingestor_open_gaps") is not None:
                await asyncio.sleep(0.02)
        market.trade()
        await stored(database, market)
        await execute_all(database, "GRANT SELECT ON market.gaps TO market_write")
        async with asyncio.timeout(HANG_SECONDS):
            while await window.metric("ingestor_open_gaps") is None:
                await asyncio.sleep(0.02)


async def test_a_secret_file_that_is_missing_for_a_moment(writer_url: str, tmp_path: Path) -> None:
    """A secret file that is missing for a moment does not end the daemon, which reads the address at its start."""
    parts = {"new_coverage_monitor": partial(CoverageMonitor, coverage_interval=0.05)}
    file = tmp_path / "url"
    file.write_text(writer_url)
    async with (
        recording("", parts=parts, database_url=None, database_url_file=file) as (_, daemon),
        seen(daemon) as window,
    ):
        await until_answer(window, "/readyz", ready=True)
        async with asyncio.timeout(HANG_SECONDS):
            while daemon._coverage_monitor.coverage is None:
                await asyncio.sleep(0.01)
        file.unlink()
        before = daemon._coverage_monitor.coverage
        async with asyncio.timeout(HANG_SECONDS):
            while daemon._coverage_monitor.coverage is before:
                await asyncio.sleep(0.01)
        assert (await window.get("/readyz"))[0] == 200


async def test_a_spool_without_room(writer_url: str, quick: None) -> None:
    """If nothing more can be kept, the stream is closed; all three checks give the reason, and recover."""
    bound = {"spool_max_bytes": "1MiB"}
    async with Proxy(writer_url) as proxy, recording(proxy.url, **bound) as (market, daemon), seen(daemon) as window:
        await until_answer(window, "/readyz", ready=True)
        proxy.refuses = True
        proxy.cut()
        for _ in range(4):
            market.trade(5000)
        async with asyncio.timeout(HANG_SECONDS):
            while len((red := (await window.get("/readyz"))[1])["problems"]) < 3:
                await asyncio.sleep(0.02)
        details = {problem["check"]: problem["detail"] for problem in red["problems"]}
        assert details["spool"] == details["stream"] == "The buffer is full."
        async with asyncio.timeout(HANG_SECONDS):
            while await window.metric("ingestor_session_state", state="blocked") != 1:
                await asyncio.sleep(0.02)
        assert (await window.metric("ingestor_spool_bytes") or 0) > 2**20
        _, status = await window.get("/status")
        assert status["buffer"]["blocked_by"] == "buffer_full"
        proxy.refuses = False
        await until_answer(window, "/readyz", ready=True)


async def test_a_database_without_a_schema(empty_database: str) -> None:
    """The reason names the remedy."""
    async with recording(empty_database) as (_, daemon), seen(daemon) as window:
        async with asyncio.timeout(HANG_SECONDS):
            while "ingestor migrate" not in str((await window.get("/readyz"))[1]):
                await asyncio.sleep(0.02)


async def test_a_stuck_writer_makes_the_daemon_unready(writer_url: str, database: str) -> None:
    """Each heartbeat of a live stream is a commit; after three missed ones the daemon is unready."""
    changes = {"write_timeout": "60s", "heartbeat": "200ms"}
    async with Proxy(writer_url) as proxy, recording(proxy.url, **changes) as (market, daemon), seen(daemon) as window:
        market.trade()
        await stored(database, market)
        await until_answer(window, "/readyz", ready=True)
        proxy.hold()
        red = await until_answer(window, "/readyz", ready=False)
        assert red["problems"][0]["detail"].startswith("Nothing was committed for ")
        proxy.release()
        await until_answer(window, "/readyz", ready=True)


async def test_an_unavailable_stream(writer_url: str) -> None:
    """The loss of the stream is reported with its reason and the next attempt, and counted by cause."""
    async with Simulator(port=0, rate=0) as simulator, Proxy(simulator.stream_url) as proxy:
        there = settings(simulator, writer_url, stream_url=proxy.url, reconnect_max_delay="60s")
        async with running(there) as daemon, seen(daemon) as window:
            await until_answer(window, "/readyz", ready=True)
            proxy.refuses = True
            proxy.cut()
            red = await until_answer(window, "/readyz", ready=False)
            assert [problem["check"] for problem in red["problems"]] == ["stream"]
            async with asyncio.timeout(HANG_SECONDS):
                while not (retry := (await window.get("/status"))[1]["stream"])["retry_at"]:
                    await asyncio.sleep(0.02)
            assert retry["state"] == "waiting"
            assert await window.metric("ingestor_reconnects_total", cause="closed") == 1
            await until_metric(window, 1, "ingestor_session_state", state="waiting")  # it waits, tries and waits again
            _, status = await window.get("/status")
            assert status["connections"][0]["reason"] == "closed"


async def test_a_stuck_writer_fails_health(writer_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Health fails and names the loop; the watchdog gets no more messages, so the manager restarts the daemon."""
    with manager() as (notified, name):
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        monkeypatch.setenv("WATCHDOG_USEC", "100000")
        async with recording(writer_url, stop_timeout="1s") as (market, daemon), seen(daemon) as window:
            await wait_for_message(notified, "WATCHDOG=1")
            monkeypatch.setattr(daemon._store, "write", lambda _: asyncio.Event().wait())
            daemon._writer._liveness._step_seconds = 0.1 - liveness.LIVENESS_GRACE_SECONDS  # only that of the writer
            market.trade()
            stuck = await until_answer(window, "/healthz", alive=False)
            assert stuck["loops"] == {"reader": "ok", "writer": "stuck"}
            assert (await window.get("/healthz"))[0] == 503
            received(notified)
            await asyncio.sleep(0.3)  # three times the watchdog's interval
            assert "WATCHDOG=1" not in received(notified)


@contextlib.contextmanager
def manager() -> Iterator[tuple[socket.socket, str]]:
    """Yield a service manager's socket and its name."""
    name = f"@ingestor-manager-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(name.replace("@", "\0"))
        listening.setblocking(False)
        yield listening, name


def received(manager: socket.socket) -> list[str]:
    """Return the messages to the manager since the last call."""
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(manager.recv(4096).decode())
    return found


async def wait_for_message(manager: socket.socket, message: str, *before: str) -> list[str]:
    """Wait for a message to the manager, unless it is in `before`; return all messages until then."""
    found = list(before)
    async with asyncio.timeout(HANG_SECONDS):
        while not any(line.startswith(message) for line in found):
            found += received(manager)
            await asyncio.sleep(0.01)
    return found


async def test_notifications_to_the_service_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon reports that it is up without database and stream, feeds the watchdog, and reports its stop."""
    with manager() as (notified, name):
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        monkeypatch.setenv("WATCHDOG_USEC", "400000")
        daemon = DaemonProcess(
            tmp_path / "log",
            token=TOKEN,
            stream_url="ws://127.0.0.1:1/ws",
            database_url="postgresql://127.0.0.1:1/none",
            spool_dir=tmp_path / "spool",
        )
        daemon.start()
        try:
            messages = await wait_for_message(notified, "READY=1")
            assert "WATCHDOG=1" not in messages[: messages.index("READY=1")]
            messages = await wait_for_message(notified, "STATUS=waiting", *messages)
            status = next(line for line in messages if line.startswith("STATUS=waiting"))
            assert "0 ticks written" in status
            assert "stream: The server cannot be reached" in status
            daemon.signal(signal.SIGSTOP)
            await asyncio.sleep(0.1)
            received(notified)
            await asyncio.sleep(0.6)
            assert received(notified) == []
            daemon.signal(signal.SIGCONT)
            await wait_for_message(notified, "WATCHDOG=1")
            assert daemon.stop() == 0
            assert "STOPPING=1" in received(notified)
        finally:
            daemon.end()


async def test_a_used_port(tmp_path: Path) -> None:
    """A used port ends the daemon with status 78 and one line before anything else starts."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        daemon = DaemonProcess(
            tmp_path / "log",
            token=TOKEN,
            stream_url="ws://127.0.0.1:1/ws",
            database_url="postgresql://127.0.0.1:1/none",
            spool_dir=tmp_path / "spool",
            http_port=port,
        )
        daemon.start()
        assert await asyncio.to_thread(daemon.wait) == 78
    (line,) = daemon.log.read_text().splitlines()
    assert f"{variable('http_port')}: {port} on 127.0.0.1 is in use" in line


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7"])
async def test_an_address_of_another_machine(tmp_path: Path, host: str) -> None:
    daemon = DaemonProcess(
        tmp_path / "log", token=TOKEN, database_url="postgresql://127.0.0.1:1/none", spool_dir=tmp_path, http_host=host
    )
    daemon.start()
    assert await asyncio.to_thread(daemon.wait) == 78
    assert f"{variable('http_host')}: the server cannot listen on {host}:0" in daemon.log.read_text()


async def test_read_only_endpoints_without_secrets(writer_url: str) -> None:
    """Other methods are refused, other paths do not exist; each answer has the headers and no secret."""
    async with recording(writer_url) as (market, daemon), seen(daemon) as window:
        market.trade(1)
        for path in ("/", "/status", "/metrics", "/healthz", "/readyz", "/page.css", "/page.js", "/nothing"):
            response = await window.client.get(path)
            assert (response.status_code == 404) == (path == "/nothing")
            for name, value in app.HEADERS.items():
                assert response.headers[name] == value
            assert TOKEN not in response.text
            assert "server" not in response.headers
            for method in ("POST", "PUT", "DELETE", "PATCH"):
                expected = 404 if path == "/nothing" else 405
                assert (await window.client.request(method, path)).status_code == expected
        assert "text/css" in (await window.client.get("/page.css")).headers["content-type"]
        wanted = await window.client.get("/metrics", headers={"accept": "application/openmetrics-text"})
        assert wanted.text.endswith("# EOF\n")


async def test_the_events_end_with_the_daemon(writer_url: str, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page receives the status every second; too many pages are refused; a stop does not wait for them."""
    monkeypatch.setattr(app, "MAX_WATCHERS", 1)
    request = StopRequest()
    async with Simulator(port=0, rate=0) as simulator:
        daemon, market = Daemon(settings(simulator, writer_url)), Market(simulator)
        task = asyncio.create_task(daemon.run(request))
        await simulator.wait_connected()
        async with seen(daemon) as window, window.client.stream("GET", "/events") as response:
            events = received_events(response)
            await anext(events)
            market.trade()
            await stored(database, market)
            assert (await window.client.get("/events")).status_code == 503
            async with asyncio.timeout(HANG_SECONDS):
                while (await anext(events))["counts"]["ticks_written"] != market.sent:
                    pass
            request()
            async with asyncio.timeout(HANG_SECONDS):
                await task
                assert all([event["version"] == 1 async for event in events])


async def received_events(response: httpx.Response) -> AsyncIterator[Any]:
    """Yield the values of the server's events."""
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


async def test_http_clients_do_not_slow_the_recorder(writer_url: str, database: str) -> None:
    """Ticks are written and probes are answered while many connections request without reading, or wait."""
    requests = [
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() for path in ("/status", "/metrics", "/events")
    ]
    async with recording(writer_url) as (market, daemon), seen(daemon) as window:
        async with mute(daemon.http.url, *[*requests, requests[0] * 300, b"GET / HTTP/1.1\r\nX-Endless: "] * 40):
            market.trade()
            await stored(database, market)
            assert (await window.get("/healthz"))[0] == 200
            await until_answer(window, "/readyz", ready=True)
        huge = await window.client.get("/healthz", headers={"X-Huge": "x" * 100_000})
        assert huge.status_code == 400
        market.trade()
        await stored(database, market)
