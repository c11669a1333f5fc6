"""One WebSocket connection to the feed: opened without redirects, read by frame, kept alive by pings."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, ProxyError
from websockets.frames import CloseCode, Frame, Opcode
from websockets.protocol import State

from ingestor import __version__
from ingestor.clock import Clock
from ingestor.dial import MOST, STAGGER, addresses_of, first_that_works
from ingestor.errors import StreamError, UnreachableError
from ingestor.model import EndReason, Micros
from ingestor.network import proxy_for, tls_context
from ingestor.redaction import outside_text, system_words
from ingestor.stream.decoder import MAX_MESSAGE_BYTES
from ingestor.stream.frames import frame_size, is_control, newest_pings, other_frames, whole_texts

OPEN_TIMEOUT = 10.0
"""Seconds for DNS, and for TCP, TLS and the opening handshake together with each address."""

LONGEST_OPEN = 2 * OPEN_TIMEOUT + MOST * STAGGER
"""Seconds after which the last address was given up."""

CLOSE_TIMEOUT = 1.0
"""Seconds for the closing handshake: a provider that does not answer, or not even read, must not hold up our stop."""

MAX_PONGS = 16
"""Pings that came in one read, or while the server did not read, of which each is answered; of more, the newest."""

Handler = Callable[[Sequence[bytes], bool], None]
"""Takes the payloads of messages in the order of the wire, and whether they came in binary frames."""

_HEADERS_END = b"\r\n\r\n"
_PONG = b"\x8a"  # the first byte of its frame
_RUN = 64  # frames that the library is given at once: it makes objects of all of them before it hands on the first


class FeedConnection(ClientConnection):
    """Hands messages on the moment they are read, in the order of the wire.

    The library's own way, `recv`, is a queue and a task switch for each message; it closes the connection on
    text that is not UTF-8, and it can't tell a text frame from a binary one without decoding it. Here nothing
    waits between the socket and the batch, so when a pong resolves, every message before it has been handled.

    Plain text messages do not even pass through the library, whose way costs as much for a frame as all the rest that
    we do for the tick in it: the receiver would take twice the processor time (docs/explanation/performance.md).
    Whatever is not plain (control frames, fragments, compressed or large messages, one that a read has cut, a broken
    frame) goes the library's way.

    Nothing that the server does makes us hold more than a message and a few pongs. The library writes a pong for each
    ping, read or not; here a server that does not read is answered once it does, and only its newest pings, as RFC 6455
    allows (section 5.5.3).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._handler: Handler | None = None
        self._on_partial: Callable[[], None] = _ignore
        self._early: list[tuple[Sequence[bytes], bool]] = []
        self._fragments = bytearray()
        self._binary = False
        self._texts: list[bytes] = []  # that the library has read, and nobody was given yet
        self._in_message = False  # between the first and the last fragment of one
        self._handshake = b""  # the end of what was read before the answer's headers were whole
        self._header = b""  # of a frame, where a read has cut it
        self._owed = 0  # bytes of a frame that the library has begun to read
        self._owes_message = False  # whether that is a frame of a message
        self._ends: asyncio.TimerHandle | None = None  # when the server has so far not closed what is over
        self._pongs: deque[bytes] = deque(maxlen=MAX_PONGS)  # frames that are not written yet

    def attach(self, handler: Handler, on_partial: Callable[[], None] | None = None) -> None:
        """Hand all messages to `handler` from now on, first those that came with the handshake's answer.

        `on_partial` is called after each read that leaves a message unfinished, whether it began in that read or
        earlier. All messages before it have been handed on.
        """
        self._handler = handler
        self._on_partial = on_partial or _ignore
        for payloads, binary in self._early:
            handler(payloads, binary)
        self._early.clear()
        if self._is_partial:
            self._on_partial()
        self._send_pongs()

    def data_received(self, data: bytes) -> None:
        """Take what was read: plain messages out of it, and the rest to the library. Called by the event loop."""
        if self.protocol.state is State.CONNECTING:
            data = self._shake_hands(data)
        self._read(data)
        self._hand_on()
        self._send_pongs()
        if self._is_partial:
            self._on_partial()
        if self._ends is None and self.protocol.state is not State.CONNECTING and self._is_over():
            # No more messages can come, so a server that leaves it open would only keep us from the next connection.
            self._ends = self.loop.call_later(CLOSE_TIMEOUT, self.transport.abort)

    def _read(self, data: bytes) -> None:
        data, self._header = self._header + data, b""
        start = 0
        while start < len(data):
            if self._is_over():
                self._feed(data[start:])
                return
            if self._owed:
                end = min(start + self._owed, len(data))
                self._owed -= end - start
            else:
                start = newest_pings(data, self._take_plain(data, start), MAX_PONGS)
                end = other_frames(data, start, _RUN)
                if end == start:
                    size = frame_size(data, start)
                    if size is None:
                        self._header = data[start:]
                        return
                    end = min(start + size, len(data))
                    self._owed, self._owes_message = start + size - end, not is_control(data, start)
            self._feed(data[start:end])
            start = end

    def _take_plain(self, data: bytes, start: int) -> int:
        """Hand on the plain messages from `start` on, and return where something else begins."""
        if self._in_message:
            return start
        payloads, end = whole_texts(data, start)
        if payloads:
            self._hand_on()  # in the order of the wire
            self._deliver(payloads)
        return end

    @property
    def _is_partial(self) -> bool:
        """Whether a message has begun whose end was not read yet: within a frame, or between its fragments."""
        if self._in_message:
            return True
        return not is_control(self._header) if self._header else self._owed > 0 and self._owes_message

    def eof_received(self) -> None:
        """Let the library know of what was never finished, too. Called by the event loop."""
        if self._header:
            self._give(self._header)
        super().eof_received()

    def send_data(self) -> None:
        """Write what waits, and put pongs aside until all of a read was handled. Called by the library."""
        others: list[bytes] = []
        for data in self.protocol.data_to_send():
            (self._pongs if data.startswith(_PONG) else others).append(data)
        if others:
            self._send_pongs()
            self.protocol.writes = others
            super().send_data()

    def resume_writing(self) -> None:
        """Answer what was put aside while the server did not read. Called by the event loop."""
        super().resume_writing()
        self._send_pongs()

    def _send_pongs(self) -> None:
        if self._handler is None:  # a pong says that the messages before its ping were handled
            return
        if self._pongs and not self.paused and self.protocol.state is not State.CLOSED:
            self.transport.write(b"".join(self._pongs))
            self._pongs.clear()

    def process_event(self, event: Any) -> None:
        """Handle one frame that the library has read. Called by it for each, in order, within `data_received`."""
        if not isinstance(event, Frame) or event.opcode not in {Opcode.TEXT, Opcode.BINARY, Opcode.CONT}:
            super().process_event(event)
            return
        if event.opcode is not Opcode.CONT:
            self._binary = event.opcode is Opcode.BINARY
            if event.fin:
                self._heard(bytes(event.data))
                return
        self._fragments += event.data
        self._in_message = not event.fin
        if event.fin:
            payload, self._fragments = bytes(self._fragments), bytearray()
            self._heard(payload)

    def _heard(self, payload: bytes) -> None:
        if not self._binary:
            self._texts.append(payload)
            return
        self._hand_on()  # in the order of the wire
        self._deliver([payload], binary=True)

    def _shake_hands(self, data: bytes) -> bytes:
        """Give the handshake's answer to the library, and return what came behind it."""
        seen = self._handshake + data
        found = seen.find(_HEADERS_END)
        end = len(data) if found < 0 else found + len(_HEADERS_END) - len(self._handshake)
        self._handshake = seen[1 - len(_HEADERS_END) :]
        self._feed(data[:end])
        return data[end:]

    def _give(self, data: bytes) -> None:
        """Let the library read all of it, and hand on the text messages that it finds, as many at once as there are."""
        self._feed(data)
        self._hand_on()
        self._send_pongs()

    def _feed(self, data: bytes) -> None:
        super().data_received(data)

    def _hand_on(self) -> None:
        if self._texts:
            texts, self._texts = self._texts, []
            self._deliver(texts)

    def _is_over(self) -> bool:
        """Whether the library reads no frames any more: the server closed, broke the protocol, or never spoke it."""
        protocol = self.protocol
        return protocol.state is State.CONNECTING or protocol.close_rcvd is not None or protocol.parser_exc is not None

    def _deliver(self, payloads: Sequence[bytes], binary: bool = False) -> None:
        if self._handler is None:
            self._early.append((payloads, binary))
        else:
            self._handler(payloads, binary)


def _ignore() -> None:
    pass


class _Connect(connect):
    """`connect` that follows no redirect: our first message is the token, and only the endpoint gets it."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


@contextlib.asynccontextmanager
async def open_connection(url: str) -> AsyncIterator[FeedConnection]:
    """Open a connection and close it at the end, at once if it was cut.

    Raises what the library and the operating system raise, and ConfigurationError for a proxy that can't be one;
    `ingestor.stream.retry` knows them.
    """
    proxy = proxy_for(url)
    name, port = _first_stop(url, proxy)
    try:
        async with asyncio.timeout(OPEN_TIMEOUT):
            addresses = await addresses_of(name, port)
    except socket.gaierror as error:
        raise _of_proxy(proxy, error) from None
    try:
        connection = await first_that_works(addresses, partial(_open, url, proxy), discard=_close)
    except ExceptionGroup as group:
        raise _of_proxy(proxy, _most_telling(name, addresses, group.exceptions)) from None
    try:
        yield connection
    finally:
        await _close(connection)


def _first_stop(url: str, proxy: str | None) -> tuple[str, int]:
    """Return the name and the port that are connected to: those of the proxy, if there is one."""
    parts = urlsplit(proxy or url)
    default = {"ws": 80, "http": 80, "wss": 443, "https": 443}.get(parts.scheme, 1080)
    return parts.hostname or "", parts.port or default


async def _open(url: str, proxy: str | None, address: str) -> FeedConnection:
    """Open a connection by one address of the server, or of the proxy; certificates are checked for the name."""
    options: dict[str, Any] = {}
    if proxy is None:
        options["host"] = address
    else:
        parts = urlsplit(proxy)
        userinfo, at, _ = parts.netloc.rpartition("@")
        place = f"[{address}]" if ":" in address else address
        port = f":{parts.port}" if parts.port else ""
        proxy = urlunsplit(parts._replace(netloc=f"{userinfo}{at}{place}{port}"))
        if parts.scheme == "https":
            options |= {"proxy_server_hostname": parts.hostname, "proxy_ssl": tls_context()}
    connection = await _Connect(
        url,
        create_connection=FeedConnection,
        open_timeout=OPEN_TIMEOUT,
        close_timeout=CLOSE_TIMEOUT,
        ping_interval=None,  # `keep_alive` does it, because it must know when each ping was sent
        max_size=MAX_MESSAGE_BYTES,
        user_agent_header=f"ingestor/{__version__}",
        proxy=proxy,
        ssl=tls_context() if url.startswith("wss:") else None,
        **options,
    )
    assert isinstance(connection, FeedConnection)
    return connection


def _of_proxy(proxy: str | None, error: Exception) -> Exception:
    """Return the error, as one of the proxy if it is the proxy that can't be reached."""
    if proxy is None or not isinstance(error, ConnectionError | socket.gaierror | UnreachableError):
        return error
    why = error.message if isinstance(error, UnreachableError) else system_words(error)
    return ProxyError(f"it cannot be reached: {why}")


def _most_telling(name: str, addresses: Sequence[str], errors: Sequence[Exception]) -> Exception:
    """Return the error of a server that answered; where none did, one that names the addresses."""
    answered = [each for each in errors if not isinstance(each, OSError) or isinstance(each, ssl.SSLError)]
    if answered or len(errors) == 1:
        return [*answered, *errors][0]
    each = "; ".join(
        f"{address} {system_words(error)}"
        for address, error in zip(addresses, errors, strict=True)
        if isinstance(error, OSError)
    )
    return UnreachableError(f"none of the {len(addresses)} addresses of {outside_text(name)} can be reached: {each}")


async def _close(connection: FeedConnection) -> None:
    """Close a connection. The library would wait for ever for one to whose writes the server pays no attention."""
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT):
            await connection.close()
    except TimeoutError:
        connection.transport.abort()
        await connection.wait_closed()


async def send(connection: FeedConnection, message: bytes) -> None:
    """Send one text message. Raises StreamError where the connection is closed already."""
    try:
        await connection.send(message, text=True)
    except ConnectionClosed:
        raise closing_error(connection) from None


async def closed(connection: FeedConnection) -> None:
    """Wait until the connection is closed, then raise a StreamError that says by whom and why."""
    await connection.wait_closed()
    raise closing_error(connection)


def closing_error(connection: FeedConnection) -> StreamError:
    """Return why a closed connection was closed."""
    sent, received = connection.protocol.close_sent, connection.protocol.close_rcvd
    if sent is not None and not connection.protocol.close_rcvd_then_sent:
        if sent.code == CloseCode.MESSAGE_TOO_BIG:
            return StreamError(
                f"The server sent a message over {MAX_MESSAGE_BYTES} bytes.",
                reason=EndReason.MESSAGE_TOO_BIG,
                close_code=sent.code,
            )
        if sent.code in {CloseCode.PROTOCOL_ERROR, CloseCode.INVALID_DATA}:
            return StreamError(
                f"The server broke the WebSocket protocol: {outside_text(sent.reason) or 'no reason given'}.",
                reason=EndReason.PROTOCOL_ERROR,
                close_code=sent.code,
            )
    if received is not None:
        text = f"The server closed the connection with code {received.code}."
        return StreamError(text, reason=EndReason.CLOSED, close_code=received.code)
    return StreamError("The connection was cut.", reason=EndReason.CLOSED)


async def keep_alive(
    connection: FeedConnection,
    *,
    interval: float,
    timeout: float,
    clock: Clock,
    now: Callable[[], Micros],
    on_pong: Callable[[Micros], None],
) -> None:
    """Send a ping every `interval` seconds; raise StreamError when a pong takes longer than `timeout`.

    `on_pong` gets the moment at which the answered ping was *sent*: that the server lived then is proved, and
    what it had sent until then has been handled.
    """
    while True:
        sent_at = now()
        try:
            async with asyncio.timeout(timeout):
                await (await connection.ping())
        except TimeoutError:
            if connection.protocol.close_sent is not None:  # no ping is answered after a broken protocol
                raise closing_error(connection) from None
            raise StreamError(f"A ping was not answered within {timeout:g} s.", reason=EndReason.KEEPALIVE) from None
        except ConnectionClosed:
            raise closing_error(connection) from None
        on_pong(sent_at)
        await clock.sleep(interval)
