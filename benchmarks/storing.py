"""The store and the spool without a stream, with batches packed before the measurement starts."""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.frames import Load, payloads, ticks
from benchmarks.stage import Database
from ingestor.batch import COLUMNS, COPY_HEADER, COPY_TRAILER, Batcher
from ingestor.buffer.fifo import Buffer
from ingestor.buffer.spool import Spool
from ingestor.clock import SystemClock
from ingestor.model import Batch, Session
from ingestor.service.recorder import new_session_id
from ingestor.service.writer import Writer
from ingestor.settings import load_settings
from ingestor.store.ticks import TickStore
from ingestor.telemetry.events import Telemetry


def batches(count: int) -> list[Batch]:
    """Return `count` ticks as batches of one session; all but the last are full."""
    settings = load_settings()
    at = SystemClock().wall()
    session = Session(new_session_id(at), "bench", "ws://localhost/", at, "replay")
    batcher = Batcher(session, max_rows=settings.batch_max_rows, occurrence_keys=settings.occurrence_keys)
    made: list[Batch] = []
    for tick in ticks(payloads(Load(count)), at):
        at += 1
        batcher.add(tick, at)
        if batcher.is_full:
            made.append(batcher.close())
    return [*made, batcher.close()]


def by_store(database: Database, made: Sequence[Batch]) -> float:
    """Write the batches from a buffer in memory, combined as the buffer does; return seconds."""

    async def write() -> float:
        buffer = Buffer(memory_max_bytes=2**40, clock=SystemClock(), telemetry=Telemetry())
        for batch in made:
            buffer.put(batch)
        store = TickStore(database.url, write_timeout=60)
        await store.open()
        began = time.perf_counter()
        while buffer.size:
            await store.write(await buffer.take())
            await buffer.acknowledge()
        seconds = time.perf_counter() - began
        await store.close()
        return seconds

    return asyncio.run(write())


def by_psql(database: Database, made: Sequence[Batch]) -> float:
    """Copy the same rows from a file by psql, in one transaction; return seconds."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(COPY_HEADER + b"".join(batch.rows for batch in made) + COPY_TRAILER)
        file.flush()
        copy = f"\\copy market.ticks ({', '.join(COLUMNS)}) FROM '{file.name}' WITH (FORMAT binary)"
        began = time.perf_counter()
        subprocess.run(["psql", database.url, "--quiet", "--no-psqlrc", "--command", copy], check=True)
        return time.perf_counter() - began


def by_spool(database: Database, made: Sequence[Batch]) -> float:
    """Write the batches from a spool that an earlier process left; return seconds."""

    async def write(directory: Path) -> float:
        earlier = _buffer(directory)
        earlier.claim()
        await earlier.open()
        for batch in made:
            earlier.put(batch)
            if earlier.size > 2**25:
                await earlier.spool_all()
        await earlier.spool_all()
        await earlier.close()
        buffer = _buffer(directory)
        buffer.claim()
        await buffer.open()
        store = TickStore(database.url, write_timeout=60)
        await store.open()
        writer = Writer(store, buffer=buffer, clock=SystemClock(), telemetry=Telemetry(), instance="bench")
        began = time.perf_counter()
        await writer.write_inherited()
        seconds = time.perf_counter() - began
        await store.close()
        await buffer.close()
        return seconds

    with tempfile.TemporaryDirectory() as directory:
        return asyncio.run(write(Path(directory)))


def _buffer(directory: Path) -> Buffer:
    return Buffer(
        memory_max_bytes=2**30,
        clock=SystemClock(),
        telemetry=Telemetry(),
        spool=Spool(directory),
        spool_max_bytes=2**34,
        spool_after=3600,
    )
