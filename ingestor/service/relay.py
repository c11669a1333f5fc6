"""The relay as a process: follows the log of commits, serves clients, and answers for its health."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any
from uuid import uuid4

from ingestor import __version__
from ingestor.clock import Clock, SystemClock, to_datetime
from ingestor.errors import ConfigurationError, CursorError, DatabaseAccessError, StoreError
from ingestor.redaction import outside_text, system_words
from ingestor.relay.encoder import Encoder
from ingestor.relay.hub import Hub
from ingestor.relay.server import PortOptions, RelayServer
from ingestor.relay.subscription import Parts
from ingestor.service.process import StopRequest
from ingestor.service.systemd import SystemdNotifier
from ingestor.settings import Settings, is_loopback, variable
from ingestor.store.follower import LogFollower
from ingestor.store.record_pool import RecordPool
from ingestor.telemetry.liveness import LivenessDeadline
from ingestor.telemetry.relay_events import RelayTelemetry
from ingestor.telemetry.relay_metrics import new_relay_registry
from ingestor.web.app import make_health_app
from ingestor.web.hosts import Hosts
from ingestor.web.server import CLOSE_TIMEOUT, HttpServer

COVERAGE_SECONDS = 1.0
"""Seconds between two statements of coverage to the clients that ask for them."""

REPORT_SECONDS = 20.0
"""Seconds between two reports to the registry, which also prune the log."""

TOKEN_SECONDS = 5.0
"""Seconds between two checks of the tokens: a revoked one ends its streams within this time."""

LOGIN_SECONDS = 5.0
"""Seconds for the database to look up a token; it is asked twice."""

_BACKOFF = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0)
"""Seconds between attempts to follow the log; the last is repeated."""


class Relay:
    """Serves the record of one database. `server` and `http` are its ports, `telemetry` reports on it.

    `port` replaces the options of the stream's port that follow from the settings.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Clock | None = None,
        telemetry: RelayTelemetry | None = None,
        stuck_after: float = 60.0,
        port: PortOptions | None = None,
    ) -> None:
        self._settings = settings
        self._clock = clock or SystemClock()
        self.telemetry = telemetry or RelayTelemetry(self._clock)
        url = settings.read_database_url()
        timezone = settings.exchange_timezone
        self._pool = RecordPool(url)
        self._logins = RecordPool(url, size=2, timeout=LOGIN_SECONDS)
        self._follower = LogFollower(url, relay=uuid4(), instance=settings.instance, timeout=settings.write_timeout)
        self.hub = Hub(Encoder(timezone))
        parts = Parts(self.hub, self._pool, Encoder(timezone), self._clock, self.telemetry, stuck_after)
        self.server = RelayServer(port or _port_options(settings), parts, self._logins, self.telemetry)
        self.http = HttpServer(settings.http_host, settings.relay_http_port, port_setting="relay_http_port")
        self._following = LivenessDeadline(self._clock, 60.0 + 2 * settings.write_timeout)
        self._has_followed = False
        self._notifier = SystemdNotifier()
        self._report_at = 0.0

    # For the health endpoints.

    def loops(self) -> dict[str, bool]:
        """Return whether each loop advances."""
        return {"follower": not self._following.is_stuck}

    def readiness(self) -> dict[str, Any]:
        """Return whether the log is followed, and otherwise why not."""
        problem = self.telemetry.problem
        since = to_datetime(self.telemetry.problem_since).isoformat(timespec="milliseconds")
        problems = [{"check": "database", "since": since, "detail": problem}] if problem else []
        return {"ready": not problems, "problems": problems}

    # The process.

    async def run(self, request: StopRequest) -> None:
        """Serve until a stop is requested. Raises ConfigurationError if a port is in use or an operator must act."""
        self.http.bind()
        try:
            await self._listen()
        except ConfigurationError:
            self.http.close()
            raise
        self.telemetry.started(version=__version__, instance=self._settings.instance)
        self.telemetry.listening(self.server.url, self.http.url)
        tasks = {
            asyncio.create_task(self._follow(), name="follower"),
            asyncio.create_task(self._check_tokens(), name="tokens"),
            asyncio.create_task(self._state_coverage(), name="coverage"),
            asyncio.create_task(self._watch(), name="watch"),
            asyncio.create_task(self._serve_health(), name="http"),
        }
        stop = asyncio.create_task(request.stop.wait(), name="stop")
        try:
            await asyncio.wait({*tasks, stop}, return_when=asyncio.FIRST_COMPLETED)
            self._notifier.stopping()
            self.telemetry.stopping(request.signal, self.server.clients)
        finally:
            await self._stop({*tasks, stop})
        for task in tasks:
            if not task.cancelled():
                task.result()
        self.telemetry.stopped()

    async def _listen(self) -> None:
        try:
            await self.server.start()
        except OSError as error:
            where = f"{self._settings.relay_host}:{self._settings.relay_port}"
            raise ConfigurationError(
                f"{variable('relay_port')}: the relay cannot listen on {where}: {system_words(error)}."
            ) from None

    async def _stop(self, tasks: set[asyncio.Task[Any]]) -> None:
        await self.server.stop()
        self.http.stop()
        await asyncio.wait({task for task in tasks if task.get_name() == "http"}, timeout=2 * CLOSE_TIMEOUT)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._follower.leave()
        await self._follower.close()
        await self._pool.close()
        await self._logins.close()
        self.http.close()
        self._notifier.close()

    async def _serve_health(self) -> None:
        registry = new_relay_registry(
            self.telemetry, lambda: (self.server.clients, self.hub.live), self._settings.relay_max_clients
        )
        hosts = Hosts([self._settings.http_host, *self._settings.http_hosts])
        await self.http.serve(make_health_app(self, registry, hosts))

    # The log.

    async def _follow(self) -> None:
        """Follow the log without end. A failure of the database is retried; its clients keep their connections."""
        attempt = 0
        while True:
            self._following.extend()
            try:
                await self._open()
                attempt = 0
                await self._follow_log()
            except CursorError:
                self.telemetry.log_restarted()
            except DatabaseAccessError as error:
                if not self._has_followed:
                    raise
                self.telemetry.follow_failed(str(error))
            except StoreError as error:
                self.telemetry.follow_failed(str(error))
            await self._clock.sleep(_BACKOFF[min(attempt, len(_BACKOFF) - 1)])
            attempt += 1

    async def _open(self) -> None:
        state = await self._follower.open()
        self._has_followed = True
        if self.hub.is_ready.is_set() and state.mark != self.hub.mark:
            self.telemetry.log_restarted()
        self.hub.follow(state)
        self._report_at = 0.0
        self.telemetry.followed()

    async def _follow_log(self) -> None:
        while True:
            self._following.extend()
            entries = await self._follower.read(self.hub.position, self.hub.mark)
            if entries:
                await self.hub.publish(entries)
                self.telemetry.published(len(entries), lag=entries[-1].age)
            if self._clock.monotonic() >= self._report_at:
                await self._follower.report(self.server.clients)
                self._report_at = self._clock.monotonic() + REPORT_SECONDS
            if not entries:
                self.telemetry.caught_up()
                await self._follower.wait()

    async def _check_tokens(self) -> None:
        """End the streams of tokens that were revoked or have expired. While the database fails, all stay valid."""
        while True:
            await self._clock.sleep(TOKEN_SECONDS)
            try:
                async with self._logins.record() as record:
                    self.server.end_all_but(await record.valid_hashes())
            except StoreError as error:
                self.telemetry.read_failed(error.message)

    async def _state_coverage(self) -> None:
        """Tell the clients that ask for it when the record is complete. While the database fails, they hear nothing."""
        while True:
            await self._clock.sleep(COVERAGE_SECONDS)
            since = self.hub.coverage_since
            if since is None:
                continue
            try:
                async with self._pool.record() as record:
                    self.hub.state(await record.coverage(since, self._clock.monotonic()))
            except StoreError as error:
                self.telemetry.read_failed(error.message)

    async def _watch(self) -> None:
        """Report to the service manager."""
        while True:
            self._notifier.ready()
            if all(self.loops().values()):
                self._notifier.alive()
            problem = self.telemetry.problem
            self._notifier.status(problem or f"{self.server.clients} clients, {self.hub.live} of them live")
            await self._clock.sleep(1.0)


def _port_options(settings: Settings) -> PortOptions:
    """Return the options of the stream's port. Raises ConfigurationError if tokens would travel unencrypted."""
    return PortOptions(
        settings.relay_host,
        settings.relay_port,
        settings.relay_max_clients,
        settings.relay_client_buffer,
        _tls(settings),
        is_behind_proxy=settings.relay_behind_tls_proxy,
    )


def _tls(settings: Settings) -> ssl.SSLContext | None:
    cert, key = settings.relay_tls_cert, settings.relay_tls_key
    if (cert is None) != (key is None):
        raise ConfigurationError(f"{variable('relay_tls_cert')} and {variable('relay_tls_key')} belong together.")
    if cert is None or key is None:
        if not is_loopback(settings.relay_host) and not settings.relay_behind_tls_proxy:
            raise ConfigurationError(
                f"{variable('relay_host')}: tokens would travel unencrypted to {settings.relay_host}. "
                f"Set {variable('relay_tls_cert')} and {variable('relay_tls_key')}; or, if a proxy in front of the "
                f"relay does TLS, {variable('relay_behind_tls_proxy')}=on."
            )
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(cert, key)
    except (OSError, ValueError) as error:
        why = system_words(error) if isinstance(error, OSError) else outside_text(error)
        raise ConfigurationError(
            f"{variable('relay_tls_cert')}: {outside_text(cert)} and its key cannot be used: {why}."
        ) from None
    return context
