"""The HTTP server in the daemon's loop: uvicorn, without its handling of signals and its log."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import resource
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import uvicorn
from starlette.applications import Starlette

from ingestor.errors import ConfigurationError
from ingestor.redaction import system_words
from ingestor.settings import variable
from ingestor.web.connection import ClientConnection

WAITING = 1024
"""Connections that may wait to be accepted. Any further client, maybe a probe, retries a second later."""

SEND_BUFFER = 65_536
"""Bytes that the kernel buffers for a client that does not read (it doubles them); the default is megabytes."""

CLOSE_TIMEOUT = 1
"""Seconds for unfinished answers when the server stops."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits for clients.

    `connections` is the number open at once; `timeout` is the wait, in seconds, for a client to send its request or
    to read its answer.
    """

    connections: int = 128
    timeout: float = 10.0

    @property
    def accepted_at_once(self) -> int:
        """The number of connections accepted in one turn of the loop.

        Before the request of one is read, the loop may have accepted four times as many. They must fit among the open
        connections, or a burst would abort its own first connections unread; and they must leave descriptors free.
        """
        return max(1, self.connections // 8)

    def within(self, descriptors: int) -> Limits:
        """Return the limits for a process with so many file descriptors: clients may use a quarter."""
        if descriptors == resource.RLIM_INFINITY:
            return self
        return Limits(max(1, min(self.connections, descriptors // 4)), self.timeout)


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to `ingestor.service.process`."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept `backlog` connections at once, but let more wait: asyncio uses one number for both."""
        await super().startup(sockets)
        for each in sockets or ():
            each.listen(WAITING)


class HttpServer:
    """An HTTP server that listens from `bind` on and answers while `serve` runs."""

    def __init__(self, host: str, port: int, limits: Limits | None = None, *, port_setting: str = "http_port") -> None:
        self._host = host
        self._port_setting = variable(port_setting)
        self._port = port
        self._limits = (limits or Limits()).within(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        self._socket: socket.socket | None = None
        self._server: _Uvicorn | None = None

    def bind(self) -> None:
        """Listen on the port. Raises ConfigurationError if that fails."""
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self._socket = socket.socket(family, kind, protocol)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # accepted sockets inherit it
            self._socket.bind(address)
            self._socket.listen(WAITING)
            self._socket.setblocking(False)
        except OSError as error:
            self.close()
            raise ConfigurationError(self._problem(error)) from None

    def _problem(self, error: OSError) -> str:
        if error.errno == errno.EADDRINUSE:
            return (
                f"{self._port_setting}: {self._port} on {self._host} is in use by another program, or another "
                "ingestor. Choose another port."
            )
        setting = self._port_setting if error.errno == errno.EACCES else "INGESTOR_HTTP_HOST"
        return f"{setting}: the server cannot listen on {self._host}:{self._port}: {system_words(error)}."

    @property
    def is_bound(self) -> bool:
        """Whether the server listens on its port."""
        return self._socket is not None

    @property
    def url(self) -> str:
        """The URL of the status page."""
        assert self._socket is not None
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"

    async def serve(self, app: Starlette) -> None:
        """Answer requests until `stop` is called."""
        assert self._socket is not None
        connection: Any = functools.partial(
            ClientConnection, most=self._limits.connections, timeout=self._limits.timeout
        )
        config = uvicorn.Config(
            app,
            http=cast("type[asyncio.Protocol]", connection),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=self._limits.accepted_at_once,
            timeout_graceful_shutdown=CLOSE_TIMEOUT,
        )
        self._server = _Uvicorn(config)
        await self._server.serve(sockets=[self._socket])

    def stop(self) -> None:
        """End `serve`."""
        if self._server is not None:
            self._server.should_exit = True

    def close(self) -> None:
        """Close the port."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
