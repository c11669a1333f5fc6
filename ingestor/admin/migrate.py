"""Brings a database to the newest schema, and fills what SQL must know. Idempotent."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from ingestor import coverage
from ingestor.admin import schema
from ingestor.admin.aggregates import columnstore_after, has_aggregates, keep_aggregates
from ingestor.admin.bars import store_bars
from ingestor.admin.calendars import keep_calendars, last_trading_day
from ingestor.admin.engine import as_owner, database_now, without_transactions
from ingestor.admin.partitions import make_partitions
from ingestor.coverage.calendar import xnze
from ingestor.errors import ConfigurationError
from ingestor.settings import SHARED, Settings


def configuration() -> Config:
    """Return Alembic's configuration, in a checkout and in an installed package alike."""
    package = Path(coverage.__file__).parents[1]
    places = (package / "migrations", package.parent / "migrations")
    for place in places:
        if (place / "env.py").exists():
            config = Config()
            config.set_main_option("script_location", str(place).replace("%", "%%"))
            config.set_main_option("path_separator", "os")
            return config
    raise ConfigurationError(f"The migrations are missing from this installation: looked at {places[0]}.")


def head_revision() -> str:
    """Return the newest revision that this package can migrate to."""
    head = ScriptDirectory.from_config(configuration()).get_current_head()
    assert head is not None
    return head


async def migrate(url: str, settings: Settings, report: Callable[[str], None]) -> None:
    """Bring the schema to head, then write settings, trading sessions and partitions that are missing.

    `report` gets each step as a sentence. Raises StoreError.
    """
    async with _reporting(report), as_owner(url, failure="The migration failed", verb="Migrate") as engine:
        async with engine.connect() as connection:
            before = await _revision(connection)
            await connection.run_sync(_upgrade, settings.exchange_timezone)
            after = await _revision(connection)
            if before == after:
                report(f"The schema is at revision {after} already.")
            else:
                report(f"The schema went from {before or 'nothing'} to revision {after}.")
            await _fill(connection, settings, report)
        await keep_bars(url, engine, settings, report)


async def keep_bars(url: str, engine: AsyncEngine, settings: Settings, report: Callable[[str], None]) -> None:
    """Store the bars that are missing or stale: by continuous aggregates and their policies, or in tables."""
    async with engine.connect() as connection:
        are_aggregates = await has_aggregates(connection)
    if not are_aggregates:
        await store_bars(url, report)
        return
    async with without_transactions(engine) as connection:
        await keep_aggregates(connection, columnstore_after(settings), report)


def _upgrade(connection: sa.Connection, exchange_timezone: str) -> None:
    config = configuration()
    config.attributes.update(connection=connection, exchange_timezone=exchange_timezone)
    command.upgrade(config, "head")


async def _revision(connection: AsyncConnection) -> str | None:
    found = await connection.scalar(sa.text("SELECT to_regclass('ingest.alembic_version')::text"))
    revision: str | None = (
        await connection.scalar(sa.text("SELECT version_num FROM ingest.alembic_version")) if found else None
    )
    await connection.rollback()
    return revision


async def _fill(connection: AsyncConnection, settings: Settings, report: Callable[[str], None]) -> None:
    async with connection.begin():
        today = (await database_now(connection)).date()
        ours = {column: getattr(settings, name) for column, name in SHARED.items()}
        values = {
            column: timedelta(seconds=value) if isinstance(value, float) else value for column, value in ours.items()
        }
        written = await connection.execute(insert(schema.settings).values(values).on_conflict_do_nothing())
        if written.rowcount:
            report(f"The calendar in force is {settings.exchange_calendar}, in {settings.exchange_timezone}.")
        await keep_calendars(connection, settings.exchange_timezone, xnze(), today, correct=False)
        made = await make_partitions(connection, today)
    if made:
        report(f"Partitions were made for {', '.join(f'{month:%Y-%m}' for month in made)}.")
    last = await last_trading_day(connection, settings.exchange_calendar)
    report(f"Trading sessions are known until {last}.")


@contextlib.asynccontextmanager
async def _reporting(report: Callable[[str], None]) -> AsyncIterator[None]:
    """Pass on what the migrations have to say, meanwhile."""
    log, handler = logging.getLogger("ingestor.migrations"), _Reporter(report)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


class _Reporter(logging.Handler):
    """Passes on what a migration has to say."""

    def __init__(self, report: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        self._report(record.getMessage())
