"""The gap report as data, and as JSON and CSV. No I/O; `ingestor.coverage.html` makes a page of it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any, Literal, TypeAlias, get_args

VERSION = 1
"""Of the JSON. Fields may be added within a version; none is taken away or changes its meaning."""

Status: TypeAlias = Literal["open", "backfilled", "partial", "unfillable", "excluded"]
STATUSES: tuple[Status, ...] = get_args(Status)


@dataclass(frozen=True, slots=True)
class Gap:
    """A span of trading time that nobody heard: a row of `market.gaps`."""

    trading_day: date
    started_at: datetime
    ended_at: datetime
    cause: str
    status: Status

    @property
    def duration(self) -> timedelta:
        """Its length."""
        return self.ended_at - self.started_at


@dataclass(frozen=True, slots=True)
class Day:
    """A trading day: a row of `market.coverage`, with the span of its trading time. Minutes are fractions."""

    trading_day: date
    started_at: datetime
    ended_at: datetime
    trading_minutes: float
    covered_minutes: float
    missing_minutes: float
    backfilled_minutes: float
    percent: float | None

    @property
    def covered_percent(self) -> float:
        """Share of the trading time that was heard, without what was filled afterwards; 100 where there was none."""
        return 100 * self.covered_minutes / self.trading_minutes if self.trading_minutes else 100.0


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the days of a report, in minutes. `percent` is None where there was no trading time."""

    trading: float
    heard: float
    missed: float
    backfilled: float

    @property
    def percent(self) -> float | None:
        """Share of the trading time that was heard or backfilled, rounded down: only nothing missing makes 100.

        From what is missing: each sum is of rounded minutes, so heard and backfilled need not add up to the whole.
        """
        if not self.trading:
            return None
        missing = max(0.0, self.missed - self.backfilled) / self.trading
        return int(10_000 * (1 - missing) + 1e-6) / 100


@dataclass(frozen=True, slots=True)
class Report:
    """Coverage and gaps from `since` (inclusive) to `until` (exclusive); None: from the first, to the last.

    Days and gaps are in the order of time. `timezone` is the exchange's, by its IANA name.
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
        """How many gaps nobody has settled yet."""
        return sum(gap.status == "open" for gap in self.gaps)


def as_json(report: Report) -> str:
    """Return the report as the JSON that `docs/reference/gaps.schema.json` describes."""
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
    """Return the gaps as CSV with a header; the columns are the fields of the JSON."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["trading_day", "started_at", "ended_at", "seconds", "cause", "status"])
    writer.writeheader()
    writer.writerows(as_record(gap) for gap in gaps)
    return text.getvalue()


def as_record(gap: Gap) -> dict[str, Any]:
    """Return a gap as the JSON has it."""
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
