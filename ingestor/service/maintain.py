"""What has to be done now and then: the calendar, and partitions ahead."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from importlib.util import find_spec

import sqlalchemy as sa

from ingestor.coverage.calendar import DAYS_AHEAD, RENEW, TradingSession, xnze
from ingestor.errors import SchemaError, StoreError
from ingestor.settings import Settings
from ingestor.store import schema
from ingestor.store.connect import create_engine
from ingestor.store.judge import MIGRATE, hint
from ingestor.store.migrate import OWNER
from ingestor.store.upkeep import keep_calendars, make_partitions


async def maintain(settings: Settings, report: Callable[[str], None]) -> None:
    """Do all of it once; `report` is told what was done in sentences. Raises StoreError."""
    today = datetime.now(UTC).date()
    source, known = known_sessions()
    engine = create_engine(settings.read_database_url())
    try:
        async with engine.begin() as connection:
            row = (await connection.execute(sa.select(schema.settings))).one_or_none()
            if row is None:
                raise SchemaError("The database's settings were never written.", hint=MIGRATE)
            changes = await keep_calendars(connection, row.exchange_timezone, known, today)
            made = await make_partitions(connection, today)
            last = await connection.scalar(
                sa.select(sa.func.max(schema.trading_sessions.c.trading_day)).where(
                    schema.trading_sessions.c.calendar == row.calendar
                )
            )
    except sa.exc.DBAPIError as error:
        sqlstate = getattr(error.orig, "sqlstate", None)
        advice = OWNER.replace("Migrate", "Maintain") if sqlstate == "42501" else hint(sqlstate)
        raise StoreError(f"Maintenance failed: {error.orig}.", sqlstate=sqlstate, hint=advice) from error
    finally:
        await engine.dispose()
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
