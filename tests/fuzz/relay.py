"""Hostile bytes at a relay's port get valid answers and a close, and a client that is live misses nothing.

They come before the handshake, after it with damaged options and logins, and after a login.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import quote, urlsplit

from ingestor.clock import to_datetime
from ingestor.relay import admission
from ingestor.relay.server import PortOptions
from ingestor.service.relay import Relay
from ingestor.store.ticks import TickStore
from tests.fuzz import page
from tests.fuzz.frames import CLOSE, CONT, FIN, PING, PONG, RSV1, TEXT, ending, frame
from tests.fuzz.target import Case, Counts, mutate
from tests.integration.test_store import T0, batcher, filled, tick
from tests.relays import Client, new_token, relaying, stored
from tests.servers import TestServer, plain_server

ANSWER_TIMEOUT = 20.0
PORT = PortOptions("127.0.0.1", 0, max_clients=100, client_buffer=65_536, authentication_timeout=2.0)
KINDS = {"authenticated", "error", "price", "gap", "lagging"}
START = to_datetime(T0).isoformat()

_OPTIONS = {
    "from": (START, "2026-03-02T13:00:00", "2999-01-01T00:00:00Z", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59Z"),
    "to": (START, "2026-03-03T00:00:00Z", "2026-13-45T25:61:61Z", ""),
    "symbols": ("S1,S2", "Ω,A", ",", "x" * 40, "%ff", ",".join(f"S{number}" for number in range(1100)), "\0"),
    "speed": ("max", "1", "60", "0", "-1", "1e9", "nan", "999999.999999", "²"),
    "gaps": ("0", "1", "yes"),
    "meta": ("0", "1", "١"),
    "compress": ("0", "1", "2"),
    "resume": ("00000000.1.0", "0.0.0", "00000000.1.0.0.W10", "00000000.1e9.0", "00000000.1.0.0.WzEsMSwxLDEsMV0"),
    "form": ("x",),
}  # fmt: skip

_EXTENSIONS = (
    "permessage-deflate", "permessage-deflate; client_max_window_bits", "permessage-deflate; server_max_window_bits=8",
    "permessage-deflate; server_max_window_bits=12; server_no_context_takeover", "permessage-deflate; x=1", "x, y; z",
    "permessage-deflate, permessage-deflate", "permessage-deflate; server_max_window_bits=99", ";;",
)  # fmt: skip


def _query(chance: random.Random, cursors: list[str]) -> bytes:
    """Draw options, which may be unknown, wrong, doubled, damaged or not encoded."""
    parts = []
    for name in chance.choices(list(_OPTIONS), k=chance.choice((0, 1, 1, 2, 4))):
        value = chance.choice((*_OPTIONS[name], *(cursors if name == "resume" else ())))
        parts.append(f"{name}={quote(value, safe='%') if chance.random() < 0.9 else value}")
    query = "&".join(parts).encode()
    if query and chance.random() < 0.3:
        query = mutate(query, chance)
    return b"?" + query.translate(None, b" \r\n\0") if query else b""


def _handshake(chance: random.Random, cursors: list[str]) -> bytes:
    path = chance.choice((b"/ws",) * 20 + (b"/", b"//[/ws", b"/ws/", b"/\xff", b"ws"))
    extensions = f"Sec-WebSocket-Extensions: {chance.choice(_EXTENSIONS)}\r\n" if chance.random() < 0.4 else ""
    head = (
        "Host: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{extensions}\r\n"
    )
    request = b"GET " + path + _query(chance, cursors) + b" HTTP/1.1\r\n" + head.encode()
    return mutate(request, chance) if chance.random() < 0.1 else request


def _frame(chance: random.Random, login: bytes) -> bytes:
    """Draw one frame, or bytes in place of one."""
    some = chance.randbytes(chance.choice((0, 5, 200, 5000)))
    text = chance.choice((mutate(login, chance), b'{"type": "ping"}', b"[" * 900, b"{}", b"\xff", b"x" * 5000))
    return chance.choice(
        (
            frame(FIN | TEXT, text, mask=True),
            frame(FIN | TEXT, text, mask=True),
            frame(FIN | TEXT, login),
            frame(FIN | PING, some[:125], mask=True) * chance.choice((1, 1, 500)),
            frame(FIN | PONG, some[:125], mask=True),
            frame(TEXT, text, mask=True) + frame(FIN | PING, b"", mask=True) + frame(CONT, some, mask=True),
            frame(FIN | TEXT | RSV1, some, mask=True),
            frame(FIN | CLOSE, chance.choice((b"", b"\x03\xe8", b"\x03")), mask=True),
            ending(chance, deflates=chance.random() < 0.5).wire,
            some,
            bytes(70_000),
        )
    )


class _Reader:
    """Reads a server's bytes: an HTTP answer, then frames."""

    def __init__(self, data: bytes) -> None:
        self.status = int(data[9:12]) if data[9:12].isdigit() else 0
        assert self.status or not data, f"not an HTTP answer: {data!r:.200}"
        assert self.status < 500 or self.status == 503, f"the relay failed: {data!r:.300}"
        self.messages: list[dict[str, Any]] = []
        self._inflate = zlib.decompressobj(wbits=-15)
        if self.status == 101:
            self._read(data.partition(b"\r\n\r\n")[2])

    def _read(self, data: bytes) -> None:
        place = 0
        while len(data) - place >= 2:
            head, length = data[place : place + 2]
            size = {126: 2, 127: 8}.get(length, 0)
            begin = place + 2 + size
            length = int.from_bytes(data[place + 2 : begin], "big") if size else length
            payload = data[begin : begin + length]
            if begin + length > len(data):
                return  # cut off by an abort
            place = begin + length
            assert head & ~RSV1 in {FIN | TEXT, FIN | CLOSE, FIN | PING, FIN | PONG}, f"a frame begins with {head:#x}"
            if head & 0x0F == TEXT:
                self._add(self._inflate.decompress(payload + b"\0\0\xff\xff") if head & RSV1 else payload)

    def _add(self, text: bytes) -> None:
        message = json.loads(text)
        assert message["type"] in KINDS, f"a message of the type {message['type']!r}"
        if message["type"] == "error":
            assert message["data"]["message"], "an error without a text"
        self.messages.append(message)


class _Bench:
    """A relay with some recorded ticks, a token, and a client that is live."""

    def __init__(self, relay: Relay, token: str, store: TickStore, owner_url: str, witness: Client) -> None:
        self._relay, self._token, self._store, self._url, self._witness = relay, token, store, owner_url, witness
        self._written = 0

    async def case(self, chance: random.Random) -> Counts:
        cursors = [price["cursor"] for price in self._witness.prices[-20:]]
        outcomes = await asyncio.gather(*(self._attack(chance, cursors) for _ in range(chance.choice((1, 5, 20)))))
        await self._write()
        assert self._relay.telemetry.counts.failed == 0, "a defect of the relay ended a stream"
        return sum(outcomes, Counter(cases=0))

    async def _write(self) -> None:
        self._written += 1
        await self._store.write([filled(batcher(), tick(f"N{self._written}"))])
        try:
            await self._witness.until(lambda client: client.prices[-1]["symbol"] == f"N{self._written}", ANSWER_TIMEOUT)
        except TimeoutError:
            raise AssertionError("a live client misses a tick") from None

    async def check(self) -> None:
        """Check that the live client has each tick exactly once."""
        assert self._witness.seen == await stored(self._url)

    async def _attack(self, chance: random.Random, cursors: list[str]) -> Counts:
        login = json.dumps({"type": "authenticate", "data": {"token": self._token}}).encode()
        draw = chance.random()
        first = page.draw(chance)
        later: list[bytes] = []
        if draw > 0.2:
            first = _handshake(chance, cursors)
            later = [_frame(chance, login) for _ in range(chance.choice((0, 1, 3)))]
            if draw > 0.5:
                later = [frame(FIN | TEXT, login, mask=True), *later]
        reader = _Reader(await self._exchange(first, later, chance.choice((0.0, 0.1, 0.3))))
        kinds = {message["type"] for message in reader.messages}
        assert login in b"".join(later) or not kinds & {"authenticated", "price", "gap"}, (
            "a client was admitted without a token"
        )
        self._check_prices([message["data"] for message in reader.messages if message["type"] == "price"])
        return Counter(connections=1, messages=len(reader.messages), admitted=int("authenticated" in kinds))

    def _check_prices(self, prices: list[dict[str, Any]]) -> None:
        """Check that no tick came twice: each has a symbol of its own."""
        (most,) = Counter(price["symbol"] for price in prices).most_common(1) or [("", 0)]
        assert most[1] <= 1, f"a tick came {most[1]} times"

    async def _exchange(self, first: bytes, later: Sequence[bytes], pause: float) -> bytes:
        """Send bytes, after an answer more with pauses, and our end; return what comes back until the relay's end."""
        parts = urlsplit(self._relay.server.url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        answer = bytearray()
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                with contextlib.suppress(OSError):
                    writer.write(first)
                    answer += await _head(reader) if later else b""
                    for each in later:
                        writer.write(each)
                        answer += await _read(reader, pause)
                    writer.write_eof()
                    answer += await _read(reader, None)
        except TimeoutError:
            raise AssertionError(f"{first!r:.300} {later!r:.300} is not closed within {ANSWER_TIMEOUT:g} s") from None
        finally:
            writer.transport.abort()
        assert self._token.encode() not in answer, "the token is in an answer"
        return bytes(answer)


async def _read(reader: asyncio.StreamReader, seconds: float | None) -> bytes:
    """Return what comes within a time, or until the end."""
    found = bytearray()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while data := await reader.read(2**16):
                found += data
    return bytes(found)


async def _head(reader: asyncio.StreamReader) -> bytes:
    """Return the head of an HTTP answer, or what there is until the end."""
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as end:
        return end.partial


@asynccontextmanager
async def on_database(writer_url: str, owner_url: str) -> AsyncIterator[Case]:
    """Test a relay on a database. Wrong tokens are answered without delay."""
    store = TickStore(writer_url, write_timeout=20)
    await store.write([filled(batcher(), *(tick(f"S{number}") for number in range(200)))])
    token = await new_token(owner_url, max_streams=100)
    with patch.object(admission, "MAX_DELAY_SECONDS", 0.0):
        async with (
            relaying(owner_url, port=PORT) as relay,
            Client(relay.server.url, token, **{"from": START, "meta": "1"}) as witness,
        ):
            await witness.received(200)
            bench = _Bench(relay, token, store, owner_url, witness)
            yield bench.case
            await bench.check()
    await store.close()


@asynccontextmanager
async def target(directory: Path) -> AsyncIterator[Case]:
    """Start a server with a migrated database."""
    with plain_server() as url:
        server = TestServer(url, "plain")
        await server.prepare()
        name = server.new_name()
        owner_url = await server.create(name, server.template)
        try:
            async with on_database(server.writer_url(owner_url), owner_url) as case:
                yield case
        finally:
            await server.drop(name)
            await server.close()
