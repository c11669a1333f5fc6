"""Writes the log of commits: the rows that a transaction really inserted, for the relays that follow it.

The log is written while a relay is registered, in the transaction of the ticks. Writers take turns, so the ids of the
log are in the order of commits.
"""

from __future__ import annotations

from collections.abc import Sequence

import asyncpg

from ingestor.model import Batch
from ingestor.store.copy_in import count_of
from ingestor.store.queries import QUERIES


async def log_batches(connection: asyncpg.Connection, batches: Sequence[Batch]) -> None:
    """Log all rows of one session's batches."""
    last = batches[-1]
    ticks = sum(batch.count for batch in batches)
    await connection.execute(
        QUERIES["log_rows"], last.session.id, last.number, ticks, b"".join(batch.rows for batch in batches)
    )


async def insert_staged(connection: asyncpg.Connection, last: Batch, *, is_logged: bool) -> int:
    """Insert those staged rows that are not stored yet, log them if `is_logged`, and return their number."""
    if not is_logged:
        return count_of(await connection.execute(QUERIES["insert_staged"]))
    inserted: int = await connection.fetchval(QUERIES["insert_staged_and_log"], last.session.id, last.number)
    return inserted
