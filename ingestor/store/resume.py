"""Reads where the recording of a relay goes on."""

from __future__ import annotations

from ingestor.clock import from_datetime
from ingestor.model import Micros, ResumePoint
from ingestor.store.connect import connect
from ingestor.store.connection import GuardedConnection
from ingestor.store.queries import QUERIES


async def resume_state(url: str, address: str, *, timeout: float) -> tuple[ResumePoint | None, tuple[Micros, ...]]:
    """Return the last stored point of a relay's address (None: none), and the starts of the gaps of the last week.

    Raises StoreError.
    """
    connection = await connect(url, timeout=timeout, application_name="ingestor resume")
    guarded = GuardedConnection(connection, timeout)
    try:
        async with guarded as connection, connection.transaction(isolation="repeatable_read", readonly=True):
            row = await connection.fetchrow(QUERIES["resume_point"], address)
            gaps = await connection.fetch(QUERIES["gaps_to_close"])
    finally:
        await guarded.close()
    point = None if row is None else ResumePoint(row["cursor"], from_datetime(row["covered_until"]))
    return point, tuple(from_datetime(gap["started_at"]) for gap in gaps)
