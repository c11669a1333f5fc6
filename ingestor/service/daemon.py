"""The daemon: wires stream, buffer and store, runs them, and stops them in order."""

from __future__ import annotations

import asyncio
import contextlib
import sys

from ingestor import __version__
from ingestor.buffer import Buffer
from ingestor.buffer.memory import MemoryBuffer
from ingestor.clock import Clock, SystemClock
from ingestor.coverage.calendar import load
from ingestor.errors import ConfigurationError, IngestorError, StoreError
from ingestor.service.agreement import differences
from ingestor.service.listener import Listener
from ingestor.service.signals import StopRequest
from ingestor.service.writer import Writer
from ingestor.settings import Settings, variable
from ingestor.store.inspect import inspect
from ingestor.store.postgres import Store
from ingestor.telemetry import Telemetry


class Daemon:
    """One stream, one buffer, one database. `telemetry` tells what it does."""

    def __init__(self, settings: Settings, *, clock: Clock | None = None, telemetry: Telemetry | None = None) -> None:
        self._settings = settings
        self._clock = clock or SystemClock()
        self.telemetry = telemetry or Telemetry()
        self._began = self._clock.wall()
        self.buffer: Buffer = MemoryBuffer(settings.memory_max_bytes)
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
        """Record until a stop is requested; then close the stream, write what is left, and return.

        Raises ConfigurationError when the stream's failure needs a person, and IngestorError when not everything
        could be written within the stop timeout.
        """
        prepare_state_directory(self._settings)
        self.telemetry.started(
            version=__version__, endpoint=self._settings.stream_url, instance=self._settings.instance
        )
        listening = asyncio.create_task(self._listener.run(), name="listener")
        writing = asyncio.create_task(self._write(), name="writer")
        stop = asyncio.create_task(request.stop.wait(), name="stop")
        try:
            await asyncio.wait({listening, writing, stop}, return_when=asyncio.FIRST_COMPLETED)
            self.telemetry.stopping(waiting_batches=self.buffer.depth)
            await _cancel(listening)
            abandoned = await self._drain(writing, request)
        finally:
            await _cancel(listening, writing, stop)
            await self._store.close()
        for task in (listening, writing):
            if not task.cancelled():
                task.result()
        if abandoned:
            raise IngestorError(
                f"{abandoned} messages could not be written before the process had to end; that time is a gap."
            )
        self.telemetry.stopped(ticks=self.telemetry.counts.ticks_written)

    async def _write(self) -> None:
        await self._writer.end_crashed_sessions(before=self._began)
        await self._compare()
        await self._writer.run()

    async def _compare(self) -> None:
        """Say where the views of the database were told something else than this environment says."""
        with contextlib.suppress(StoreError):  # if the database has just gone away, the writer will say so
            facts = await inspect(self._settings.read_database_url(), timeout=self._settings.write_timeout)
            for difference in differences(self._settings, facts.schema) if facts.schema else ():
                self.telemetry.warned("settings_differ", detail=difference)

    async def _drain(self, writing: asyncio.Task[None], request: StopRequest) -> int:
        """Wait until the buffer is empty, within the stop timeout or until somebody is in a hurry.

        Returns how many messages are left.
        """
        hurry = asyncio.create_task(request.hurry.wait(), name="hurry")
        empty = asyncio.create_task(self.buffer.wait_until_empty(), name="empty")
        await asyncio.wait(
            {hurry, empty, writing},
            timeout=self._settings.stop_timeout,
            return_when=asyncio.FIRST_COMPLETED,
        )
        await _cancel(hurry, empty)
        if not self.buffer.depth:
            return 0
        batches = await self.buffer.take(max_rows=sys.maxsize, max_bytes=sys.maxsize)
        messages = sum(batch.count + len(batch.rejections) for batch in batches)
        self.telemetry.abandoned(batches=len(batches), messages=messages)
        return messages


def prepare_state_directory(settings: Settings) -> None:
    """Make the directory of the daemon's own files. Raises ConfigurationError where that can't be done."""
    directory = settings.state_path("")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        (directory / "accepted").touch(mode=0o600)
    except OSError as error:
        raise ConfigurationError(
            f"{variable('spool_dir')}: {directory} is not a directory that can be written to: {error.strerror}."
        ) from None


async def _cancel(*tasks: asyncio.Task[object]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
