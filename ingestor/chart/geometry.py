"""The geometry of a chart: scales, round tick values, and the axis of trading time. Pure."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from zoneinfo import ZoneInfo

FLAT = 0.002
"""Height of an axis whose values are all equal, as a share of the value."""

FARTHEST = 1e300
"""The end of an axis, so that its length is finite. Prices beyond it are invalid, but can be on record."""

HUGE = 10**15
"""Numbers below this are written in full, others as powers of ten."""

STEPS = tuple(timedelta(minutes=minutes) for minutes in (1, 2, 5, 10, 15, 30, 60, 120, 180, 240, 360, 720))
"""Possible distances between two ticks of a day."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values from `low` to `high` linearly to places from `start` to `end`, in either direction."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        """Return the place of a value; a value outside is placed at the nearer end."""
        value = min(max(value, self.low), self.high)
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark on an axis: its place and its label. It is `major` where a new day begins."""

    at: float
    label: str
    major: bool = False


def widened(low: float, high: float, share: float = 0.0) -> tuple[float, float]:
    """Return the ends of an axis for values from `low` to `high`, widened on each side by a share of the difference.

    Values that are equal, or too close for a float to separate, get room as well.
    """
    low, high = max(low, -FARTHEST), min(high, FARTHEST)
    greatest = max(abs(low), abs(high))
    if high - low <= 8 * math.ulp(greatest):
        room = max(greatest * FLAT / 2, 1024 * math.ulp(greatest)) if greatest else 1.0
    else:
        room = (high - low) * share
    return low - room, high + room


def price_ticks(low: float, high: float, most: int) -> list[Tick]:
    """Return at most `most` + 1 round values from `low` to `high`, in steps of 1, 2 or 5 times a power of ten."""
    step = _round_step((high - low) / most)
    numbers = range(math.ceil(low / float(step)), math.floor(high / float(step)) + 1)
    values = [number * step for number in numbers]
    return [Tick(float(value), _written(value, step)) for value in values]


def _round_step(least: float) -> Decimal:
    power = math.floor(math.log10(least))
    steps = (Decimal(digit).scaleb(power) for digit in (1, 2, 5, 10))
    return next((step for step in steps if float(step) >= least), Decimal(1).scaleb(power + 1))


def _written(value: Decimal, step: Decimal) -> str:
    """Return a value with the digits that its step needs; tiny and huge ones as powers of ten."""
    power = int(step.normalize().as_tuple().exponent)
    if power >= -9 and abs(value) < HUGE:
        return f"{value:,.{max(0, -power)}f}"
    return f"{value:.{value.adjusted() - power}e}" if value else "0"


@dataclass(frozen=True, slots=True)
class Segment:
    """A span of time on an axis, at `offset` and of `length`, in units of the axis."""

    started_at: datetime
    ended_at: datetime
    offset: float
    length: float

    def place(self, moment: datetime) -> float:
        """Return the place of a moment; a moment outside is placed at the nearer end."""
        share = (moment - self.started_at) / (self.ended_at - self.started_at)
        return self.offset + self.length * min(max(share, 0.0), 1.0)


@dataclass(frozen=True, slots=True)
class TimeAxis:
    """Spans of time side by side in order, so that nights and weekends take no room. Never empty."""

    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, spans: Iterable[tuple[datetime, datetime, float]]) -> TimeAxis:
        """Return an axis of spans: start, end, and length on the axis."""
        segments: list[Segment] = []
        offset = 0.0
        for started_at, ended_at, length in spans:
            segments.append(Segment(started_at, ended_at, offset, length))
            offset += length
        return cls(tuple(segments))

    @property
    def length(self) -> float:
        """The sum of the segments' lengths."""
        return self.segments[-1].offset + self.segments[-1].length

    def place(self, moment: datetime) -> float:
        """Return the place of a moment; a moment between two segments is placed at the end of the first."""
        index = bisect_right(self.segments, moment, key=lambda segment: segment.started_at)
        return self.segments[max(index - 1, 0)].place(moment)

    def band(self, started_at: datetime, ended_at: datetime, narrowest: float) -> tuple[float, float]:
        """Return the place and the width of a span: at least `narrowest` wide, and within the axis."""
        start = self.place(started_at)
        width = max(self.place(ended_at) - start, narrowest)
        return max(0.0, min(start, self.length - width)), min(width, self.length)


def time_ticks(axis: TimeAxis, zone: ZoneInfo, least: float) -> list[Tick]:
    """Return ticks at round times of the exchange and at the starts of days, at least `least` apart."""
    days = [] if len(axis.segments) == 1 else list(_days(axis, zone, least))
    ticks = list(days)
    for tick in _times(axis, zone, least):
        if all(abs(tick.at - other.at) >= least for other in (*days, *ticks[-1:])):
            ticks.append(tick)
    return sorted(ticks, key=lambda tick: tick.at)


def _days(axis: TimeAxis, zone: ZoneInfo, least: float) -> Iterator[Tick]:
    """Yield a tick at the start of each day; its label has the year if that has changed."""
    year, next_at = axis.segments[0].started_at.astimezone(zone).year, 0.0
    for segment in axis.segments:
        if segment.offset >= next_at:
            day = segment.started_at.astimezone(zone)
            yield Tick(segment.offset, f"{day:%-d %b}" if day.year == year else f"{day:%-d %b %Y}", major=True)
            year, next_at = day.year, segment.offset + least


def _times(axis: TimeAxis, zone: ZoneInfo, least: float) -> Iterator[Tick]:
    """Yield ticks at times of day within segments, in the smallest step that is long enough."""
    for segment in axis.segments:
        unit = (segment.ended_at - segment.started_at) / segment.length
        step = next((step for step in STEPS if step >= least * unit), None)
        if step is None or segment.length == 1:  # a single candle has no time of day
            continue
        moment = wall_floor(segment.started_at, step, zone)
        while moment < segment.ended_at:
            if moment >= segment.started_at:
                yield Tick(segment.place(moment), _time(moment.astimezone(zone)))
            moment += step


def _time(local: datetime) -> str:
    """Return the time of day; if the clock shows it for the second time, with the zone's abbreviation."""
    return f"{local:%H:%M %Z}" if local.fold else f"{local:%H:%M}"


def wall_floor(moment: datetime, step: timedelta, zone: ZoneInfo) -> datetime:
    """Return the last moment (UTC) at which the clock of a zone showed a multiple of `step`.

    An hour that the clock shows twice has two starts. The clock must not change within a step longer than an hour.
    """
    local = moment.astimezone(zone)
    since_midnight = timedelta(
        hours=local.hour, minutes=local.minute, seconds=local.second, microseconds=local.microsecond
    )
    return moment.astimezone(UTC) - since_midnight % step
