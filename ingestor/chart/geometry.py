"""Where things lie in a chart: scales, ticks that people can read, and the axis of trading time. Pure."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from zoneinfo import ZoneInfo

FLAT = 0.002
"""Height of an axis of which all values are the same, as a share of the value."""

FARTHEST = 1e300
"""Where an axis ends, so that its length is a number; prices beyond it are no market's, but can be on record."""

HUGE = 10**15
"""Numbers are written out up to here."""

STEPS = tuple(timedelta(minutes=minutes) for minutes in (1, 2, 5, 10, 15, 30, 60, 120, 180, 240, 360, 720))
"""From one tick of a day to the next."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values from `low` to `high` evenly to places from `start` to `end`; either may be the greater one."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        """Return where a value lies; what lies outside, at the nearer end."""
        value = min(max(value, self.low), self.high)
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark on an axis: its value on it, and what is written there. `major` where a new day begins."""

    at: float
    label: str
    major: bool = False


def widened(low: float, high: float, share: float = 0.0) -> tuple[float, float]:
    """Return the ends of an axis for values from `low` to `high`, with a share of the difference as room on each side.

    Values that are the same, or too near to each other for a float to tell what lies between them, get room too.
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
    """Return a value with as many digits as tell it from the next; tiny and huge ones as powers of ten."""
    power = int(step.normalize().as_tuple().exponent)
    if power >= -9 and abs(value) < HUGE:
        return f"{value:,.{max(0, -power)}f}"
    return f"{value:.{value.adjusted() - power}e}" if value else "0"


@dataclass(frozen=True, slots=True)
class Segment:
    """A span of time on an axis: it begins at `offset` and is `length` long, in the axis' units."""

    started_at: datetime
    ended_at: datetime
    offset: float
    length: float

    def place(self, moment: datetime) -> float:
        """Return where a moment lies; what lies outside, at the nearer end."""
        share = (moment - self.started_at) / (self.ended_at - self.started_at)
        return self.offset + self.length * min(max(share, 0.0), 1.0)


@dataclass(frozen=True, slots=True)
class TimeAxis:
    """Spans of time one after the other, in their order, so that nights and weekends take no room. Never empty."""

    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, spans: Iterable[tuple[datetime, datetime, float]]) -> TimeAxis:
        """Return the axis of spans, each given with its length on the axis."""
        segments: list[Segment] = []
        offset = 0.0
        for started_at, ended_at, length in spans:
            segments.append(Segment(started_at, ended_at, offset, length))
            offset += length
        return cls(tuple(segments))

    @property
    def length(self) -> float:
        """The sum of its segments'."""
        return self.segments[-1].offset + self.segments[-1].length

    def place(self, moment: datetime) -> float:
        """Return where a moment lies; what lies between two segments, at the end of the first."""
        index = bisect_right(self.segments, moment, key=lambda segment: segment.started_at)
        return self.segments[max(index - 1, 0)].place(moment)

    def band(self, started_at: datetime, ended_at: datetime, narrowest: float) -> tuple[float, float]:
        """Return where a span begins, and how wide it is: never narrower than can be seen, nor beyond the end."""
        start = self.place(started_at)
        width = max(self.place(ended_at) - start, narrowest)
        return max(0.0, min(start, self.length - width)), min(width, self.length)


def time_ticks(axis: TimeAxis, zone: ZoneInfo, least: float) -> list[Tick]:
    """Return ticks at round times of the exchange's clock, and where days begin, at least `least` apart."""
    days = [] if len(axis.segments) == 1 else list(_days(axis, zone, least))
    ticks = list(days)
    for tick in _times(axis, zone, least):
        if all(abs(tick.at - other.at) >= least for other in (*days, *ticks[-1:])):
            ticks.append(tick)
    return sorted(ticks, key=lambda tick: tick.at)


def _days(axis: TimeAxis, zone: ZoneInfo, least: float) -> Iterator[Tick]:
    """Yield where days begin; with the year where it is another than before."""
    year, next_at = axis.segments[0].started_at.astimezone(zone).year, 0.0
    for segment in axis.segments:
        if segment.offset >= next_at:
            day = segment.started_at.astimezone(zone)
            yield Tick(segment.offset, f"{day:%-d %b}" if day.year == year else f"{day:%-d %b %Y}", major=True)
            year, next_at = day.year, segment.offset + least


def _times(axis: TimeAxis, zone: ZoneInfo, least: float) -> Iterator[Tick]:
    """Yield the times of day within segments, in the smallest of the steps that are long enough."""
    for segment in axis.segments:
        unit = (segment.ended_at - segment.started_at) / segment.length
        step = next((step for step in STEPS if step >= least * unit), None)
        if step is None or segment.length == 1:  # a single candle: the time of day says nothing about it
            continue
        moment = wall_floor(segment.started_at, step, zone)
        while moment < segment.ended_at:
            if moment >= segment.started_at:
                yield Tick(segment.place(moment), _time(moment.astimezone(zone)))
            moment += step


def _time(local: datetime) -> str:
    """Return the time of day; the second time that the clock shows it, with the zone's abbreviation."""
    return f"{local:%H:%M %Z}" if local.fold else f"{local:%H:%M}"


def wall_floor(moment: datetime, step: timedelta, zone: ZoneInfo) -> datetime:
    """Return the last moment, in UTC, at which the clock of a zone showed a multiple of `step`.

    An hour that the clock shows twice has two beginnings; of a longer step the clock must not change within it.
    """
    local = moment.astimezone(zone)
    since_midnight = timedelta(
        hours=local.hour, minutes=local.minute, seconds=local.second, microseconds=local.microsecond
    )
    return moment.astimezone(UTC) - since_midnight % step
