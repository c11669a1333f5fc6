"""Notes the minutes of late ticks, whose stored bars must be computed again."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import asyncpg

from ingestor.batch import unpack
from ingestor.clock import from_datetime, to_datetime
from ingestor.model import SECOND, Batch
from ingestor.store.queries import QUERIES

_MINUTE = 60 * SECOND


async def note_stale(connection: asyncpg.Connection, batches: Sequence[Batch], noted_before: datetime | None) -> None:
    """Note the minutes of the batches' ticks that are older than `noted_before`, in the transaction of the ticks.

    None: no bar is stored. The views compute the noted minutes from ticks until `ingest.repair_bars` has stored them.
    """
    if noted_before is None:
        return
    limit = from_datetime(noted_before)
    stale = {
        (tick.symbol, tick.time // _MINUTE * _MINUTE)
        for batch in batches
        if batch.span and batch.span[0] < limit
        for _, tick, _ in unpack(batch.rows)
        if tick.time < limit
    }
    if stale:
        symbols, minutes = zip(*stale, strict=True)
        await connection.execute(QUERIES["note_stale"], symbols, [to_datetime(minute) for minute in minutes])
