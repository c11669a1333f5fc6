"""A failure is reported by its cause alone: no future with an unretrieved error is left."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import structlog

from ingestor.errors import ConfigurationError, StoreError
from ingestor.protocol.messages import error_message
from ingestor.service.daemon import Daemon
from ingestor.service.process import StopRequest
from ingestor.settings import load_settings
from ingestor.simulator.server import TOKEN
from ingestor.store.connect import connect
from ingestor.stream import connection as wire
from ingestor.stream.connection import open_connection
from tests.clocks import HANG_SECONDS
from tests.hostile import CLOSE, TEXT, Hostile, Talk, frame
from tests.processes import DaemonProcess

TURNS = 40
"""Turns of the loop after which a connection is cancelled: by then a local TCP connection is made."""


@pytest.fixture(autouse=True)
async def strays() -> AsyncIterator[None]:
    """Fail the test for anything that the loop reports by itself."""
    found: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: found.append(f"{context['message']}: {context.get('exception')!r}"))
    loop.set_debug(enabled=True)
    yield
    loop.set_debug(enabled=False)
    for _ in range(5):
        await asyncio.sleep(0)
    gc.collect()
    assert found == []


async def in_silence(_: Talk) -> None:
    await asyncio.Event().wait()


async def open_and_close(url: str) -> None:
    async with open_connection(url):
        pass


@pytest.mark.parametrize("mode", ["prefer", "require", "disable"])
async def test_a_cancelled_connection_to_the_database(server: Any, database: str, mode: str) -> None:
    """A cancellation at any turn of the loop, before and after TCP and TLS, leaves no error behind."""
    await _cancel_at_each_turn(lambda: connect(f"{database}?sslmode={mode}"))


async def test_a_cancelled_connection_to_the_stream() -> None:
    """The same holds for the stream, whose server never answers the handshake here."""
    async with Hostile(in_silence) as stream:
        await _cancel_at_each_turn(lambda: open_and_close(stream.url))
        await _cancel_at_each_turn(lambda: open_and_close(stream.url.replace("ws://127.0.0.1", "wss://localhost")))


async def _cancel_at_each_turn(begin: Callable[[], Awaitable[Any]]) -> None:
    for turns in range(TURNS):
        task = asyncio.ensure_future(begin())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if not task.cancelled() and task.exception() is None and task.result() is not None:
            task.result().terminate()


async def _refused(talk: Talk) -> None:
    await talk.shake_hands()
    await talk.receive()
    await talk.send(frame(TEXT, error_message("Token is not authorised")))


async def _error_and_close(talk: Talk) -> None:
    await talk.welcome()
    await talk.send(frame(TEXT, error_message("Something broke")), frame(CLOSE, b"\x03\xf3"))


async def _cut_at_once(_: Talk) -> None:
    pass


async def _two_failures(talk: Talk) -> None:
    """Send an error message and a protocol error in one read with the answer to the token."""
    await talk.welcome()
    await talk.send(frame(TEXT, error_message("One")), frame(TEXT, error_message("Two")), b"\xff\xff\xff\xff")


async def _stays_silent(talk: Talk) -> None:
    await talk.shake_hands()
    await asyncio.Event().wait()


async def _stalls(talk: Talk) -> None:
    await talk.welcome()
    await talk.answer_pings(10_000)


class _AfterFailures:
    """A server that cuts two connections, and refuses the third."""

    def __init__(self) -> None:
        self._left = 2

    async def __call__(self, talk: Talk) -> None:
        self._left -= 1
        await (_cut_at_once if self._left >= 0 else _refused)(talk)


@pytest.mark.parametrize(
    ("script", "changes", "cause"),
    [
        (_refused, {}, "Token is not authorised"),
        (_AfterFailures(), {}, "Token is not authorised"),
        (in_silence, {"stream_url": "wss://stream.financefeast.io/ws", "token": "tk_12345678901234567"}, "pk_"),
        (_error_and_close, {}, "Something broke"),
        (_two_failures, {}, "One"),
        (_cut_at_once, {}, "cut during the handshake"),
        (_cut_at_once, {"scheme": "wss"}, "cannot be reached"),
        (_stalls, {"stall_timeout": "50ms"}, "No tick"),
        (_stays_silent, {}, None),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_an_end_of_the_stream(
    script: Any, changes: dict[str, str], cause: str | None, writer_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of a session or a start, only the cause is reported, whether or not the database refuses."""
    monkeypatch.setattr(wire, "CLOSE_TIMEOUT", 0.05)
    for url in (writer_url, writer_url.replace(":writer@", ":wrong@")):
        async with Hostile(script) as stream:
            scheme = changes.get("scheme")
            address = stream.url.replace("ws://127.0.0.1", "wss://localhost") if scheme else stream.url
            given = {name: value for name, value in changes.items() if name != "scheme"}
            said = await _ended({"stream_url": address, "token": TOKEN, "database_url": url, **given}, stream, cause)
        if url == writer_url and cause is not None:
            assert cause in said


async def _ended(changes: dict[str, str], stream: Hostile, cause: str | None) -> str:
    """Run a daemon until it ends or has tried three times; return its output about the stream."""
    request = StopRequest()
    fixed = {"exchange_calendar": "always", "reconnect_max_delay": "10ms", "ping_interval": "20ms"}
    with structlog.testing.capture_logs() as lines:
        daemon = asyncio.create_task(Daemon(load_settings(**{**fixed, **changes})).run(request))
        async with asyncio.timeout(HANG_SECONDS):
            while not daemon.done() and sum(line["event"] == "reconnecting" for line in lines) < 3:
                if cause is None and stream.clients:
                    break
                await asyncio.sleep(0.01)
        request()
        with contextlib.suppress(ConfigurationError, StoreError):
            await daemon
    ends = daemon.exception()
    return "\n".join([str(ends), *(str(line.get("detail")) for line in lines)])


async def test_processes(writer_url: str, tmp_path: Path) -> None:
    """The error output of a process consists of log lines and, last, the cause of its end."""
    started = []
    async with Hostile(_refused) as refusing, Hostile(_stays_silent) as silent:
        common = {"database_url": writer_url, "log_format": "json", "log_level": "info"}
        for number, (url, token, ending) in enumerate(
            [
                ("wss://stream.financefeast.io/ws", "tk_12345678901234567", "begins with pk_"),
                (refusing.url, TOKEN, "not authorised"),
                (silent.url, TOKEN, "early"),
                (silent.url, TOKEN, "late"),
            ]
        ):
            settings = {"stream_url": url, "token": token, "spool_dir": tmp_path / f"spool{number}", **common}
            daemon = DaemonProcess(tmp_path / f"log{number}", **settings)
            daemon.start()
            started.append((daemon, ending))
        try:
            for daemon, ending in started:
                if ending in {"early", "late"}:
                    async with asyncio.timeout(60):
                        while not (daemon.handles(signal.SIGTERM) if ending == "early" else silent.clients):
                            await asyncio.sleep(0.01)
                    assert await asyncio.to_thread(daemon.stop) == 0
                else:
                    assert await asyncio.to_thread(daemon.wait, 60) == 78
        finally:
            for daemon, _ in started:
                daemon.end()
    for daemon, ending in started:
        lines = daemon.log.read_text(encoding="utf-8").splitlines()
        if ending not in {"early", "late"}:
            assert lines[-1].startswith("ingestor: ")
            assert ending in lines.pop()
        said = [line for line in map(json.loads, lines) if line["level"] != "info"]
        assert {line["event"] for line in said} <= {"session_ended"}
