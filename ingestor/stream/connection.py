"""One WebSocket connection to the feed: opened without redirects, read frame by frame, kept alive by pings."""

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
from ingestor.dial import MAX_ADDRESSES, STAGGER, addresses_of, first_that_works
from ingestor.errors import StreamError, UnreachableError
from ingestor.model import EndReason, Micros
from ingestor.network import proxy_for, tls_context
from ingestor.redaction import outside_text, system_words
from ingestor.stream.decoder import MAX_MESSAGE_BYTES
from ingestor.stream.frames import frame_size, is_control, newest_pings, other_frames, whole_texts

OPEN_TIMEOUT = 10.0
"""Seconds for DNS; and, for each address, seconds for TCP, TLS and the opening handshake together."""

LONGEST_OPEN = 2 * OPEN_TIMEOUT + MAX_ADDRESSES * STAGGER
"""Seconds after which the last address has failed."""

CLOSE_TIMEOUT = 1.0
"""Seconds for the closing handshake. A server that does not answer or does not read must not delay our stop."""

MAX_PONGS = 16
"""Pings of one read, or of a time in which the server did not read, that are answered; of more, only the newest."""

Handler = Callable[[Sequence[bytes], bool], None]
"""Accepts the payloads of messages in the order of the wire, and whether they came in binary frames."""

_HEADERS_END = b"\r\n\r\n"
_PONG = b"\x8a"  # the first byte of its frame
_RUN = 64  # frames given to the library at once: it makes an object of each before it delivers the first


class FeedConnection(ClientConnection):
    """Delivers messages as soon as they are read, in the order of the wire.

    The library's `recv` costs a queue and a task switch for each message, closes the connection on text that is not
    UTF-8, and can't tell a text frame from a binary one without decoding it. Here nothing waits between the socket and
    the batch, so when a pong resolves, every message before it has been handled.

    Plain text messages bypass the library, which would double the receiver's processor time
    (docs/explanation/performance.md). The library handles all else: control frames, fragments, compressed or large
    messages, a message that a read has cut, and broken frames.

    The server cannot make us hold more than one message and a few pongs. The library writes a pong for each ping, even
    if the server does not read. Here such a server is answered once it reads again, and only its newest pings are
    answered, as RFC 6455 allows (section 5.5.3).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._handler: Handler | None = None
        self._on_partial: Callable[[], None] = _ignore
        self._early: list[tuple[Sequence[bytes], bool]] = []
        self._fragments = bytearray()
        self._binary = False
        self._texts: list[bytes] = []  # read by the library, not delivered yet
        self._in_message = False  # between the first and the last fragment of a message
        self._handshake = b""  # the last bytes read before the headers of the handshake's answer were complete
        self._header = b""  # the start of a frame header that a read has cut
        self._frame_remaining = 0  # bytes that the library still needs of the frame it has begun
        self._frame_is_message = False  # whether that frame belongs to a message
        self._abort_timer: asyncio.TimerHandle | None = None  # aborts a finished connection that the server leaves open
        self._pongs: deque[bytes] = deque(maxlen=MAX_PONGS)  # frames not written yet

    def attach(self, handler: Handler, on_partial: Callable[[], None] | None = None) -> None:
        """Deliver all messages to `handler` from now on, first those that came with the handshake's answer.

        `on_partial` is called after each read that leaves a message incomplete, even if the message began in an
        earlier read. All messages before it have been delivered.
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
        """Deliver the plain messages of a read and give the rest to the library. Called by the event loop."""
        if self.protocol.state is State.CONNECTING:
            data = self._shake_hands(data)
        self._read(data)
        self._deliver_texts()
        self._send_pongs()
        if self._is_partial:
            self._on_partial()
        if self._abort_timer is None and self.protocol.state is not State.CONNECTING and self._is_over():
            # No more messages can come, so an open connection would only delay the next one.
            self._abort_timer = self.loop.call_later(CLOSE_TIMEOUT, self.transport.abort)

    def _read(self, data: bytes) -> None:
        data, self._header = self._header + data, b""
        start = 0
        while start < len(data):
            if self._is_over():
                self._feed(data[start:])
                return
            if self._frame_remaining:
                end = min(start + self._frame_remaining, len(data))
                self._frame_remaining -= end - start
            else:
                start = newest_pings(data, self._take_plain(data, start), MAX_PONGS)
                end = other_frames(data, start, _RUN)
                if end == start:
                    size = frame_size(data, start)
                    if size is None:
                        self._header = data[start:]
                        return
                    end = min(start + size, len(data))
                    self._frame_remaining, self._frame_is_message = start + size - end, not is_control(data, start)
            self._feed(data[start:end])
            start = end

    def _take_plain(self, data: bytes, start: int) -> int:
        """Deliver the plain messages from `start` on, and return where something else begins."""
        if self._in_message:
            return start
        payloads, end = whole_texts(data, start)
        if payloads:
            self._deliver_texts()  # in the order of the wire
            self._deliver(payloads)
        return end

    @property
    def _is_partial(self) -> bool:
        """Whether a message is incomplete: within a frame, or between its fragments."""
        if self._in_message:
            return True
        return not is_control(self._header) if self._header else self._frame_remaining > 0 and self._frame_is_message

    def eof_received(self) -> None:
        """Give the library the incomplete header as well. Called by the event loop."""
        if self._header:
            self._give(self._header)
        super().eof_received()

    def send_data(self) -> None:
        """Write pending data, but keep pongs until the whole read has been handled. Called by the library."""
        others: list[bytes] = []
        for data in self.protocol.data_to_send():
            (self._pongs if data.startswith(_PONG) else others).append(data)
        if others:
            self._send_pongs()
            self.protocol.writes = others
            super().send_data()

    def resume_writing(self) -> None:
        """Send the pongs kept while the server did not read. Called by the event loop."""
        super().resume_writing()
        self._send_pongs()

    def _send_pongs(self) -> None:
        if self._handler is None:  # a pong means that the messages before its ping were handled
            return
        if self._pongs and not self.paused and self.protocol.state is not State.CLOSED:
            self.transport.write(b"".join(self._pongs))
            self._pongs.clear()

    def process_event(self, event: Any) -> None:
        """Handle one frame. The library calls it for each frame in order, within `data_received`."""
        if not isinstance(event, Frame) or event.opcode not in {Opcode.TEXT, Opcode.BINARY, Opcode.CONT}:
            super().process_event(event)
            return
        if event.opcode is not Opcode.CONT:
            self._binary = event.opcode is Opcode.BINARY
            if event.fin:
                self._receive(bytes(event.data))
                return
        self._fragments += event.data
        self._in_message = not event.fin
        if event.fin:
            payload, self._fragments = bytes(self._fragments), bytearray()
            self._receive(payload)

    def _receive(self, payload: bytes) -> None:
        if not self._binary:
            self._texts.append(payload)
            return
        self._deliver_texts()  # in the order of the wire
        self._deliver([payload], binary=True)

    def _shake_hands(self, data: bytes) -> bytes:
        """Give the handshake's answer to the library, and return the bytes after it."""
        seen = self._handshake + data
        found = seen.find(_HEADERS_END)
        end = len(data) if found < 0 else found + len(_HEADERS_END) - len(self._handshake)
        self._handshake = seen[1 - len(_HEADERS_END) :]
        self._feed(data[:end])
        return data[end:]

    def _give(self, data: bytes) -> None:
        """Let the library read the data, and deliver all text messages found in it together."""
        self._feed(data)
        self._deliver_texts()
        self._send_pongs()

    def _feed(self, data: bytes) -> None:
        super().data_received(data)

    def _deliver_texts(self) -> None:
        if self._texts:
            texts, self._texts = self._texts, []
            self._deliver(texts)

    def _is_over(self) -> bool:
        """Return whether the library has stopped reading frames: closed, protocol error, or no handshake yet."""
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
    """`connect` without redirects: our first message is the token, and only the endpoint may receive it."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


@contextlib.asynccontextmanager
async def open_connection(url: str) -> AsyncIterator[FeedConnection]:
    """Open a connection, and close it at the end.

    Raises the errors of the library and the operating system, and ConfigurationError for an invalid proxy;
    `ingestor.stream.retry` classifies them.
    """
    proxy = proxy_for(url)
    name, port = _first_hop(url, proxy)
    try:
        async with asyncio.timeout(OPEN_TIMEOUT):
            addresses = await addresses_of(name, port)
    except socket.gaierror as error:
        raise _as_proxy_error(proxy, error) from None
    try:
        connection = await first_that_works(addresses, partial(_open, url, proxy), discard=_close)
    except ExceptionGroup as group:
        raise _as_proxy_error(proxy, _most_specific(name, addresses, group.exceptions)) from None
    try:
        yield connection
    finally:
        await _close(connection)


def _first_hop(url: str, proxy: str | None) -> tuple[str, int]:
    """Return the name and the port to connect to: those of the proxy, if there is one."""
    parts = urlsplit(proxy or url)
    default = {"ws": 80, "http": 80, "wss": 443, "https": 443}.get(parts.scheme, 1080)
    return parts.hostname or "", parts.port or default


async def _open(url: str, proxy: str | None, address: str) -> FeedConnection:
    """Connect to one address of the server or proxy. Certificates are verified against the name."""
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
        # `keep_alive` sends the pings, because it must know when each was sent.
        ping_interval=None,
        max_size=MAX_MESSAGE_BYTES,
        user_agent_header=f"ingestor/{__version__}",
        proxy=proxy,
        ssl=tls_context() if url.startswith("wss:") else None,
        **options,
    )
    assert isinstance(connection, FeedConnection)
    return connection


def _as_proxy_error(proxy: str | None, error: Exception) -> Exception:
    """Return the error, as a ProxyError if the proxy is unreachable."""
    if proxy is None or not isinstance(error, ConnectionError | socket.gaierror | UnreachableError):
        return error
    why = error.message if isinstance(error, UnreachableError) else system_words(error)
    return ProxyError(f"it cannot be reached: {why}")


def _most_specific(name: str, addresses: Sequence[str], errors: Sequence[Exception]) -> Exception:
    """Return the error of a server that answered; if none did, an error that names the addresses."""
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
    """Close a connection. The library alone would wait without end if the server does not read."""
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT):
            await connection.close()
    except TimeoutError:
        connection.transport.abort()
        await connection.wait_closed()


async def send(connection: FeedConnection, message: bytes) -> None:
    """Send one text message. Raises StreamError if the connection is closed."""
    try:
        await connection.send(message, text=True)
    except ConnectionClosed:
        raise closing_error(connection) from None


async def closed(connection: FeedConnection) -> None:
    """Wait until the connection is closed, then raise a StreamError with the cause."""
    await connection.wait_closed()
    raise closing_error(connection)


def closing_error(connection: FeedConnection) -> StreamError:
    """Return the error that says why a connection was closed."""
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
    """Send a ping every `interval` seconds. Raises StreamError if a pong takes longer than `timeout` seconds.

    `on_pong` gets the instant at which the answered ping was *sent*: the server was alive then, and every message that
    it had sent before has been handled.
    """
    while True:
        sent_at = now()
        try:
            async with asyncio.timeout(timeout):
                await (await connection.ping())
        except TimeoutError:
            if connection.protocol.close_sent is not None:  # after a protocol error the server's pongs are not read
                raise closing_error(connection) from None
            raise StreamError(f"A ping was not answered within {timeout:g} s.", reason=EndReason.KEEPALIVE) from None
        except ConnectionClosed:
            raise closing_error(connection) from None
        on_pong(sent_at)
        await clock.sleep(interval)
