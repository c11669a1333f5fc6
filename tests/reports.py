"""A gap report with every kind of content, for the tests of its forms."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import groupby

from ingestor.clock import from_datetime, to_datetime
from ingestor.coverage.calendar import xnze
from ingestor.coverage.report import STATUSES, Day, Gap, Report, Status

MADE_AT = datetime(2026, 11, 21, 3, 0, tzinfo=UTC)
CAUSES = (
    "the connection was closed or cut",
    "the process died without a word; then the server refused the token",
    "connected, but mute in trading hours",
    "the daemon was stopped; excluded: outage of <the exchange> & its feed",
)


def sample(days: int = 400) -> Report:
    """Return the report of so many trading days, with a gap in every ninth."""
    sessions = [session for session in xnze() if session.opens_at < from_datetime(MADE_AT)][-days:]
    gaps: list[Gap] = []
    spans: list[tuple[datetime, datetime]] = []
    for number, session in enumerate(sessions):
        opens = to_datetime(session.opens_at)
        spans.append((opens - timedelta(hours=1), opens + timedelta(hours=7, minutes=15)))
        if number % 9 == 4:
            kind = number // 9
            status: Status = STATUSES[kind % len(STATUSES)]
            start = opens + timedelta(minutes=37 * (kind % 7), seconds=kind)
            end = start + timedelta(seconds=20 * (kind % 5 + 1) ** 4)
            gaps.append(Gap(session.trading_day, start, end, CAUSES[kind % len(CAUSES)], status))
    by_day = {day: list(its) for day, its in groupby(gaps, key=lambda gap: gap.trading_day)}
    rows = []
    for session, (start, end) in zip(sessions, spans, strict=True):
        mine = by_day.get(session.trading_day, [])
        missed = sum(gap.duration / timedelta(minutes=1) for gap in mine if gap.status != "excluded")
        filled = sum(gap.duration / timedelta(minutes=1) for gap in mine if gap.status == "backfilled")
        percent = int(10_000 * (495 - missed + filled) / 495) / 100
        rows.append(Day(session.trading_day, start, end, 495.0, 495 - missed, missed, filled, percent))
    return Report(None, None, "Pacific/Auckland", MADE_AT, tuple(rows), tuple(gaps))
