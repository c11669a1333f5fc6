"""The regular work of `ingestor maintain`: calendar, partitions ahead, stale bars, retention, keys."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from importlib.util import find_spec

import sqlalchemy as sa

from ingestor.admin import schema
from ingestor.admin.calendars import keep_calendars, last_trading_day
from ingestor.admin.engine import as_owner, database_now
from ingestor.admin.keys import rebuild_keys
from ingestor.admin.migrate import keep_bars
from ingestor.admin.partitions import make_partitions
from ingestor.admin.retention import drop_old
from ingestor.coverage.calendar import DAYS_AHEAD, RENEW, TradingSession, xnze
from ingestor.errors import SchemaError
from ingestor.settings import Settings
from ingestor.store.retry import MIGRATE


async def maintain(settings: Settings, report: Callable[[str], None]) -> None:
    """Do all of it once; `report` gets the results as sentences. Raises StoreError."""
    source, known = known_sessions()
    url = settings.read_database_url()
    async with as_owner(url, failure="Maintenance failed", verb="Maintain") as engine:
        async with engine.begin() as connection:
            row = (await connection.execute(sa.select(schema.settings))).one_or_none()
            if row is None:
                raise SchemaError("The database's settings were never written.", hint=MIGRATE)
            today = (await database_now(connection)).date()
            changes = await keep_calendars(connection, row.exchange_timezone, known, today)
            made = await make_partitions(connection, today)
            last = await last_trading_day(connection, row.calendar)
        _say(report, source, changes, made, last, today)
        await keep_bars(url, engine, settings, report)
        if settings.retention is not None:
            await drop_old(engine, timedelta(seconds=settings.retention), report)
        await rebuild_keys(engine, report)


def _say(
    report: Callable[[str], None], source: str, changes: int, made: list[date], last: date | None, today: date
) -> None:
    report(f"Calendar from {source}: {changes} trading sessions changed, known until {last}.")
    report(f"Partitions made: {', '.join(f'{month:%Y-%m}' for month in made) or 'none was missing'}.")
    left = (last - today).days if last else 0
    if left < DAYS_AHEAD:
        report(f"Warning: the calendar ends in {left} days. {RENEW}")


def known_sessions() -> tuple[str, list[TradingSession]]:
    """Return the sessions of XNZE and where they come from: exchange-calendars if it is there, else the snapshot."""
    if find_spec("exchange_calendars") is None:
        return "the bundled snapshot", list(xnze())
    from ingestor.coverage import snapshot  # noqa: PLC0415 - it imports pandas, which takes seconds

    return f"exchange-calendars {snapshot.VERSION}", snapshot.sessions(datetime.now(UTC).date())
