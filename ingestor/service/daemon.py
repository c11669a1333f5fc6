"""The daemon: wires stream, buffer and store, runs them, and stops them in order."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from datetime import UTC, datetime

from ingestor import __version__
from ingestor.buffer.fifo import Buffer
from ingestor.buffer.spool import Spool
from ingestor.clock import Clock, SystemClock
from ingestor.coverage.calendar import DAYS_AHEAD, RENEW, load
from ingestor.errors import ConfigurationError, IngestorError, StoreError
from ingestor.model import SECOND
from ingestor.service.agreement import differences
from ingestor.service.listener import Listener
from ingestor.service.signals import StopRequest
from ingestor.service.writer import Writer
from ingestor.settings import Settings, variable
from ingestor.store.inspect import SchemaFacts, inspect
from ingestor.store.postgres import Store
from ingestor.telemetry import Telemetry

LOOK_AGAIN = 86_400.0
"""Seconds between two looks at what changes slowly."""


class Daemon:
    """One stream, one buffer, one database. `telemetry` tells what it does."""

    def __init__(self, settings: Settings, *, clock: Clock | None = None, telemetry: Telemetry | None = None) -> None:
        self._settings = settings
        self._clock = clock or SystemClock()
        self.telemetry = telemetry or Telemetry()
        self._began = self._clock.wall()
        self._writes = asyncio.Event()
        self.buffer = Buffer(
            memory_max_bytes=settings.memory_max_bytes,
            clock=self._clock,
            telemetry=self.telemetry,
            spool=Spool(settings.state_path("")),
            spool_max_bytes=settings.spool_max_bytes,
            spool_after=settings.spool_after,
        )
        self._store = Store(settings.read_database_url(), write_timeout=settings.write_timeout, clock=self._clock)
        self._writer = Writer(
            self._store,
            buffer=self.buffer,
            clock=self._clock,
            telemetry=self.telemetry,
            instance=settings.instance,
        )
        self._listener = Listener(
            settings,
            buffer=self.buffer,
            calendar=load(settings.exchange_calendar, settings.exchange_timezone),
            clock=self._clock,
            telemetry=self.telemetry,
        )

    async def run(self, request: StopRequest) -> None:
        """Record until a stop is requested; then close the stream, write or spool what is left, and return.

        Raises ConfigurationError when the stream's failure needs a person or another process owns the spool, and
        IngestorError when not everything could be kept.
        """
        prepare_state_directory(self._settings)
        self.telemetry.started(
            version=__version__, endpoint=self._settings.stream_url, instance=self._settings.instance
        )
        self.buffer.claim()
        listening = asyncio.create_task(self._listener.run(), name="listener")
        spooling = asyncio.create_task(self._spool(), name="spooler")
        writing = asyncio.create_task(self._write(), name="writer")
        looking = asyncio.create_task(self._look_now_and_then(), name="lookout")
        stop = asyncio.create_task(request.stop.wait(), name="stop")
        try:
            await asyncio.wait({listening, spooling, writing, looking, stop}, return_when=asyncio.FIRST_COMPLETED)
            self.telemetry.stopping(waiting_bytes=self.buffer.size)
            await _cancel(listening)
            await self._drain({writing, spooling}, request)
            await self._wait_for_the_spool(spooling)
            await self.buffer.secure()
        finally:
            await self._store.give_up()
            await _cancel(listening, writing, spooling, looking, stop)
            await self._store.close()
            await self.buffer.close()
        for task in (listening, writing, spooling, looking):
            if not task.cancelled():
                task.result()
        self._account()

    async def _spool(self) -> None:
        await self.buffer.open()  # which may take seconds, in which the stream is heard already
        await self.buffer.run()

    async def _write(self) -> None:
        await self.buffer.wait_until_open()
        await self._writer.write_inherited()
        await self._writer.end_crashed_sessions(before=self._began)
        self._writes.set()
        await self._writer.run()

    async def _look_now_and_then(self) -> None:
        """Once the database answers, and then once a day, look whether a person should know something of it."""
        await self._writes.wait()
        while True:
            with contextlib.suppress(StoreError):  # if the database has just gone away, the writer will say so
                facts = await inspect(self._settings.read_database_url(), timeout=self._settings.write_timeout)
                if facts.schema is not None:
                    self._judge(facts.schema)
            await self._clock.sleep(LOOK_AGAIN)

    def _judge(self, facts: SchemaFacts) -> None:
        """Say where the database's views were told something else than the environment says, and what runs out."""
        for difference in differences(self._settings, facts):
            self.telemetry.warned("settings_differ", detail=difference)
        today = datetime.fromtimestamp(self._clock.wall() / SECOND, UTC).date()
        self.telemetry.calendar_known(days=facts.days_left(today), warn_below=DAYS_AHEAD, remedy=RENEW)

    async def _drain(self, working: set[asyncio.Task[None]], request: StopRequest) -> None:
        """Wait until nothing is left, or all of it is on disk, or the stop timeout is over, or somebody hurries."""
        waiting = [
            asyncio.create_task(until(), name=until.__name__)
            for until in (self.buffer.wait_until_empty, self.buffer.wait_until_safe, request.hurry.wait)
        ]
        await asyncio.wait(
            {*waiting, *working}, timeout=self._settings.stop_timeout, return_when=asyncio.FIRST_COMPLETED
        )
        await _cancel(*waiting)

    async def _wait_for_the_spool(self, spooling: asyncio.Task[None]) -> None:
        """Wait while the spool is still looked through, unless its disk takes nothing."""
        opening = asyncio.create_task(self.buffer.wait_until_open(), name="opening")
        patience = 0 if self.buffer.blocked_by else self._settings.stop_timeout
        await asyncio.wait({opening, spooling}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        await _cancel(opening)

    def _account(self) -> None:
        """Say what is left. Raises IngestorError for what is lost."""
        if self.buffer.spooled_batches:
            self.telemetry.left_in_spool(batches=self.buffer.spooled_batches, size=self.buffer.spooled_bytes)
        lost = self.buffer.in_memory
        if lost:
            messages = sum(batch.count + len(batch.rejections) for batch in lost)
            self.telemetry.abandoned(batches=len(lost), messages=messages)
            raise IngestorError(f"{messages} messages could be written neither to the database nor to the spool.")
        self.telemetry.stopped(ticks=self.telemetry.counts.ticks_written)


def prepare_state_directory(settings: Settings) -> None:
    """Make the directory of the daemon's own files. Raises ConfigurationError where that can't be done."""
    directory = settings.state_path("")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        (directory / "accepted").touch(mode=0o600)
    except OSError as error:
        if error.errno == errno.ENOSPC:  # which may pass, so a service manager is to try again
            raise IngestorError(f"The disk of {directory} is full.", hint="Make room on it.") from None
        raise ConfigurationError(
            f"{variable('spool_dir')}: {directory} is not a directory that can be written to: {error.strerror}."
        ) from None


async def _cancel(*tasks: asyncio.Task[object]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
