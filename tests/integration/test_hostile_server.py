"""Servers that hold back, flood and do not read are simulated by raw bytes on real sockets."""

from __future__ import annotations

import asyncio
import socket
import time
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from websockets.exceptions import InvalidHandshake

from ingestor.buffer.fifo import Buffer
from ingestor.clock import SystemClock
from ingestor.coverage.calendar import load as load_calendar
from ingestor.errors import StreamError
from ingestor.model import SECOND, EndReason
from ingestor.service import reader
from ingestor.settings import load_settings
from ingestor.simulator.server import TOKEN
from ingestor.stream import connection as wire
from ingestor.stream.connection import FeedConnection, closed, keep_alive, open_connection, send
from ingestor.telemetry import rejections
from ingestor.telemetry.events import Telemetry
from tests.clocks import HANG_SECONDS
from tests.hostile import (
    BINARY,
    CLOSE,
    DEFLATED,
    FIRST,
    FIRST_DEFLATED,
    LAST,
    MORE,
    PING,
    PONG,
    TEXT,
    Hostile,
    Talk,
    deflated,
    frame,
)
from tests.recording import running, until
from tests.servers import query

PRICE = b'{"type":"price","data":{"date":"2021-09-29T09:33:30","price":2.61,"volume":5000,"symbol":"SUM020.NZ"}}'
MAX_QUEUED_BYTES = 128 * 1024
"""More than may ever wait to be written: the library's high-water mark, and a few pongs."""


def daemon_settings(url: str, database: str, **changes: Any) -> Any:
    defaults = {"stream_url": url, "token": TOKEN, "database_url": database, "exchange_calendar": "always"}
    times = {"heartbeat": "100ms", "ping_interval": "20ms", "ping_timeout": "5s", "reconnect_max_delay": "50ms"}
    return load_settings(**{**defaults, **times, **changes})


@pytest.fixture(autouse=True)
def _short_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the wait for a server that does not close."""
    monkeypatch.setattr(wire, "CLOSE_TIMEOUT", 0.05)


async def wait_until_cancelled() -> None:
    await asyncio.Event().wait()


def cut_in(*pieces: bytes) -> Sequence[bytes]:
    return pieces


ENDINGS = {
    "a fragment": (False, cut_in(frame(FIRST, PRICE[:40]))),
    "fragments that hold nothing": (False, cut_in(frame(FIRST), frame(MORE), frame(MORE))),
    "all but the last fragment": (False, cut_in(frame(FIRST, PRICE), frame(MORE))),
    "a compressed fragment": (True, cut_in(frame(FIRST_DEFLATED, deflated(PRICE)[:30]))),
    "a plain fragment where others are compressed": (True, cut_in(frame(FIRST, PRICE[:40]))),
    "a binary fragment": (False, cut_in(frame(FIRST + 1, PRICE[:40]))),
    "a fragment in two reads": (False, cut_in(frame(FIRST, PRICE[:40])[:1], frame(FIRST, PRICE[:40])[1:])),
}


@pytest.mark.parametrize("ending", ENDINGS)
async def test_pongs_do_not_cover_a_message_that_is_half_sent(writer_url: str, database: str, ending: str) -> None:
    """Coverage ends where an unfinished message began, although later pings were answered and a close was sent."""
    deflate, pieces = ENDINGS[ending]
    after = 0.0

    async def script(talk: Talk) -> None:
        nonlocal after
        await talk.welcome(deflate=deflate)
        if after:
            await wait_until_cancelled()
        await talk.send(frame(TEXT, PRICE))
        await talk.answer_pings(3)
        for piece in pieces:
            await talk.send(piece)
            await asyncio.sleep(0.05)
        await talk.answer_pings(2)
        after = time.time()  # the answer to the first ping, which was read after the message began
        await talk.answer_pings(5)
        await talk.send(frame(CLOSE, b"\x03\xe8"))

    async with Hostile(script) as server, running(daemon_settings(server.url, writer_url)):
        await until(database, "SELECT count(*) FROM ingest.stream_sessions WHERE ended_at IS NOT NULL", 1)
    ((covered, last),) = await query(
        database,
        "SELECT extract(epoch FROM covered_until)::float8, extract(epoch FROM last_message_at)::float8 "
        "FROM ingest.stream_sessions WHERE ended_at IS NOT NULL ORDER BY connected_at LIMIT 1",
    )
    assert last < covered < after


async def test_a_late_end_of_a_message(writer_url: str, database: str) -> None:
    """Pings between the fragments of a message are answered; the finished message is a tick, and coverage continues."""

    async def script(talk: Talk) -> None:
        await talk.welcome()
        await talk.send(frame(FIRST, PRICE[:10]))
        await talk.answer_pings(3)
        await talk.send(frame(MORE, PRICE[10:50]), frame(PING, b"?"))
        await talk.answer_pings(3)
        await talk.send(frame(LAST, PRICE[50:]))
        await talk.answer_pings(10**6)

    async with Hostile(script) as server, running(daemon_settings(server.url, writer_url)):
        await until(
            database, "SELECT max(covered_until - last_tick_at) > interval '0.1 s' FROM ingest.stream_sessions", True
        )
    assert await query(database, "SELECT ticks, rejected FROM ingest.stream_sessions") == [(1, 0)]


async def opened(url: str, handler: Any, test: Callable[[FeedConnection], Any]) -> None:
    async with open_connection(url) as connection:
        connection.attach(handler)
        await send(connection, b"{}")
        await test(connection)


def keep_little(connection: FeedConnection) -> None:
    """Let the system buffer little of the output, so that it waits in the process."""
    connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


def ignore(payloads: Sequence[bytes], binary: bool) -> None:
    pass


async def test_pings_are_answered_in_order() -> None:
    """Each ping that a server may send unread is answered; of more, only the newest."""
    answers: asyncio.Future[list[bytes]] = asyncio.get_running_loop().create_future()

    async def script(talk: Talk) -> None:
        await talk.welcome()
        pings = [frame(PING, bytes([number])) for number in range(100)]
        await talk.send(*pings[:3], frame(TEXT, b"x"), *pings[3:16])
        got = [await talk.receive() for _ in range(16)]
        await talk.send(*pings)
        while got[-1][1] != bytes([99]):
            got.append(await talk.receive())
        assert {head for head, _ in got} == {PONG}
        answers.set_result([payload for _, payload in got])

    async def wait(_: FeedConnection) -> None:
        await asyncio.wait_for(answers, HANG_SECONDS)

    async with Hostile(script) as server:
        await opened(server.url, ignore, wait)
    payloads = answers.result()
    assert payloads[:16] == [bytes([number]) for number in range(16)]
    assert payloads[16:] == sorted(payloads[16:])


@pytest.mark.parametrize("ping", [frame(PING, b"p" * 125), frame(PING), frame(PING, b"p" * 125) + frame(PONG)])
async def test_a_server_that_floods_pings_and_never_reads(ping: bytes) -> None:
    """The output queue stays small; when the server reads again, pings are answered and the connection lives."""
    received: list[bytes] = []
    flooded, reads = asyncio.Event(), asyncio.Event()

    async def script(talk: Talk) -> None:
        await talk.welcome()
        for _ in range(20):
            await talk.send(ping * 1000)
        await talk.send(frame(TEXT, b"after the flood"))
        flooded.set()
        await reads.wait()
        await talk.send(frame(PING, b"newest"))
        while await talk.receive() != (PONG, b"newest"):
            pass
        await talk.send(frame(TEXT, b"answered"))
        await wait_until_cancelled()

    async def watch(connection: FeedConnection) -> None:
        keep_little(connection)
        most = 0
        async with asyncio.timeout(HANG_SECONDS):
            while not received or received[-1] != b"answered":
                await asyncio.sleep(0.001)
                most = max(most, connection.transport.get_write_buffer_size())
                if flooded.is_set() and received[1:]:
                    reads.set()
        assert most < MAX_QUEUED_BYTES

    async with Hostile(script) as server:
        await opened(server.url, lambda payloads, _: received.extend(payloads), watch)
    assert received[1:] == [b"after the flood", b"answered"]


async def test_a_server_that_never_reads_does_not_block_the_daemon() -> None:
    """An unanswered ping ends the session, and an unread close frame does not delay it."""
    stuffed = asyncio.Event()

    async def script(talk: Talk) -> None:
        await talk.welcome()
        while True:
            await talk.send(frame(PING, b"p" * 125) * 100)
            stuffed.set()

    async def wait(connection: FeedConnection) -> None:
        keep_little(connection)
        while not connection.paused:
            await asyncio.sleep(0)
        await keep_alive(
            connection, interval=0.1, timeout=0.2, clock=SystemClock(), now=lambda: 0, on_pong=lambda _: None
        )

    async with Hostile(script) as server, asyncio.timeout(HANG_SECONDS):
        with pytest.raises(StreamError) as caught:
            await opened(server.url, ignore, wait)
    assert caught.value.reason is EndReason.KEEPALIVE


BOMB = deflated(bytes(50 * 2**20))
TOO_BIG = {
    "fragments": (False, [frame(FIRST, b"x")] + [frame(MORE, b"x" * 60_000)] * 40),
    "one frame": (False, [frame(TEXT, b"x" * 10, size=2**62)]),
    "a binary one": (False, [frame(BINARY, b"x" * 10, size=2**21)]),
    "deflated": (True, [frame(DEFLATED, BOMB)]),
    "deflated in fragments": (True, [frame(FIRST_DEFLATED, BOMB[:20_000]), frame(MORE, BOMB[20_000:])]),
    "deflated after a full message": (True, [frame(FIRST, b"x" * 2**20), frame(MORE), frame(LAST, b"x")]),
}


@pytest.mark.parametrize("what", TOO_BIG)
async def test_an_endless_message(what: str) -> None:
    """A message over the size limit ends the session and is never held in memory."""
    deflate, frames = TOO_BIG[what]

    async def script(talk: Talk) -> None:
        await talk.welcome(deflate=deflate)
        await talk.send(*frames)
        await wait_until_cancelled()

    async with Hostile(script) as server, asyncio.timeout(HANG_SECONDS):
        tracemalloc.start()
        try:
            with pytest.raises(StreamError) as caught:
                await opened(server.url, ignore, closed)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert caught.value.reason is EndReason.MESSAGE_TOO_BIG
    assert peak < 20 * 2**20


async def test_empty_fragments() -> None:
    """A flood of empty fragments is one unfinished message: it takes no memory, and the connection stays open."""
    received: list[bytes] = []

    async def script(talk: Talk) -> None:
        await talk.welcome()
        await talk.send(frame(FIRST, b"{"))
        for _ in range(10):
            await talk.send(frame(MORE) * 10_000)
        await talk.send(frame(LAST, b"}"))
        await wait_until_cancelled()

    async def wait(connection: FeedConnection) -> None:
        while not received[1:]:
            await asyncio.sleep(0.001)
            assert len(connection._fragments) < 3

    async with Hostile(script) as server, asyncio.timeout(HANG_SECONDS):
        await opened(server.url, lambda payloads, _: received.extend(payloads), wait)
    assert received[1:] == [b"{}"]


@pytest.mark.parametrize("line", [b"X: y\r\n", b"X" * 100, b"\r\n" * 100])
async def test_an_endless_answer(monkeypatch: pytest.MonkeyPatch, line: bytes) -> None:
    """An endless header or line is no handshake; the attempt times out, and little is held."""
    monkeypatch.setattr(wire, "OPEN_TIMEOUT", 0.3)

    async def script(talk: Talk) -> None:
        await talk.send(b"HTTP/1.1 101 Switching Protocols\r\n")
        while True:
            await talk.send(line * 1000)

    async with Hostile(script) as server, asyncio.timeout(HANG_SECONDS):
        with pytest.raises((InvalidHandshake, TimeoutError)):
            await opened(server.url, ignore, closed)


async def test_messages_before_the_handler_is_attached() -> None:
    """Messages after the handshake's answer are kept in order until a handler is attached: a few reads at most."""
    received: list[bytes] = []

    async def script(talk: Talk) -> None:
        await talk.shake_hands()
        number = 0
        while True:
            await talk.send(*(frame(TEXT, b"%d" % each) for each in range(number, number + 1000)))
            number += 1000

    async with Hostile(script) as server, asyncio.timeout(HANG_SECONDS), open_connection(server.url) as connection:
        early = sum(len(payloads) for payloads, _ in connection._early)
        assert early < 2**20
        connection.attach(lambda payloads, _: received.extend(payloads))
        while len(received) < early + 1000:
            await asyncio.sleep(0.001)
    assert [int(each) for each in received] == list(range(len(received)))


async def test_messages_without_end_instead_of_an_answer_to_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages before the answer to the token do not extend the wait for it."""
    monkeypatch.setattr(reader, "AUTHENTICATION_TIMEOUT", 0.3)

    async def script(talk: Talk) -> None:
        await talk.shake_hands()
        while True:
            await talk.send(frame(TEXT, b'{"type":"hello"}') * 10)
            await asyncio.sleep(0.01)

    telemetry = Telemetry()
    async with Hostile(script) as server, asyncio.timeout(HANG_SECONDS):
        configuration = daemon_settings(server.url, "postgresql://none@localhost/nothing")
        buffer = Buffer(memory_max_bytes=2**24, clock=SystemClock(), telemetry=telemetry)
        calendar = load_calendar("always", "Pacific/Auckland")
        task = asyncio.create_task(
            reader.StreamReader(
                configuration, buffer=buffer, calendar=calendar, clock=SystemClock(), telemetry=telemetry
            ).run()
        )
        while telemetry.counts.ends[EndReason.AUTHENTICATION_TIMEOUT] < 2:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await buffer.close()
    assert not telemetry.counts.ends.keys() - {EndReason.AUTHENTICATION_TIMEOUT, EndReason.STOPPED}


async def test_heartbeats_instead_of_prices(writer_url: str, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages other than ticks do not keep a mute stream ready: it stalls, and coverage ends with its last tick."""
    monkeypatch.setattr(rejections, "MIN_SPAN", SECOND // 10)

    async def script(talk: Talk) -> None:
        await talk.welcome()
        await talk.send(frame(TEXT, PRICE))
        answering = asyncio.create_task(talk.answer_pings(10**6))
        try:
            while True:
                await talk.send(frame(TEXT, b'{"type":"heartbeat"}'), frame(BINARY, b"x"), frame(TEXT), frame(PING))
                await talk.send(frame(TEXT, PRICE.replace(b"2.61", b'"NaN"')), frame(PONG))
                await asyncio.sleep(0.02)
        finally:
            answering.cancel()

    async with (
        Hostile(script) as server,
        running(daemon_settings(server.url, writer_url, stall_timeout="400ms")) as daemon,
    ):
        async with asyncio.timeout(HANG_SECONDS):
            while not any("messages were rejected" in each.detail for each in daemon.telemetry.readiness.problems):
                await asyncio.sleep(0.01)
        await until(database, "SELECT count(*) >= 1 FROM ingest.stream_sessions WHERE end_reason = 'stall'", True)
    rows = await query(
        database,
        "SELECT s.last_message_at > s.last_tick_at, s.covered_until > s.last_tick_at, upper(c.span) = s.last_tick_at "
        "FROM ingest.stream_sessions s JOIN ingest.covered c USING (id) WHERE s.end_reason = 'stall'",
    )
    assert set(rows) == {(True, True, True)}
