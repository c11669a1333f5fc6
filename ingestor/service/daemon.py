"""The daemon: wires stream, buffer and store, runs them, and stops them in order."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from ingestor import __version__
from ingestor.buffer.fifo import Buffer
from ingestor.buffer.spool import Spool, prepare_state_directory
from ingestor.clock import Clock, SystemClock
from ingestor.coverage.calendar import load
from ingestor.errors import ConfigurationError, MessagesLostError
from ingestor.service.coverage_monitor import CoverageMonitor
from ingestor.service.process import StopRequest
from ingestor.service.reader import StreamReader
from ingestor.service.roller import Roller
from ingestor.service.status import Status
from ingestor.service.systemd import SystemdNotifier
from ingestor.service.writer import Writer
from ingestor.settings import Settings, require_nats
from ingestor.store.ticks import TickStore
from ingestor.telemetry.buffer_metrics import PublisherMetrics
from ingestor.telemetry.events import Telemetry
from ingestor.telemetry.liveness import LIVENESS_STEP_SECONDS, LivenessDeadline
from ingestor.telemetry.log import log_suppressed_lines
from ingestor.telemetry.metrics import new_registry
from ingestor.web.app import make_app
from ingestor.web.hosts import Hosts
from ingestor.web.server import CLOSE_TIMEOUT, HttpServer

if TYPE_CHECKING:
    from ingestor.service.publisher import Publisher

WATCH_INTERVAL = 1.0
"""Seconds between two checks of liveness and readiness."""


class Daemon:
    """Records one stream through one buffer into one database. `telemetry` and `http` report on it."""

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Clock | None = None,
        telemetry: Telemetry | None = None,
        new_coverage_monitor: Callable[..., CoverageMonitor] = CoverageMonitor,
    ) -> None:
        self._settings = settings
        self._clock = clock or SystemClock()
        self.telemetry = telemetry or Telemetry(self._clock)
        self._writes = asyncio.Event()
        self._closing = asyncio.Event()
        self.buffer = Buffer(
            memory_max_bytes=settings.memory_max_bytes,
            clock=self._clock,
            telemetry=self.telemetry,
            spool=Spool(settings.state_path("")),
            spool_max_bytes=settings.spool_max_bytes,
            spool_after=settings.spool_after,
        )
        reader = LivenessDeadline(self._clock)
        writer = LivenessDeadline(self._clock, LIVENESS_STEP_SECONDS + 2 * settings.write_timeout)
        self._store = TickStore(
            settings.read_database_url(),
            write_timeout=settings.write_timeout,
            clock=self._clock,
            on_progress=writer.extend,
            on_comparison=self.telemetry.clocks_compared,
            on_lock_wait=self.telemetry.lock_waited,
        )
        self._writer = Writer(
            self._store,
            buffer=self.buffer,
            clock=self._clock,
            telemetry=self.telemetry,
            instance=settings.instance,
            liveness=writer,
        )
        calendar = load(settings.exchange_calendar, settings.exchange_timezone)
        self._reader = StreamReader(
            settings,
            buffer=self.buffer,
            calendar=calendar,
            clock=self._clock,
            telemetry=self.telemetry,
            liveness=reader,
        )
        self._coverage_monitor = new_coverage_monitor(settings, clock=self._clock, telemetry=self.telemetry)
        self.status = Status(
            settings,
            clock=self._clock,
            telemetry=self.telemetry,
            buffer=self.buffer,
            calendar=calendar,
            coverage_monitor=self._coverage_monitor,
            liveness_deadlines={"reader": reader, "writer": writer},
        )
        self._publisher: Publisher | None = None
        if settings.buffer_url is not None:
            self._publisher = new_publisher(
                settings, buffer=self.buffer, clock=self._clock, telemetry=self.telemetry, liveness=writer
            )
            self.status.buffer_events = self._publisher.events
        self._roller = Roller(settings, buffer=self.buffer, clock=self._clock, telemetry=self.telemetry)
        self.http = HttpServer(settings.http_host, settings.http_port)
        self._notifier = SystemdNotifier()

    async def run(self, request: StopRequest) -> None:
        """Record until a stop is requested; then close the stream, write or spool all batches, and return.

        Raises DatabaseAccessError if the database has never admitted this process and requires operator action,
        ConfigurationError if a failure of the stream requires it or another process owns the spool or the port, and
        MessagesLostError if messages could neither be written nor spooled.
        """
        prepare_state_directory(self._settings.state_path(""))
        self.buffer.claim()
        try:
            self.http.bind()
        except ConfigurationError:
            await self.buffer.close()
            raise
        self.telemetry.started(
            version=__version__, endpoint=self._settings.stream_url, instance=self._settings.instance
        )
        self.telemetry.http_listening(self.http.url)
        serving = asyncio.create_task(self._serve(), name="http")
        watching = asyncio.create_task(self._watch(), name="watch")
        try:
            await self._record(request, {serving, watching})
        finally:
            await _cancel(watching)
            await self._stop_serving(serving)
            self._notifier.close()
            log_suppressed_lines(at_once=True)

    async def _record(self, request: StopRequest, beside: set[asyncio.Task[None]]) -> None:
        """Run all stages until a stop is requested, or a task ends, including those `beside`."""
        reading = asyncio.create_task(self._reader.run(), name="reader")
        spooling = asyncio.create_task(self._spool(), name="spooler")
        writing = asyncio.create_task(self._write(), name="writer")
        monitoring = asyncio.create_task(self._coverage_monitor.run(self._writes), name="coverage_monitor")
        working = [reading, writing, spooling, monitoring]
        if self._settings.rollup and self._publisher is None:  # `ingestor write` does it beside its commits
            working.append(asyncio.create_task(self._roller.run(self._writes), name="roller"))
        stop = asyncio.create_task(request.stop.wait(), name="stop")
        try:
            await asyncio.wait({*working, *beside, stop}, return_when=asyncio.FIRST_COMPLETED)
            self._notifier.stopping()
            self.telemetry.stopping(signal=request.signal, waiting_bytes=self.buffer.size)
            await _cancel(reading)
            await self._drain({writing, spooling}, request)
            await self._wait_for_spool(spooling)
            await self.buffer.spool_all()
        finally:
            await self._store.give_up()
            await self._roller.give_up()
            await _cancel(*working, stop)
            await self._store.close()
            await self.buffer.close()
        lost = self._report_rest()
        for task in (*working, *beside):
            if task.done() and not task.cancelled():
                task.result()
        if lost:
            raise MessagesLostError(f"{lost} messages could be written neither to the database nor to the spool.")
        self.telemetry.stopped()

    async def _spool(self) -> None:
        await self.buffer.open()  # may take seconds, while ticks are already received
        await self.buffer.run()

    async def _write(self) -> None:
        await self.buffer.wait_until_open()
        if self._publisher is not None:
            self._writes.set()
            await self._publisher.run()
        await self._writer.write_inherited()
        await self._writer.end_crashed_sessions()
        self._writes.set()
        await self._writer.run()

    async def _serve(self) -> None:
        registry = new_registry(self.telemetry, self.status.facts)
        if self._publisher is not None:
            registry.register(PublisherMetrics(self._publisher.events))
        hosts = Hosts([self._settings.http_host, *self._settings.http_hosts])
        await self.http.serve(make_app(self.status, registry, self._closing, hosts))

    async def _stop_serving(self, serving: asyncio.Task[None]) -> None:
        self._closing.set()
        self.http.stop()
        await asyncio.wait({serving}, timeout=2 * CLOSE_TIMEOUT)
        await _cancel(serving)
        self.http.close()

    async def _watch(self) -> None:
        """Refresh readiness, and report to the service manager."""
        interval = min(WATCH_INTERVAL, (self._notifier.watchdog_seconds or math.inf) / 2)
        opening = asyncio.create_task(self.buffer.wait_until_open(), name="opening")
        try:
            while True:
                self.status.refresh()
                if opening.done():
                    self._report()
                    await self._clock.sleep(interval)
                else:  # opening the spool may take long on a slow or full disk
                    self._notifier.starting(60 * WATCH_INTERVAL)
                    await asyncio.wait({opening}, timeout=WATCH_INTERVAL)
        finally:
            await _cancel(opening)

    def _report(self) -> None:
        """Report the start and the status to the service manager, and liveness while reader and writer advance."""
        self._notifier.ready()
        stuck = [name for name, advances in self.status.loops().items() if not advances]
        if stuck:
            self.telemetry.loop_stalled(stuck)
        else:
            self._notifier.alive()
        self._notifier.status(self.status.line())

    async def _drain(self, working: set[asyncio.Task[None]], request: StopRequest) -> None:
        """Wait until the buffer is empty or on disk, the stop timeout is over, or an immediate stop is requested."""
        ends: list[Callable[[], Awaitable[Any]]] = [
            self.buffer.wait_until_empty,
            self.buffer.wait_until_safe,
            request.hurry.wait,
        ]
        if self._publisher is not None:
            ends.append(self._publisher.wait_until_published)
        waiting = [asyncio.ensure_future(until()) for until in ends]
        await asyncio.wait(
            {*waiting, *working}, timeout=self._settings.stop_timeout, return_when=asyncio.FIRST_COMPLETED
        )
        await _cancel(*waiting)

    async def _wait_for_spool(self, spooling: asyncio.Task[None]) -> None:
        """Wait until the spool is open, unless its disk fails."""
        opening = asyncio.create_task(self.buffer.wait_until_open(), name="opening")
        timeout = 0 if self.buffer.blocked_by else self._settings.stop_timeout
        await asyncio.wait({opening, spooling}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        await _cancel(opening)

    def _report_rest(self) -> int:
        """Log the batches that the next start will write, and return the number of lost messages."""
        if self.buffer.spooled_batches:
            self.telemetry.spool_not_empty(batches=self.buffer.spooled_batches, size=self.buffer.spooled_bytes)
        lost = self.buffer.in_memory
        messages = sum(batch.count + len(batch.rejections) for batch in lost)
        if lost:
            self.telemetry.messages_lost(batches=len(lost), messages=messages)
        return messages


def new_publisher(
    settings: Settings, *, buffer: Buffer, clock: Clock, telemetry: Telemetry, liveness: LivenessDeadline
) -> Publisher:
    """Return the publisher; only it needs the library of NATS. Raises ConfigurationError if that is not installed."""
    require_nats()
    from ingestor.service.publisher import Publisher  # noqa: PLC0415 - the daemon does without it otherwise

    return Publisher(settings, buffer=buffer, clock=clock, telemetry=telemetry, liveness=liveness)


async def _cancel(*tasks: asyncio.Task[object]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
