"""The relay's port: the login of a client, its options, and its stream until it ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import urlsplit

from websockets.asyncio.server import Server, ServerConnection
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from ingestor.errors import CursorError, StoreError
from ingestor.protocol.login import AUTHENTICATION_TIMEOUT, receive_login, refuse, token_of
from ingestor.protocol.messages import AUTHENTICATED, NO_AUTHENTICATION, NOT_AUTHORISED, stream_limit
from ingestor.protocol.port import PATH, listen, port_of
from ingestor.relay.admission import Failures, Streams
from ingestor.relay.options import OptionError, parse_options
from ingestor.relay.subscription import Parts, StreamEnd, Subscription
from ingestor.store.relay_tokens import TokenGrant
from ingestor.telemetry.relay_events import RelayTelemetry

MAX_MESSAGE = 4096
"""Bytes of a message of a client; none is longer than its authentication."""

MAX_UNAUTHENTICATED = 100
"""Connections that may wait for their authentication; any further one gets HTTP 503."""

PING_INTERVAL = 20.0
TCP_USER_TIMEOUT_MS = 90_000
"""The kernel ends a connection whose client acknowledges nothing for so long. Pings see to it that it has to."""

MESSAGE_INTERVAL = 0.05
"""Seconds between two messages of a client that are read: none is needed after the authentication."""

UNAVAILABLE = "The relay cannot reach its database now; try again later."


@dataclass(frozen=True, slots=True)
class PortOptions:
    """The relay's address and limits. `client_buffer` is the bytes that may wait for a client that is live."""

    host: str
    port: int
    max_clients: int
    client_buffer: int
    tls: ssl.SSLContext | None = None
    authentication_timeout: float = AUTHENTICATION_TIMEOUT


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
    """Serves clients between `start` and `stop`."""

    def __init__(self, options: PortOptions, parts: Parts, telemetry: RelayTelemetry) -> None:
        self._options = options
        self._parts = parts
        self._telemetry = telemetry
        self._failures = Failures(parts.clock)
        self._streams = Streams(options.max_clients)
        self._clients: set[_Client] = set()
        self._unauthenticated = 0
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
            process_request=self._process_request,
            ssl=self._options.tls,
            compression=None,  # the frames are made once for all clients
            max_size=MAX_MESSAGE,
            write_limit=self._options.client_buffer,
            ping_interval=PING_INTERVAL,
            ping_timeout=None,  # a slow client reads a ping late; the kernel finds the dead ones
            close_timeout=5,
            server_header=None,
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
        if urlsplit(request.path).path != PATH:
            return _answer(HTTPStatus.NOT_FOUND, f"The stream is at {PATH}.\n")
        if self._unauthenticated >= MAX_UNAUTHENTICATED:
            return _answer(HTTPStatus.SERVICE_UNAVAILABLE, "Too many connections wait for their authentication.\n")
        raw = connection.transport.get_extra_info("socket")
        if raw is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            with contextlib.suppress(OSError):
                raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TCP_USER_TIMEOUT_MS)
        return None

    async def _converse(self, connection: ServerConnection) -> None:
        """Serve one connection until it ends."""
        self._unauthenticated += 1
        try:
            grant = await self._log_in(connection)
        except _RefusedError as refused:
            await self._refuse(connection, refused)
            return
        finally:
            self._unauthenticated -= 1
        client = _Client(grant)
        self._streams.enter(grant.hash)
        self._clients.add(client)
        try:
            await self._serve(connection, client)
        finally:
            self._clients.discard(client)
            self._streams.leave(grant.hash)

    async def _log_in(self, connection: ServerConnection) -> TokenGrant:
        """Return the client of a connection. Raises _RefusedError."""
        message = await receive_login(connection, self._options.authentication_timeout)
        if message is None:
            raise _RefusedError("no_authentication", NO_AUTHENTICATION)
        token = token_of(message)
        grant = None if token is None else await self._grant_of(token)
        if grant is None:
            await self._parts.clock.sleep(self._failures.note(_address(connection)))
            raise _RefusedError("token", NOT_AUTHORISED)
        limit = self._streams.exceeded(grant.hash, grant.max_streams)
        if limit is not None:
            raise _RefusedError("stream_limit", stream_limit(limit))
        return grant

    async def _grant_of(self, token: str) -> TokenGrant | None:
        """Look up a token, twice if the first connection to the database turns out to be dead."""
        for is_last in (False, True):
            try:
                async with self._parts.pool.record() as record:
                    return await record.token_grant(token)
            except StoreError:
                if is_last:
                    raise _RefusedError("database", UNAVAILABLE) from None
        raise AssertionError

    async def _refuse(self, connection: ServerConnection, refused: _RefusedError) -> None:
        self._telemetry.client_refused(refused.reason, _address(connection))
        await refuse(connection, refused.text)

    async def _serve(self, connection: ServerConnection, client: _Client) -> None:
        assert connection.request is not None
        try:
            options = parse_options(urlsplit(connection.request.path).query, self._parts.clock.wall())
            async with asyncio.timeout(self._options.authentication_timeout):
                await self._parts.hub.is_ready.wait()
            await connection.send(AUTHENTICATED, text=True)
        except OptionError as error:
            await self._refuse(connection, _RefusedError("option", error.message))
            return
        except TimeoutError:
            await self._refuse(connection, _RefusedError("database", UNAVAILABLE))
            return
        except ConnectionClosed:
            return
        self._telemetry.client_connected(client.grant.name)
        stream = Subscription(connection, options, self._parts)
        client.running = asyncio.create_task(stream.run(), name=f"stream of {client.grant.name}")
        reading = asyncio.create_task(_read(connection), name="reader")
        try:
            await asyncio.wait({client.running, reading}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (client.running, reading):
                task.cancel()
            await asyncio.gather(client.running, reading, return_exceptions=True)
        reason = await self._end(connection, client, client.running)
        self._telemetry.client_left(client.grant.name, ticks=stream.ticks_sent, reason=reason)

    async def _end(self, connection: ServerConnection, client: _Client, running: asyncio.Task[None]) -> str:
        """Send the last message of a stream that the relay ends, close it, and return the reason."""
        error = None if running.cancelled() else running.exception()
        match error:
            case None:
                if client.ended_by:
                    await refuse(connection, client.ended_by)
                return client.ended_by or "the client left"
            case CursorError():
                await self._refuse(connection, _RefusedError("cursor", f"resume: {error.message}"))
                return error.message
            case StreamEnd():
                if error.message:
                    await refuse(connection, error.message)
                if error.code == 1013 and not error.message:
                    self._telemetry.client_stuck(client.grant.name)
                await connection.close(error.code)
                return error.message or f"closed with {error.code}"
            case _:
                raise error


def _address(connection: ServerConnection) -> str:
    return str((connection.remote_address or ("unknown",))[0])


async def _read(connection: ServerConnection) -> None:
    """Read and drop what a client sends, such as `{"type": "ping"}`, until it leaves."""
    with contextlib.suppress(ConnectionClosed):
        while True:
            await connection.recv()
            await asyncio.sleep(MESSAGE_INTERVAL)


def _answer(status: HTTPStatus, text: str) -> Response:
    body = text.encode()
    headers = Headers({"Content-Type": "text/plain", "Content-Length": str(len(body)), "Connection": "close"})
    if status is HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = "5"
    return Response(status, status.phrase, headers, body)
