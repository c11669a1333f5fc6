"""Rewrites the bundled snapshot of the exchange's calendar: ``python -m ingestor.coverage.snapshot``.

For the maintainers, once a year. Needs the extra `calendar`: the only importer of that library, and of pandas.
"""

from __future__ import annotations

from datetime import UTC, date, datetime
from importlib.metadata import version
from pathlib import Path

import exchange_calendars

YEARS_BACK = 10
YEARS_AHEAD = 3
"""Holidays follow rules, and Matariki is fixed by law until 2052; what NZX decides is not known so long before."""


def snapshot(first: date, last: date) -> str:
    """Return the calendar XNZE as CSV: trading day, opening and close in UTC."""
    calendar = exchange_calendars.get_calendar("XNZE", start=first.isoformat(), end=last.isoformat())
    lines = [
        f"# Trading sessions of NZX, from exchange_calendars {version('exchange-calendars')} (XNZE), in UTC.",
        "# Made by python -m ingestor.coverage.snapshot; do not edit.",
        "trading_day,opens_at,closes_at",
    ]
    for day, row in calendar.schedule.iterrows():
        lines.append(f"{day:%Y-%m-%d},{row['open']:%Y-%m-%dT%H:%M}Z,{row['close']:%Y-%m-%dT%H:%M}Z")
    return "\n".join(lines) + "\n"


def span(today: date) -> tuple[date, date]:
    """Return the first and the last day of a snapshot made today: whole years."""
    return date(today.year - YEARS_BACK, 1, 1), date(today.year + YEARS_AHEAD, 12, 31)


if __name__ == "__main__":
    text = snapshot(*span(datetime.now(UTC).date()))
    Path(__file__).with_name("xnze.csv").write_text(text, encoding="utf-8")
