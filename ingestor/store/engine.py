"""SQLAlchemy's way to the database, by the same URL. Apart, because the daemon has no use for its 30 MB."""

from __future__ import annotations

import asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from ingestor.store.connect import connect


def create_engine(url: str) -> AsyncEngine:
    """Return a SQLAlchemy engine that connects by the same URL in the same way.

    SQLAlchemy's own reading of a URL knows neither `sslmode` nor several hosts.
    """

    async def creator() -> asyncpg.Connection:
        return await connect(url, application_name="ingestor migrate", read_write=True)

    return create_async_engine("postgresql+asyncpg://", async_creator=creator, poolclass=NullPool)
