"""SQLAlchemy's way to the database, by the same URL. Apart, because the daemon has no use for its 30 MB."""

from __future__ import annotations

import asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from ingestor.store.connect import connect


def create_engine(url: str) -> AsyncEngine:
    """Return a SQLAlchemy engine that connects by the same URL in the same way.

    SQLAlchemy's own reading of a URL knows neither `sslmode` nor several hosts. Prepared statements have no name, since
    one with a name stays on the session, which behind a pooler is somebody else's next.
    """

    async def creator() -> asyncpg.Connection:
        return await connect(url, application_name="ingestor migrate", read_write=True)

    return create_async_engine(
        "postgresql+asyncpg://",
        async_creator=creator,
        poolclass=NullPool,
        isolation_level="READ COMMITTED",
        connect_args={"prepared_statement_cache_size": 0, "prepared_statement_name_func": lambda: ""},
    )
