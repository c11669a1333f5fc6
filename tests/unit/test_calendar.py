from __future__ import annotations

import itertools
from datetime import UTC, date, datetime
from zoneinfo import ZoneInfo

import exchange_calendars
import pytest

from ingestor.clock import from_datetime, to_datetime
from ingestor.coverage.calendar import TradingSession, load, sessions, xnze
from ingestor.model import SECOND, Micros
from ingestor.service.reader import is_stalled

AUCKLAND = "Pacific/Auckland"


def local(text: str) -> Micros:
    return from_datetime(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(AUCKLAND)))


def on(day: str) -> TradingSession | None:
    return {session.trading_day: session for session in xnze()}.get(date.fromisoformat(day))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the library does not support pandas 4 yet
def test_the_snapshot_agrees_with_the_library() -> None:
    """The bundled days and hours equal those of exchange_calendars, their source."""
    first, last = xnze()[0].trading_day, xnze()[-1].trading_day
    calendar = exchange_calendars.get_calendar("XNZE", start=first.isoformat(), end=last.isoformat())
    theirs = [
        (day.date(), row["open"].to_pydatetime(), row["close"].to_pydatetime())
        for day, row in calendar.schedule.iterrows()
    ]
    ours = [
        (
            session.trading_day,
            to_datetime(session.opens_at),
            to_datetime(session.closes_at),
        )
        for session in xnze()
    ]
    assert ours == theirs


def test_the_snapshot_reaches_far_enough() -> None:
    """The snapshot reaches from ten years back to at least a year ahead of its release."""
    today = datetime.now(UTC).date()
    assert xnze()[0].trading_day <= today.replace(year=today.year - 9, day=1)
    assert (xnze()[-1].trading_day - today).days > 365


@pytest.mark.parametrize(
    ("day", "opens", "closes"),
    [
        ("2026-03-02", "10:00", "16:45"),  # summer time
        ("2026-07-01", "10:00", "16:45"),  # standard time
        ("2026-12-24", "10:00", "12:45"),
        ("2026-12-31", "10:00", "12:45"),
    ],
)
def test_hours(day: str, opens: str, closes: str) -> None:
    """The hours of NZX are wall time, with early closes."""
    assert on(day) == TradingSession(date.fromisoformat(day), local(f"{day}T{opens}"), local(f"{day}T{closes}"))


@pytest.mark.parametrize("day", ["2026-12-25", "2026-12-28", "2026-02-06", "2026-07-10", "2026-11-22"])
def test_closed(day: str) -> None:
    """Christmas, the day after Boxing Day's weekend, Waitangi Day, Matariki and a Sunday are no trading days."""
    assert on(day) is None


def test_session_at() -> None:
    """A session is open from its opening until just before its close."""
    calendar = load("XNZE", AUCKLAND)
    assert calendar.session_at(local("2026-03-02T09:59:59")) is None
    assert calendar.session_at(local("2026-03-02T10:00:00")) == on("2026-03-02")
    assert calendar.session_at(local("2026-03-02T16:44:59")) == on("2026-03-02")
    assert calendar.session_at(local("2026-03-02T16:45:00")) is None
    assert calendar.session_at(local("1999-03-02T12:00:00")) is None
    assert calendar.session_at(local("2099-03-02T12:00:00")) is None


def test_always_tiles_time() -> None:
    """The days of `always` adjoin, also when summer time begins or ends."""
    days = list(sessions("always", AUCKLAND, date(2026, 1, 1), date(2026, 12, 31)))
    assert len(days) == 365
    assert all(a.closes_at == b.opens_at for a, b in itertools.pairwise(days))
    hours = {str(day.trading_day): (day.closes_at - day.opens_at) / SECOND / 3600 for day in days}
    assert (hours["2026-04-05"], hours["2026-09-27"], hours["2026-06-01"]) == (25, 23, 24)
    calendar = load("always", AUCKLAND)
    assert calendar.session_at(local("2026-06-01T00:00:00")) == days[151]


@pytest.mark.parametrize(
    ("now", "last", "stalled"),
    [
        ("2026-03-02T10:04:59", "2026-03-01T17:00:00", False),  # the night does not count
        ("2026-03-02T10:05:00", "2026-03-01T17:00:00", True),
        ("2026-03-02T12:04:59", "2026-03-02T12:00:00", False),
        ("2026-03-02T12:05:00", "2026-03-02T12:00:00", True),
        ("2026-03-02T16:44:59", "2026-03-02T12:00:00", True),
        ("2026-03-02T16:45:00", "2026-03-02T12:00:00", False),  # a closed market is silent
        ("2026-12-24T12:44:59", "2026-12-24T12:00:00", True),
        ("2026-12-24T13:44:59", "2026-12-24T12:00:00", False),  # early close
        ("2026-12-25T12:00:00", "2026-12-24T12:00:00", False),  # holiday
    ],
)
def test_stall(now: str, last: str, stalled: bool) -> None:
    """Silence is a stall only between opening and close, counted from the opening or the last message."""
    assert is_stalled(load("XNZE", AUCKLAND), local(now), local(last), 300 * SECOND) is stalled
