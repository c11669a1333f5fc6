"""The daemon is tested as a process: an unread log, closed or full streams, and every signal."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ingestor.service.process import MEANINGLESS
from ingestor.simulator.server import TOKEN, Simulator
from ingestor.store.connect import connect
from tests.http import Window, mute
from tests.processes import DaemonProcess
from tests.recording import Market, stored


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as reader:
        return int(reader.getsockname()[1])


Start = Callable[..., DaemonProcess]


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(port=0, rate=0) as found:
        yield found


@pytest.fixture
def start(simulator: Simulator, writer_url: str, tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a daemon with settings and options of `subprocess.Popen`, until the test's end."""
    started = []

    def start(popen: dict[str, Any] | None = None, **changes: Any) -> DaemonProcess:
        defaults = {
            "stream_url": simulator.stream_url,
            "token": TOKEN,
            "database_url": writer_url,
            "exchange_calendar": "always",
            "spool_dir": tmp_path / "spool",
            "reconnect_max_delay": "100ms",
            "heartbeat": "100ms",
            "log_format": "json",
        }
        daemon = DaemonProcess(tmp_path / "log", **{**defaults, **changes})
        daemon.popen = popen or {}
        daemon.start()
        started.append(daemon)
        return daemon

    yield start
    for each in started:
        each.end()


async def stopped(daemon: DaemonProcess) -> int:
    """Send SIGTERM and return the exit status."""
    return await asyncio.to_thread(daemon.stop)


@pytest.fixture
def full_pipe() -> Iterator[tuple[int, int]]:
    """Return a small full pipe."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    fill_up(writer)
    yield reader, writer
    for end in (reader, writer):
        os.close(end)


def fill_up(writer: int) -> None:
    os.set_blocking(writer, False)  # for all who share it
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"\n")
    os.set_blocking(writer, True)


def read_until(descriptor: int, part: bytes) -> list[bytes]:
    """Read until a complete line contains a text; return the lines up to it, though later ones may have been read."""
    text = b""
    while True:
        lines = text.split(b"\n")[:-1]
        for number, line in enumerate(lines, 1):
            if part in line:
                return lines[:number]
        text += os.read(descriptor, 65536)


async def test_an_unread_log(simulator: Simulator, start: Start, database: str, full_pipe: tuple[int, int]) -> None:
    """Ticks commit, health is answered, SIGTERM ends it with 0; a late reader finds the number of lost lines."""
    port = free_port()
    reader, writer = full_pipe
    unknown = {f"unknown_{number}_{'x' * 8000}": "1" for number in range(15)}  # a warning names each of them
    daemon = start({"stdout": writer, "stderr": writer}, log_level="debug", http_port=port, **unknown)
    await simulator.wait_connected()
    market = Market(simulator)
    market.trade()
    await stored(database, market)
    async with Window(f"http://127.0.0.1:{port}") as window:
        assert (await window.get("/healthz"))[0] == 200
        dropped = await window.metric("ingestor_log_lines_dropped_total")
    assert dropped is not None
    assert dropped > 5
    lines = await asyncio.to_thread(read_until, reader, b'"log_lines_dropped"')
    assert json.loads(lines[-1])["count"] >= dropped
    assert all(json.loads(line) for line in lines if line)
    fill_up(writer)
    market.trade()
    assert await stopped(daemon) == 0
    await stored(database, market)


def close_standard_streams() -> None:
    os.closerange(0, 3)


async def test_streams_that_are_closed_from_the_start(simulator: Simulator, start: Start, database: str) -> None:
    """No file and no socket gets the number of a closed stream, or the log would be written into it."""
    daemon = start({"preexec_fn": close_standard_streams}, log_level="debug")
    await simulator.wait_connected()
    market = Market(simulator)
    market.trade()
    await stored(database, market)
    assert {Path(f"/proc/{daemon.pid}/fd/{number}").readlink() for number in range(3)} == {Path(os.devnull)}
    assert await stopped(daemon) == 0


def few_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


async def test_a_full_disk_under_the_log_and_few_descriptors(simulator: Simulator, start: Start, database: str) -> None:
    """Lines are lost and counted; HTTP clients leave the recorder its descriptors; ticks are written."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    full = os.open("/dev/full", os.O_WRONLY)
    daemon = start({"stdout": full, "stderr": full, "preexec_fn": few_descriptors}, log_level="debug", http_port=port)
    os.close(full)
    await simulator.wait_connected()
    market = Market(simulator)
    async with Window(url) as window, mute(url, *[b"", b"GET / HTTP/1.1\r\n"] * 100):
        simulator.drop_all()
        await simulator.wait_connected(0)
        await simulator.wait_connected()  # the new connection needs a descriptor
        market.trade()
        await stored(database, market)
        assert (await window.metric("ingestor_log_lines_dropped_total") or 0) > 0
        assert daemon.descriptors() < 64
        assert await stopped(daemon) == 0


async def test_a_terminal_that_is_closed(simulator: Simulator, start: Start, database: str) -> None:
    """SIGHUP stops the daemon like SIGTERM: ticks that wait for a table are spooled and written by the next process."""
    patient = {"write_timeout": "60s", "spool_after": "60s", "stop_timeout": "600s"}
    daemon = start(**patient)
    await simulator.wait_connected()
    market = Market(simulator)
    market.trade()
    await stored(database, market)
    daemon.signal(signal.SIGUSR1)
    await logged(daemon, "signal_ignored", signal="SIGUSR1")
    for number in MEANINGLESS:
        os.kill(daemon.pid, number)
    connection = await connect(database)
    async with connection.transaction():
        await connection.execute("LOCK TABLE ingest.stream_sessions")
        for _ in range(3):
            market.trade()
            await asyncio.sleep(0.1)
        daemon.signal(signal.SIGHUP)
        await logged(daemon, "stopping", signal="SIGHUP")
        daemon.signal(signal.SIGHUP)  # no longer waits for the table
        assert await asyncio.to_thread(daemon.wait) == 0
    await connection.close()

    daemon = start({"preexec_fn": as_nohup}, **patient)
    await stored(database, market)
    await simulator.wait_connected()
    daemon.signal(signal.SIGHUP)
    market.trade()
    await stored(database, market)
    daemon.signal(signal.SIGQUIT)
    assert await asyncio.to_thread(daemon.wait) == 0
    await logged(daemon, "stopping", signal="SIGQUIT")


def as_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


async def logged(daemon: DaemonProcess, event: str, **facts: Any) -> None:
    """Wait until an event with these fields is in the log."""
    async with asyncio.timeout(60):
        while not any(
            line.items() >= {"event": event, **facts}.items()
            for line in map(json.loads, daemon.log.read_text(encoding="utf-8").splitlines())
        ):
            await asyncio.sleep(0.05)
