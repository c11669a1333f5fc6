"""Replays recorded messages through the stream's decoder, batcher, buffer and store."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import Callable, Iterator
from io import BufferedIOBase
from pathlib import Path

from ingestor.buffer.fifo import Buffer
from ingestor.clock import Clock, SystemClock
from ingestor.errors import IngestorError
from ingestor.model import EndReason
from ingestor.redaction import outside_text
from ingestor.service.recorder import new_recorder
from ingestor.service.writer import Writer
from ingestor.settings import Settings
from ingestor.store.ticks import TickStore
from ingestor.stream.decoder import MAX_MESSAGE_BYTES, Decoder
from ingestor.telemetry.events import Counts, Telemetry

LINES_AT_A_TIME = 1000
Progress = Callable[[int], None]
"""Called with the number of bytes read from the file on disk."""


async def replay(path: Path, settings: Settings, *, progress: Progress, clock: Clock | None = None) -> Counts:
    """Write a file's messages to the database, and return the counts.

    The session has the kind `replay`, which never counts as coverage. The arrival of each message is now. Raises
    StoreError if the database can't be written to at the start, and IngestorError if the file can't be read; messages
    read before are written.
    """
    clock = clock or SystemClock()
    telemetry = Telemetry()
    buffer = Buffer(memory_max_bytes=settings.memory_max_bytes, clock=clock, telemetry=telemetry)
    store = TickStore(
        settings.read_database_url(),
        write_timeout=settings.write_timeout,
        clock=clock,
        on_lock_wait=telemetry.lock_waited,
    )
    await store.open()
    writer = Writer(store, buffer=buffer, clock=clock, telemetry=telemetry, instance=settings.instance)
    writing = asyncio.create_task(writer.run(), name="writer")
    recorder = new_recorder(
        settings,
        endpoint=path.name,
        kind="replay",
        clock=clock,
        decoder=Decoder(settings.exchange_timezone),
        buffer=buffer,
        telemetry=telemetry,
    )
    try:
        for frames in _chunks(path, progress):
            for frame in frames:
                recorder.frame(frame)
            await asyncio.sleep(0)  # let the writer run
            if buffer.size > settings.memory_max_bytes / 2:
                await _wait_until_written(buffer, writing)
    finally:
        recorder.end(EndReason.FINISHED)
        await _wait_until_written(buffer, writing)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        await store.close()
        await buffer.close()
    return telemetry.counts


async def _wait_until_written(buffer: Buffer, writing: asyncio.Task[None]) -> None:
    """Wait until the buffer is empty. Raises the writer's error if it ended."""
    empty = asyncio.create_task(buffer.wait_until_empty(), name="empty")
    await asyncio.wait({empty, writing}, return_when=asyncio.FIRST_COMPLETED)
    empty.cancel()
    if writing.done():
        writing.result()


def _chunks(path: Path, progress: Progress) -> Iterator[list[bytes]]:
    """Yield up to `LINES_AT_A_TIME` lines of the file at a time, without line ends and empty lines."""
    try:
        with path.open("rb") as raw:
            stream = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            while lines := _read(stream):
                yield [line for line in lines if line]
                progress(raw.tell())
    except (OSError, EOFError, zlib.error) as error:
        raise IngestorError(f"{outside_text(path)} cannot be read: {outside_text(error)}") from error


def _read(stream: BufferedIOBase) -> list[bytes]:
    """Return the next lines. A line longer than a message may be is cut just above that size, so it is rejected."""
    lines: list[bytes] = []
    while len(lines) < LINES_AT_A_TIME and (line := stream.readline(MAX_MESSAGE_BYTES + 1)):
        rest = line
        while not rest.endswith(b"\n") and (rest := stream.readline(MAX_MESSAGE_BYTES)):
            pass
        lines.append(line.rstrip(b"\r\n"))
    return lines
