"""`ingestor write` as a process: the writer of the replicated buffer, its rollup, and its health."""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import Any

from ingestor import __version__
from ingestor.clock import Clock, SystemClock, to_datetime
from ingestor.service.process import StopRequest
from ingestor.service.roller import Roller
from ingestor.service.stream_writer import StreamWriter
from ingestor.service.systemd import SystemdNotifier
from ingestor.settings import Settings
from ingestor.telemetry.buffer_events import BufferEvents
from ingestor.telemetry.buffer_metrics import new_write_registry
from ingestor.telemetry.events import Telemetry
from ingestor.telemetry.liveness import LIVENESS_STEP_SECONDS, LivenessDeadline
from ingestor.telemetry.log import log_suppressed_lines
from ingestor.web.app import make_health_app
from ingestor.web.hosts import Hosts
from ingestor.web.server import CLOSE_TIMEOUT, HttpServer

WATCH_INTERVAL = 1.0
"""Seconds between two reports to the service manager."""


class WriteService:
    """Runs one `StreamWriter`. `telemetry`, `events` and `http` report on it."""

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Clock | None = None,
        telemetry: Telemetry | None = None,
        hole_seconds: float | None = None,
    ) -> None:
        self._settings = settings
        self._clock = clock or SystemClock()
        self.telemetry = telemetry or Telemetry(self._clock)
        self.telemetry.readiness.fails("stream", "The stream of NATS has not been read yet.")
        self.events = BufferEvents(self._clock, self.telemetry.readiness, "stream")
        self._writing = LivenessDeadline(self._clock, LIVENESS_STEP_SECONDS + 2 * settings.write_timeout)
        options = {} if hole_seconds is None else {"hole_seconds": hole_seconds}
        self.writer = StreamWriter(
            settings,
            clock=self._clock,
            telemetry=self.telemetry,
            events=self.events,
            liveness=self._writing,
            **options,
        )
        self._roller = Roller(settings, buffer=self.writer, clock=self._clock, telemetry=self.telemetry)
        self._notifier = SystemdNotifier()
        self.http = HttpServer(settings.http_host, settings.write_http_port, port_setting="write_http_port")

    # For the health endpoints.

    def loops(self) -> dict[str, bool]:
        """Return whether each loop advances."""
        return {"writer": not self._writing.is_stuck}

    def readiness(self) -> dict[str, Any]:
        """Return whether the stream is read and the database answers, and otherwise why not."""
        problems = [
            {
                "check": problem.check,
                "since": to_datetime(problem.since).isoformat(timespec="milliseconds"),
                "detail": problem.detail,
            }
            for problem in self.telemetry.readiness.problems
        ]
        return {"ready": not problems, "problems": problems}

    # The process.

    async def run(self, request: StopRequest) -> None:
        """Write until a stop is requested. Raises ConfigurationError or DatabaseAccessError if an operator must act."""
        self.http.bind()
        self.telemetry.started(
            version=__version__,
            buffer=self._settings.buffer_url,
            stream=self._settings.buffer_stream,
            instance=self._settings.instance,
        )
        self.telemetry.http_listening(self.http.url)
        link = asyncio.create_task(self.writer.link.run(), name="link")
        tasks = {
            link,
            asyncio.create_task(self.writer.run(), name="writer"),
            asyncio.create_task(self._watch(), name="watch"),
            asyncio.create_task(self._serve_health(), name="http"),
        }
        if self._settings.rollup:
            tasks.add(asyncio.create_task(self._roll_up(), name="roller"))
        stop = asyncio.create_task(request.stop.wait(), name="stop")
        try:
            await asyncio.wait({*tasks, stop}, return_when=asyncio.FIRST_COMPLETED)
            self._notifier.stopping()
            self.telemetry.stopping(signal=request.signal)
        finally:
            await self._stop({*tasks, stop}, link)
        for task in tasks:
            if not task.cancelled():
                task.result()
        self.telemetry.stopped()

    async def _stop(self, tasks: set[asyncio.Task[Any]], link: asyncio.Task[None]) -> None:
        self.http.stop()
        await asyncio.wait({task for task in tasks if task.get_name() == "http"}, timeout=2 * CLOSE_TIMEOUT)
        await self.writer.store.give_up()
        await self._roller.give_up()
        for task in tasks - {link}:
            task.cancel()
        await asyncio.gather(*(tasks - {link}), return_exceptions=True)
        await self.writer.close()
        link.cancel()
        await asyncio.gather(link, return_exceptions=True)
        self.http.close()
        self._notifier.close()
        log_suppressed_lines(at_once=True)

    async def _roll_up(self) -> None:
        """Store bars while this is the active writer."""
        while True:
            active = asyncio.Event()
            while not self.events.is_active:
                await self._clock.sleep(WATCH_INTERVAL)
            active.set()
            rolling = asyncio.create_task(self._roller.run(active), name="rolling")
            try:
                while self.events.is_active:
                    await self._clock.sleep(WATCH_INTERVAL)
            finally:
                rolling.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await rolling

    async def _serve_health(self) -> None:
        registry = new_write_registry(self.telemetry, self.events)
        hosts = Hosts([self._settings.http_host, *self._settings.http_hosts])
        await self.http.serve(make_health_app(self, registry, hosts))

    async def _watch(self) -> None:
        """Report to the service manager."""
        interval = min(WATCH_INTERVAL, (self._notifier.watchdog_seconds or math.inf) / 2)
        while True:
            self._notifier.ready()
            if all(self.loops().values()):
                self._notifier.alive()
            else:
                self.telemetry.loop_stalled(["writer"])
            self._notifier.status(self._line())
            await self._clock.sleep(interval)

    def _line(self) -> str:
        state = "active" if self.events.is_active else "standby"
        lag = "" if self.events.state is None else f", {self.events.state.lag or 0:,} messages waiting"
        problems = "".join(f"; {each.check}: {each.detail}" for each in self.telemetry.readiness.problems)
        return f"{state}, {self.telemetry.counts.ticks_recovered:,} ticks written{lag}{problems}"
