"""The HTTP server, in the daemon's own loop: uvicorn, without its hands on our signals and our log."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from ingestor.errors import ConfigurationError

MAX_CONNECTIONS = 128
"""At once; more are closed unheard, so that no visitor takes the descriptors that the recorder needs."""

REQUEST_TIMEOUT = 10.0
"""Seconds in which a connection must have asked for something: after its begin, and after each answer."""

CLOSE_TIMEOUT = 1
"""Seconds for answers under way when the server stops."""


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to `ingestor.service.signals`."""
        yield


class _Visitor(H11Protocol):
    """A connection that is closed where there are too many, or where it does not ask; uvicorn would keep them all."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        else:
            self._be_patient()

    def on_response_complete(self) -> None:
        """Wait for the next request: uvicorn does only until that has sent its first byte."""
        self._be_patient()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_patience()
        super().connection_lost(exc)

    def _be_patient(self) -> None:
        self._forget_patience()
        self._patience = asyncio.get_running_loop().call_later(REQUEST_TIMEOUT, self._lose_patience)

    def _forget_patience(self) -> None:
        if self._patience is not None:
            self._patience.cancel()

    def _lose_patience(self) -> None:
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is None or cycle.response_complete:
            self.transport.abort()


class HttpServer:
    """Listens from `bind` on, answers while `serve` runs."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._socket: socket.socket | None = None
        self._server: _Uvicorn | None = None

    def bind(self) -> None:
        """Take the port. Raises ConfigurationError where it can't be had."""
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self._socket = socket.socket(family, kind, protocol)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(address)
            self._socket.listen()
            self._socket.setblocking(False)
        except OSError as error:
            self.close()
            raise ConfigurationError(self._problem(error)) from None

    def _problem(self, error: OSError) -> str:
        if error.errno == errno.EADDRINUSE:
            return (
                f"INGESTOR_HTTP_PORT: {self._port} on {self._host} is taken by another program, or another ingestor. "
                "Choose another one."
            )
        what = "INGESTOR_HTTP_PORT" if error.errno == errno.EACCES else "INGESTOR_HTTP_HOST"
        return f"{what}: {self._host}:{self._port} cannot be listened on: {error.strerror or error}."

    @property
    def is_bound(self) -> bool:
        """Whether the port is ours."""
        return self._socket is not None

    @property
    def url(self) -> str:
        """Where the page is."""
        assert self._socket is not None
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"

    async def serve(self, app: Starlette) -> None:
        """Answer, until `stop`."""
        assert self._socket is not None
        config = uvicorn.Config(
            app,
            http=_Visitor,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=CLOSE_TIMEOUT,
        )
        self._server = _Uvicorn(config)
        await self._server.serve(sockets=[self._socket])

    def stop(self) -> None:
        """Let `serve` come to its end."""
        if self._server is not None:
            self._server.should_exit = True

    def close(self) -> None:
        """Give the port back."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
