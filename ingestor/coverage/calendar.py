"""Trading calendars: they decide when silence is a stall and when a missing minute is a gap.

`XNZE` is read from a bundled snapshot, without heavy imports and without network. `always` is computed: every day of
the exchange from midnight to midnight, for demonstrations and tests at any hour.
"""

from __future__ import annotations

import csv
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from functools import cache
from importlib.resources import files
from typing import Literal, Protocol
from zoneinfo import ZoneInfo

from ingestor.clock import from_datetime, to_datetime
from ingestor.model import Micros

DAYS_AHEAD = 30
"""If the calendar has fewer days left, it needs renewal."""

RENEW = "Upgrade ingestor, or install its extra `calendar`, and run `ingestor maintain`."

CalendarName = Literal["XNZE", "always"]


@dataclass(frozen=True, slots=True)
class TradingSession:
    """The trading of one day, from `opens_at` (inclusive) to `closes_at` (exclusive)."""

    trading_day: date
    opens_at: Micros
    closes_at: Micros


class Calendar(Protocol):
    """A calendar, as the stall timer and the status page use it."""

    def session_at(self, now: Micros) -> TradingSession | None:
        """Return the session that is open at an instant; None if the market is closed."""
        ...

    def session_after(self, now: Micros) -> TradingSession | None:
        """Return the next session that opens after an instant; None beyond the known ones."""
        ...


class SnapshotCalendar:
    """A calendar of given sessions."""

    def __init__(self, sessions: Iterable[TradingSession]) -> None:
        self._sessions = sorted(sessions, key=lambda session: session.opens_at)
        self._openings = [session.opens_at for session in self._sessions]

    def session_at(self, now: Micros) -> TradingSession | None:
        """Return the session that is open at an instant; None if the market is closed."""
        index = bisect_right(self._openings, now) - 1
        if index >= 0 and now < self._sessions[index].closes_at:
            return self._sessions[index]
        return None

    def session_after(self, now: Micros) -> TradingSession | None:
        """Return the next session that opens after an instant; None beyond the known ones."""
        index = bisect_right(self._openings, now)
        return self._sessions[index] if index < len(self._sessions) else None


class AlwaysCalendar:
    """A calendar that is always open."""

    def __init__(self, timezone: str) -> None:
        self._timezone = ZoneInfo(timezone)

    def session_at(self, now: Micros) -> TradingSession:
        """Return the exchange's day that contains an instant."""
        return _whole_day(to_datetime(now).astimezone(self._timezone).date(), self._timezone)

    def session_after(self, now: Micros) -> TradingSession:
        """Return the exchange's next day."""
        return self.session_at(self.session_at(now).closes_at)


def load(name: CalendarName, timezone: str) -> Calendar:
    """Return a calendar by name."""
    return AlwaysCalendar(timezone) if name == "always" else SnapshotCalendar(xnze())


def sessions(name: CalendarName, timezone: str, first: date, last: date) -> Iterator[TradingSession]:
    """Yield the known sessions of the trading days `first` to `last`, both inclusive."""
    if name == "always":
        for number in range((last - first).days + 1):
            yield _whole_day(first + timedelta(days=number), ZoneInfo(timezone))
    else:
        yield from (session for session in xnze() if first <= session.trading_day <= last)


@cache
def xnze() -> tuple[TradingSession, ...]:
    """Return the sessions of the bundled snapshot."""
    return tuple(read(files(__package__).joinpath("xnze.csv").read_text(encoding="utf-8")))


def read(text: str) -> Iterator[TradingSession]:
    """Yield the sessions of a snapshot: CSV with comments."""
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    for row in rows:
        yield TradingSession(
            date.fromisoformat(row["trading_day"]),
            from_datetime(datetime.fromisoformat(row["opens_at"])),
            from_datetime(datetime.fromisoformat(row["closes_at"])),
        )


def _whole_day(day: date, timezone: ZoneInfo) -> TradingSession:
    midnight = datetime.combine(day, time(), timezone)
    following = datetime.combine(day + timedelta(days=1), time(), timezone)
    return TradingSession(day, from_datetime(midnight), from_datetime(following))
