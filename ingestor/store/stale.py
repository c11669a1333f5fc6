"""Notes late data: the minutes whose stored bars must be computed again, and the days that have changed."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import asyncpg

from ingestor.batch import unpack
from ingestor.clock import from_datetime, to_datetime
from ingestor.model import DAY, SECOND, Batch, Micros
from ingestor.store.queries import QUERIES

_MINUTE = 60 * SECOND

DELAYED = 5 * SECOND
"""A batch that is committed this long after its last message is noted as a change of its days."""


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


async def note_delayed(connection: asyncpg.Connection, batches: Sequence[Batch], now: Micros) -> None:
    """Note the days of what arrived long before this commit, by the clock that stamped it.

    A reader who looked between arrival and commit did not see it; by its arrival it would look older than that.
    """
    changed = {instant for batch in batches if _is_delayed(batch, now) for instant in _instants(batch)}
    if changed:
        await connection.execute(QUERIES["note_changes"], [to_datetime(instant) for instant in sorted(changed)])


def _is_delayed(batch: Batch, now: Micros) -> bool:
    return batch.last_message_at is not None and batch.last_message_at < now - DELAYED


def _instants(batch: Batch) -> set[Micros]:
    """Return instants of which at least one lies in each day of the batch's ticks and rejections."""
    instants = {rejection.received_at for rejection in batch.rejections}
    if batch.span is not None and batch.span[1] - batch.span[0] < DAY:
        return instants | set(batch.span)
    return instants | {tick.time for _, tick, _ in unpack(batch.rows)}
