"""The relay's port: the login of a client, its options, and its stream until it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, cast

from websockets.asyncio.server import Server, ServerConnection
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from ingestor.errors import CursorError, StoreError
from ingestor.protocol.login import AUTHENTICATION_TIMEOUT, SEND_TIMEOUT, receive_login, refuse, token_of
from ingestor.protocol.messages import AUTHENTICATED, NO_AUTHENTICATION, NOT_AUTHORISED, stream_limit
from ingestor.protocol.port import PATH, listen, port_of
from ingestor.relay.admission import Failures, Lobby, Streams
from ingestor.relay.connection import RelayConnection, relay_connection
from ingestor.relay.deflate import WINDOW_BITS, SharedDeflateFactory, accepts_runs
from ingestor.relay.options import OptionError, parse_options
from ingestor.relay.subscription import Parts, StreamEnd, Subscription
from ingestor.store.record_pool import RecordPool
from ingestor.store.relay_tokens import TokenGrant, is_well_formed
from ingestor.telemetry.relay_events import RelayTelemetry

MAX_MESSAGE = 4096
"""Bytes of a message of a client; none is longer than its authentication."""

MAX_FRAME = 32_768
"""A longer message gets no error, but the close code 1009."""

MAX_UNAUTHENTICATED, MAX_UNAUTHENTICATED_OF_ONE = 200, 50
"""Connections that may wait for their authentication, and those of one address; any further one gets HTTP 503."""

PING_INTERVAL, PONG_TIMEOUT = 20.0, 60.0
"""Seconds between pings, and for an answer to one."""

MESSAGE_INTERVAL = 0.05
"""Seconds between two messages of a client that are read: none is needed after the authentication."""

UNAVAILABLE = "The relay cannot reach its database now; try again later."
NOT_A_LOGIN = "not authorised: the first message must be the authentication, as JSON text"
NOT_A_MESSAGE = f"Messages are JSON objects as text, of at most {MAX_MESSAGE} bytes"
NO_COMPRESSION = f"compress: offer permessage-deflate, with context takeover and a window of {WINDOW_BITS} bits or more"
NO_PONG = 1011
"""The close code for a client that does not answer pings."""


@dataclass(frozen=True, slots=True)
class PortOptions:
    """The relay's address and limits. `client_buffer` is the bytes that may wait for a client that is live.

    Behind a proxy, all clients have its address. Times are in seconds.
    """

    host: str
    port: int
    max_clients: int
    client_buffer: int
    tls: ssl.SSLContext | None = None
    is_behind_proxy: bool = False
    authentication_timeout: float = AUTHENTICATION_TIMEOUT
    ping_interval: float = PING_INTERVAL
    pong_timeout: float = PONG_TIMEOUT


@dataclass(eq=False, slots=True)
class _Client:
    """One authenticated connection. `ended_by` is the text of the error by which the relay ends its stream."""

    grant: TokenGrant
    running: asyncio.Task[None] | None = None
    ended_by: str = ""


class _RefusedError(Exception):
    """A refused client: the reason for the operator, and the text for the client."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.text = text


class RelayServer:
    """Serves clients between `start` and `stop`. Tokens are looked up by `logins`, which no replay can block."""

    def __init__(self, options: PortOptions, parts: Parts, logins: RecordPool, telemetry: RelayTelemetry) -> None:
        self._options = options
        self._parts = parts
        self._logins = logins
        self._telemetry = telemetry
        self._failures = Failures(parts.clock)
        self._streams = Streams(options.max_clients)
        self._clients: set[_Client] = set()
        most_of_one = MAX_UNAUTHENTICATED if options.is_behind_proxy else MAX_UNAUTHENTICATED_OF_ONE
        self._lobby = Lobby(MAX_UNAUTHENTICATED, most_of_one)
        self._server: Server | None = None

    @property
    def clients(self) -> int:
        """The number of streams."""
        return self._streams.total

    @property
    def url(self) -> str:
        """The address of the stream."""
        assert self._server is not None
        host = f"[{self._options.host}]" if ":" in self._options.host else self._options.host
        return f"{'ws' if self._options.tls is None else 'wss'}://{host}:{port_of(self._server)}{PATH}"

    async def start(self) -> None:
        """Listen. Raises OSError."""
        self._server = await listen(
            self._converse,
            self._options.host,
            self._options.port,
            name="relay",
            create_connection=partial(RelayConnection, self._lobby),
            process_request=self._process_request,
            ssl=self._options.tls,
            compression=None,  # the library would compress each message for each client
            extensions=[SharedDeflateFactory(client_no_context_takeover=True)],
            max_size=MAX_FRAME,
            write_limit=self._options.client_buffer,
            open_timeout=self._options.authentication_timeout,
            ping_interval=None,  # _keep_alive is gentler with slow clients
            close_timeout=SEND_TIMEOUT,
            server_header=None,
            **({} if self._options.tls is None else {"ssl_handshake_timeout": self._options.authentication_timeout}),
        )

    async def stop(self) -> None:
        """Close the port and all connections, with code 1012: the clients connect again."""
        if self._server is not None:
            self._server.close(code=1012)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2):
                    await self._server.wait_closed()

    def end_all_but(self, valid: set[bytes]) -> None:
        """End the streams whose tokens are not valid any more."""
        for client in list(self._clients):
            if client.grant.hash not in valid and client.running is not None:
                client.ended_by = NOT_AUTHORISED
                client.running.cancel()

    async def _process_request(self, connection: ServerConnection, request: Request) -> Response | None:
        """Accept a WebSocket at its path, while not too many wait for their authentication."""
        if request.path.partition("?")[0] != PATH:
            return _answer(HTTPStatus.NOT_FOUND, f"The stream is at {PATH}.\n")
        if not relay_connection(connection).is_welcome:
            return _answer(HTTPStatus.SERVICE_UNAVAILABLE, "Too many connections wait for their authentication.\n")
        return None

    async def _converse(self, connection: ServerConnection) -> None:
        """Serve one connection until it ends."""
        try:
            grant = await self._log_in(connection)
            relay_connection(connection).admit()
            await self._serve_client(connection, _Client(grant))
        except _RefusedError as refused:
            await self._refuse(connection, refused)
        except Exception as error:  # noqa: BLE001 - a defect; the library would hide it
            self._telemetry.stream_failed(error)
            await _close(connection, 1011)
        finally:
            await _close(connection, 1000)

    async def _serve_client(self, connection: ServerConnection, client: _Client) -> None:
        token = client.grant.hash
        self._streams.enter(token)
        self._clients.add(client)
        try:
            await self._serve(connection, client)
        finally:
            self._clients.discard(client)
            self._streams.leave(token)

    async def _log_in(self, connection: ServerConnection) -> TokenGrant:
        """Return the client of a connection. Raises _RefusedError."""
        message = await receive_login(connection, self._options.authentication_timeout)
        if message is None:
            raise _RefusedError("no_authentication", NO_AUTHENTICATION)
        token = token_of(message) if len(message) <= MAX_MESSAGE else None
        if token is None:
            raise _RefusedError("no_authentication", NOT_A_LOGIN)
        grant = await self._grant_of(token) if is_well_formed(token) else None
        if grant is None:
            await self._parts.clock.sleep(self._failures.note(relay_connection(connection).address))
            raise _RefusedError("token", NOT_AUTHORISED)
        limit = self._streams.exceeded(grant.hash, grant.max_streams)
        if limit is not None:
            raise _RefusedError("stream_limit", stream_limit(limit))
        return grant

    async def _grant_of(self, token: str) -> TokenGrant | None:
        """Look up a token, twice if the first connection to the database turns out to be dead."""
        for is_last in (False, True):
            try:
                async with self._logins.record() as record:
                    return await record.token_grant(token)
            except StoreError as error:
                if is_last:
                    self._telemetry.read_failed(error.message)
                    raise _RefusedError("database", UNAVAILABLE) from None
        raise AssertionError

    async def _refuse(self, connection: ServerConnection, refused: _RefusedError) -> None:
        self._telemetry.client_refused(refused.reason, relay_connection(connection).address)
        await refuse(connection, refused.text)

    async def _serve(self, connection: ServerConnection, client: _Client) -> None:
        assert connection.request is not None
        try:
            options = parse_options(connection.request.path.partition("?")[2], self._parts.clock.wall())
            if options.filter.compress and not accepts_runs(connection.protocol.extensions):
                raise OptionError(NO_COMPRESSION)
            async with asyncio.timeout(self._options.authentication_timeout):
                await self._parts.hub.is_ready.wait()
            await connection.send(AUTHENTICATED, text=True)
        except OptionError as error:
            raise _RefusedError("option", error.message) from None
        except TimeoutError:
            raise _RefusedError("database", UNAVAILABLE) from None
        except ConnectionClosed:
            return
        self._telemetry.client_connected(client.grant.name)
        stream = Subscription(connection, options, self._parts)
        client.running = asyncio.create_task(stream.run(), name=f"stream of {client.grant.name}")
        tasks = (
            client.running,
            asyncio.create_task(_read(connection), name="reader"),
            asyncio.create_task(self._keep_alive(connection), name="keepalive"),
        )
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        errors = [end for end in ends if isinstance(end, Exception)]
        reason = "a defect of the relay"
        try:
            reason = await self._end(connection, client, errors[0] if errors else None)
        finally:
            self._telemetry.client_left(client.grant.name, ticks=stream.ticks_sent, reason=reason)

    async def _keep_alive(self, connection: ServerConnection) -> None:
        """Send pings. Raises StreamEnd if one is not answered, although everything before it was accepted."""
        with contextlib.suppress(ConnectionClosed):
            while True:
                await self._parts.clock.sleep(self._options.ping_interval)
                pong = cast("asyncio.Future[float]", await connection.ping())
                try:
                    while not (await asyncio.wait([pong], timeout=self._options.pong_timeout))[0]:
                        if not connection.transport.get_write_buffer_size():
                            raise StreamEnd(NO_PONG)
                    await pong
                finally:
                    pong.cancel()

    async def _end(self, connection: ServerConnection, client: _Client, error: Exception | None) -> str:
        """Send the last message of a stream that the relay ends, close it, and return the reason."""
        match error:
            case None:
                if client.ended_by:
                    await refuse(connection, client.ended_by)
                return client.ended_by or "the client left"
            case CursorError():
                await self._refuse(connection, _RefusedError("cursor", error.message))
                return error.message
            case StreamEnd():
                if error.message:
                    await refuse(connection, error.message)
                if error.code == 1013 and not error.message:
                    self._telemetry.client_stuck(client.grant.name)
                await _close(connection, error.code)
                return error.message or f"closed with {error.code}"
            case _:
                raise error


async def _close(connection: ServerConnection, code: int) -> None:
    """Close a connection; if its client accepts nothing, at once."""
    try:
        async with asyncio.timeout(SEND_TIMEOUT):
            await connection.close(code)
    except TimeoutError:
        connection.transport.abort()


async def _read(connection: ServerConnection) -> None:
    """Read and drop what a client sends, such as `{"type": "ping"}`, until it leaves.

    Raises StreamEnd for anything but short JSON objects.
    """
    with contextlib.suppress(ConnectionClosed):
        while True:
            if not _is_message(await connection.recv()):
                raise StreamEnd(1008, NOT_A_MESSAGE)
            await asyncio.sleep(MESSAGE_INTERVAL)


def _is_message(data: str | bytes) -> bool:
    if isinstance(data, bytes) or len(data) > MAX_MESSAGE:
        return False
    try:
        content: Any = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict)


def _answer(status: HTTPStatus, text: str) -> Response:
    body = text.encode()
    headers = Headers({"Content-Type": "text/plain", "Content-Length": str(len(body)), "Connection": "close"})
    if status is HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = "5"
    return Response(status, status.phrase, headers, body)
