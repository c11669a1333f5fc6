"""One connection to the NATS servers, which is made again when it breaks or a server stops answering."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import AuthorizationError, NoRespondersError
from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeoutError

from ingestor.errors import BufferUnavailableError, ConfigurationError
from ingestor.jetstream.login import login_options
from ingestor.network import tls_context
from ingestor.redaction import outside_text, system_words
from ingestor.settings import Settings, variable

CONNECT_SECONDS = 2.0
"""Time limit of a connection to one server."""

REPLY_SECONDS = 1.0
"""Time limit of an answer. A server that is killed never answers, and one that is frozen does not either."""

PING_SECONDS = 1
"""Interval of pings. A server that leaves two unanswered is frozen or unreachable, and another one is tried."""

MISSED_REPLIES = 3
"""Requests without an answer, one after the other, after which another server is tried."""

_BACKOFF = (0.05, 0.1, 0.25, 0.5, 1.0)

Message = Msg
"""A message as the library gives it."""

Handler: TypeAlias = Callable[[Msg], Awaitable[None]]


class ApiError(BufferUnavailableError):
    """JetStream refused a request. `code` is its error code (`err_code`)."""

    def __init__(self, error: dict[str, Any]) -> None:
        self.code = int(error.get("err_code") or 0)
        super().__init__(
            f"JetStream refuses: {outside_text(error.get('description', 'no reason given'))} ({self.code})."
        )


class Link:
    """A connection that lasts: `run` keeps it, everything else fails with BufferUnavailableError while there is none.

    The library's own reconnection is off: it keeps requests for a server that is gone, and takes minutes to notice one
    that is frozen. `on_change` is called with a problem, or with None when a connection stands.
    """

    def __init__(self, settings: Settings, *, name: str, on_change: Callable[[str | None], None]) -> None:
        self._settings = settings
        self._name = name
        self._on_change = on_change
        self._servers = (settings.buffer_url or "").split(",")
        self._handlers: dict[str, Handler] = {}
        self._closed = asyncio.Event()
        self._connected = asyncio.Event()
        self._missed = 0
        self._last_error: Exception | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self.has_connected = False
        self.client: Client | None = None
        """The connection; None while there is none. Another object after each reconnection."""

    def on(self, subject: str, handler: Handler) -> None:
        """Call a handler for each message of a subject, on this and every later connection. Call it before `run`."""
        self._handlers[subject] = handler

    async def run(self) -> None:
        """Keep a connection until cancelled. Raises ConfigurationError if the first servers refuse the login."""
        attempt = 0
        try:
            while True:
                if await self._dial():
                    attempt = 0
                    await self._closed.wait()
                    self._lost()
                else:
                    await asyncio.sleep(_BACKOFF[min(attempt, len(_BACKOFF) - 1)])
                    attempt += 1
                self._servers.append(self._servers.pop(0))  # the next server
        finally:
            await self.close()

    async def wait(self, seconds: float) -> bool:
        """Wait until there is a connection, for at most so many seconds; return whether there is one."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._connected.wait()
        return self.client is not None

    async def close(self) -> None:
        """Close the connection, at once if its server does not answer."""
        client, self.client = self.client, None
        self._connected.clear()
        if client is not None:
            await _close(client)
        await asyncio.gather(*self._closing, return_exceptions=True)

    def kick(self) -> None:
        """Give the connection up, because its server does not answer, and connect to the next one."""
        self._missed = 0
        self._closed.set()

    async def publish(self, subject: str, body: bytes, *, reply: str = "") -> None:
        """Send a message without an answer. Raises BufferUnavailableError."""
        client = self.current()
        try:
            await client.publish(subject, body, reply=reply)
        except (NatsError, OSError) as error:
            raise _unavailable(error) from error

    async def request(
        self,
        subject: str,
        body: bytes = b"",
        *,
        headers: dict[str, str] | None = None,
        timeout: float = REPLY_SECONDS,
        is_of_server: bool = True,
    ) -> bytes:
        """Return the answer to a message. Raises BufferUnavailableError.

        `is_of_server`: the NATS servers answer, so that a missing answer counts against the connection.
        """
        client = self.current()
        try:
            async with asyncio.timeout(timeout):  # the library's own limit loses cancellations before Python 3.12
                answer = await client.request(subject, body, timeout=None, headers=headers)  # type: ignore[arg-type]
        except NoRespondersError as error:
            self._missed = 0
            raise BufferUnavailableError("No server serves the stream at the moment.", is_unserved=True) from error
        except (NatsTimeoutError, TimeoutError) as error:
            if is_of_server and client is self.client:
                self._missed += 1
                if self._missed >= MISSED_REPLIES:
                    self.kick()
            raise BufferUnavailableError(f"No answer came within {timeout:g} s.") from error
        except (NatsError, OSError) as error:
            raise _unavailable(error) from error
        self._missed = 0
        return answer.data

    async def api(self, call: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the answer of the JetStream API. Raises ApiError if it refuses, and BufferUnavailableError."""
        answer = await self.request(f"$JS.API.{call}", json.dumps(body).encode() if body else b"")
        return checked(answer)

    def current(self) -> Client:
        """Return the connection. Raises BufferUnavailableError while there is none."""
        if self.client is None or self.client.is_closed:
            raise BufferUnavailableError(f"There is no connection to NATS: {self._why()}.")
        return self.client

    @property
    def max_payload(self) -> int:
        """The most bytes of a message, headers included."""
        return self.current().max_payload

    async def _dial(self) -> bool:
        """Connect to the first server of the list; return whether that succeeded."""
        url = self._servers[0]
        parts = urlsplit(url)
        self._last_error = None
        self._closed = closed = asyncio.Event()

        async def on_closed() -> None:
            closed.set()

        async def on_error(error: Exception) -> None:
            self._last_error = error

        options: dict[str, Any] = login_options(self._settings, parts.scheme, parts.hostname or "")
        if parts.scheme == "tls":
            options["tls"] = tls_context()
        client = Client()
        try:
            async with asyncio.timeout(2 * CONNECT_SECONDS):
                await client.connect(
                    [url],
                    name=self._name,
                    allow_reconnect=False,
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    connect_timeout=int(CONNECT_SECONDS),
                    ping_interval=PING_SECONDS,
                    max_outstanding_pings=2,
                    pending_size=8 * 2**20,
                    closed_cb=on_closed,
                    error_cb=on_error,
                    **options,
                )
                for subject, handler in self._handlers.items():
                    await client.subscribe(subject, cb=handler)
        except (NatsError, OSError, TimeoutError, ValueError) as error:
            await _close(client)
            self._refuse(error)
            return False
        except asyncio.CancelledError:
            _abort(client)
            raise
        self.client, self.has_connected, self._missed = client, True, 0
        self._connected.set()
        self._on_change(None)
        return True

    def _refuse(self, error: Exception) -> None:
        """Report a failed connection. Raises ConfigurationError if an operator must act."""
        if self._last_error is None:
            self._last_error = error
        why = self._why()
        self._on_change(f"No connection to NATS at {self._servers[0]}: {why}.")
        is_refused = any(isinstance(each, AuthorizationError) for each in (error, self._last_error)) or (
            "authorization" in str(error).lower() + str(self._last_error).lower()
        )
        if is_refused and not self.has_connected:
            raise ConfigurationError(
                f"{variable('buffer_credentials_file')}: the NATS server {self._servers[0]} refuses the login: {why}."
            )

    def _lost(self) -> None:
        client, self.client = self.client, None
        self._connected.clear()
        self._on_change(f"The connection to NATS at {self._servers[0]} is lost: {self._why()}.")
        if client is not None:
            closing = asyncio.create_task(_close(client), name="nats-close")
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    def _why(self) -> str:
        return _words(self._last_error) if self._last_error is not None else "its server does not answer"


def checked(answer: bytes) -> dict[str, Any]:
    """Return an answer of JetStream. Raises ApiError for a refusal, BufferUnavailableError for an unreadable answer."""
    try:
        found = json.loads(answer)
    except ValueError:
        raise BufferUnavailableError("The answer of the NATS server is not JSON.") from None
    if not isinstance(found, dict):
        raise BufferUnavailableError("The answer of the NATS server is no object.")
    if isinstance(found.get("error"), dict):
        raise ApiError(found["error"])
    return found


async def _close(client: Client) -> None:
    try:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(CONNECT_SECONDS):
                await client.close()
    finally:
        _abort(client)


def _abort(client: Client) -> None:
    """End a connection at once. The library leaves it open after a refused login, or before a frozen server."""
    writer = getattr(getattr(client, "_transport", None), "_io_writer", None)
    if writer is not None:
        writer.transport.abort()


def _unavailable(error: Exception) -> BufferUnavailableError:
    return BufferUnavailableError(f"NATS failed: {_words(error)}.")


def _words(error: Exception) -> str:
    if isinstance(error, OSError):
        return system_words(error)
    return outside_text(str(error) or type(error).__name__)
