"""Makes the monthly partitions of the ticks before they are needed."""

from __future__ import annotations

from datetime import date

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from ingestor.store.ticks import months_ahead


async def make_partitions(connection: AsyncConnection, today: date) -> list[date]:
    """Make the partitions of this month and of those ahead, where they are missing; return their months."""
    return [
        month
        for month in months_ahead(today)
        if await connection.scalar(sa.text("SELECT ingest.ensure_partition(:month)"), {"month": month})
    ]
