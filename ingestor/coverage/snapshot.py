"""Reads the exchange's calendar from the library of the extra `calendar`. Only this module imports it, and pandas.

The command ``python -m ingestor.coverage.snapshot`` rewrites the bundled snapshot; run it once a year.
"""

from __future__ import annotations

from datetime import UTC, date, datetime
from importlib.metadata import version
from pathlib import Path

import exchange_calendars

from ingestor.coverage.calendar import TradingSession, read

VERSION = version("exchange-calendars")

YEARS_BACK = 10
YEARS_AHEAD = 3
"""Holidays follow rules, and Matariki is fixed by law until 2052; decisions of NZX are not known so far ahead."""


def snapshot(first: date, last: date) -> str:
    """Return the calendar XNZE as CSV: trading day, opening and close in UTC."""
    calendar = exchange_calendars.get_calendar("XNZE", start=first.isoformat(), end=last.isoformat())
    lines = [
        f"# Trading sessions of NZX, from exchange_calendars {VERSION} (XNZE), in UTC.",
        "# Made by python -m ingestor.coverage.snapshot; do not edit.",
        "trading_day,opens_at,closes_at",
    ]
    for day, row in calendar.schedule.iterrows():
        lines.append(f"{day:%Y-%m-%d},{row['open']:%Y-%m-%dT%H:%M}Z,{row['close']:%Y-%m-%dT%H:%M}Z")
    return "\n".join(lines) + "\n"


def span(today: date) -> tuple[date, date]:
    """Return the first and the last day of a snapshot made today, in whole years."""
    return date(today.year - YEARS_BACK, 1, 1), date(today.year + YEARS_AHEAD, 12, 31)


def sessions(today: date) -> list[TradingSession]:
    """Return the sessions of the installed library, from ten years back to three ahead."""
    return list(read(snapshot(*span(today))))


if __name__ == "__main__":
    text = snapshot(*span(datetime.now(UTC).date()))
    Path(__file__).with_name("xnze.csv").write_text(text, encoding="utf-8")
