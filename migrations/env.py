"""Runs the migrations: by the `alembic` command with INGESTOR_DATABASE_URL, or by `ingestor migrate`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from alembic import context
from sqlalchemy import Connection, text

from ingestor import settings
from ingestor.admin.engine import create_engine
from ingestor.admin.schema import SCHEMAS, metadata
from ingestor.store.waiting import LockWatch
from ingestor.telemetry.unexpected import redact_tracebacks

LOCK = 7_306_354_014  # any number, the same for all: instances that start at once migrate one after the other
TABLES = {table.fullname for table in metadata.tables.values()}


def include_name(name: str | None, kind: Any, parents: Mapping[Any, str | None]) -> bool:
    """Look at our own tables only: not at partitions, chunks, the index on time, or anybody else's schemas."""
    if kind == "schema":
        return name in SCHEMAS
    if kind == "table":
        return f"{parents['schema_name']}.{name}" in TABLES
    if kind == "index":
        return name not in {"ticks_time_idx", "ticks_received_at_idx"}
    return True


def migrate(connection: Connection) -> None:
    """Run what was asked for in one transaction, which holds the lock: it ends with it, whatever happens."""
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})
    connection.execute(text("CREATE SCHEMA IF NOT EXISTS ingest"))
    context.configure(
        connection=connection,
        target_metadata=metadata,
        version_table_schema="ingest",
        include_schemas=True,
        include_name=include_name,
        compare_server_default=True,
    )
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()


async def main() -> None:
    """Migrate by the URL of the environment."""
    given = settings.load_settings()
    context.config.attributes["exchange_timezone"] = given.exchange_timezone
    url = given.read_database_url()
    engine = create_engine(url)
    with LockWatch(url).watching():
        async with engine.connect() as connection:
            await connection.run_sync(migrate)
    await engine.dispose()


if context.is_offline_mode():
    raise SystemExit("ingestor: the migrations look at the database to find its edition: run them without --sql.")
if (given := context.config.attributes.get("connection")) is not None:
    migrate(given)
else:
    redact_tracebacks()
    asyncio.run(main())
