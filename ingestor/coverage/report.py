"""The gap report as data, JSON and CSV. No I/O; `ingestor.coverage.html` renders it as a page."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any, Literal, TypeAlias, get_args

VERSION = 1
"""Version of the JSON. Within a version fields may be added, but none is removed or changes its meaning."""

Status: TypeAlias = Literal["open", "backfilled", "partial", "unfillable", "excluded"]
STATUSES: tuple[Status, ...] = get_args(Status)


@dataclass(frozen=True, slots=True)
class Gap:
    """A span of trading time that is not covered: a row of `market.gaps`."""

    trading_day: date
    started_at: datetime
    ended_at: datetime
    cause: str
    status: Status

    @property
    def duration(self) -> timedelta:
        """The length of the gap."""
        return self.ended_at - self.started_at


@dataclass(frozen=True, slots=True)
class Day:
    """A trading day: a row of `market.coverage`, with the span of its trading time. Minutes are fractional."""

    trading_day: date
    started_at: datetime
    ended_at: datetime
    trading_minutes: float
    covered_minutes: float
    missing_minutes: float
    backfilled_minutes: float
    percent: float | None


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the days of a report, in minutes. `percent` is None without trading time."""

    trading: float
    covered: float
    missing: float
    backfilled: float

    @property
    def percent(self) -> float | None:
        """Share of the trading time that was covered or backfilled, rounded down: 100 only if nothing is missing.

        It is computed from the missing minutes, since covered and backfilled minutes are rounded and may sum to less.
        """
        if not self.trading:
            return None
        share = max(0.0, self.missing - self.backfilled) / self.trading
        return int(10_000 * (1 - share) + 1e-6) / 100


@dataclass(frozen=True, slots=True)
class Report:
    """Coverage and gaps from `since` (inclusive) to `until` (exclusive); None stands for the first and the last day.

    Days and gaps are ordered by time. `timezone` is the IANA name of the exchange's time zone.
    """

    since: date | datetime | None
    until: date | datetime | None
    timezone: str
    made_at: datetime
    days: tuple[Day, ...]
    gaps: tuple[Gap, ...]

    @property
    def totals(self) -> Totals:
        """Sums over the days."""
        return Totals(
            sum(day.trading_minutes for day in self.days),
            sum(day.covered_minutes for day in self.days),
            sum(day.missing_minutes for day in self.days),
            sum(day.backfilled_minutes for day in self.days),
        )

    @property
    def open_gaps(self) -> int:
        """The number of gaps without an outcome."""
        return sum(gap.status == "open" for gap in self.gaps)


def as_json(report: Report) -> str:
    """Return the report as JSON, as in `docs/reference/gaps.schema.json`."""
    days = [
        {
            "trading_day": day.trading_day.isoformat(),
            "trading_minutes": day.trading_minutes,
            "covered_minutes": day.covered_minutes,
            "missing_minutes": day.missing_minutes,
            "backfilled_minutes": day.backfilled_minutes,
            "percent": day.percent,
        }
        for day in report.days
    ]
    document = {
        "version": VERSION,
        "since": _moment(report.since),
        "until": _moment(report.until),
        "coverage": days,
        "gaps": [as_record(gap) for gap in report.gaps],
    }
    return json.dumps(document, indent=2, ensure_ascii=False)


def as_csv(gaps: Iterable[Gap]) -> str:
    """Return the gaps as CSV with a header; its columns are the fields of the JSON."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["trading_day", "started_at", "ended_at", "seconds", "cause", "status"])
    writer.writeheader()
    writer.writerows(as_record(gap) for gap in gaps)
    return text.getvalue()


def as_record(gap: Gap) -> dict[str, Any]:
    """Return a gap as an object of the JSON."""
    return {
        "trading_day": gap.trading_day.isoformat(),
        "started_at": gap.started_at.isoformat(),
        "ended_at": gap.ended_at.isoformat(),
        "seconds": gap.duration.total_seconds(),
        "cause": gap.cause,
        "status": gap.status,
    }


def _moment(bound: date | datetime | None) -> str | None:
    return None if bound is None else bound.isoformat()


def duration(length: timedelta) -> str:
    """Return a length as text: `41 ms`, `5.2 s`, `12 min 3 s`, `3 h 20 min`."""
    seconds = length.total_seconds()
    if 0 < seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s".replace(".0 s", " s")
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"


def in_minutes(minutes: float) -> str:
    """Return a length given in minutes in the format of `duration`."""
    return duration(timedelta(minutes=minutes))
