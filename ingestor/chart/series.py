"""What is drawn: the bars of one symbol and the gaps among them, resampled so that all candles have room."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from enum import StrEnum
from functools import cached_property
from itertools import groupby
from zoneinfo import ZoneInfo

from ingestor.chart.geometry import TimeAxis, wall_floor


class Width(StrEnum):
    """How long a bar is."""

    MINUTE = "1m"
    FIVE = "5m"
    QUARTER = "15m"
    HOUR = "1h"
    DAY = "1d"

    @property
    def duration(self) -> timedelta:
        """Its length; of a day, by a clock that is never changed."""
        return timedelta(minutes={"1m": 1, "5m": 5, "15m": 15, "1h": 60, "1d": 1440}[self])

    def start(self, moment: datetime, zone: ZoneInfo) -> datetime:
        """Return when the bar begins that contains a moment, by the exchange's clock."""
        if self is Width.DAY:
            return midnight(moment.astimezone(zone).date(), zone)
        return wall_floor(moment, self.duration, zone)

    def end(self, start: datetime, zone: ZoneInfo) -> datetime:
        """Return when a bar ends that begins at `start`."""
        if self is Width.DAY:
            return midnight(start.astimezone(zone).date() + timedelta(days=1), zone)
        return start + self.duration


def midnight(day: date, zone: ZoneInfo) -> datetime:
    """Return the beginning of a day of the exchange, in UTC, in which differences are true across a clock change."""
    return datetime.combine(day, time(), zone).astimezone(UTC)


@dataclass(frozen=True, slots=True)
class Candle:
    """What was traded from `started_at` (inclusive) to `ended_at` (exclusive), volume in units.

    `backfilled` where any minute of it was fetched from the provider and not heard.
    """

    started_at: datetime
    ended_at: datetime
    open: float
    high: float
    low: float
    close: float
    volume: int
    backfilled: bool = False

    @property
    def rises(self) -> bool:
        """Whether it closed at its open or above."""
        return self.close >= self.open


@dataclass(frozen=True, slots=True)
class Band:
    """A span that is shaded: a gap, whose `kind` is its status, and `label` its cause."""

    started_at: datetime
    ended_at: datetime
    kind: str
    label: str


def merged(bars: Sequence[Candle], started_at: datetime, ended_at: datetime) -> Candle:
    """Return one bar of several, in the order of time; at least one."""
    return Candle(
        started_at,
        ended_at,
        bars[0].open,
        max(bar.high for bar in bars),
        min(bar.low for bar in bars),
        bars[-1].close,
        sum(bar.volume for bar in bars),
        any(bar.backfilled for bar in bars),
    )


def resample(minutes: Iterable[Candle], width: Width, zone: ZoneInfo) -> Iterator[Candle]:
    """Make longer bars of one-minute bars in the order of time."""
    for start, bars in groupby(minutes, key=lambda bar: width.start(bar.started_at, zone)):
        yield merged(list(bars), start, width.end(start, zone))


@dataclass(frozen=True, slots=True)
class Figure:
    """Bars of one width on the axis of their time, whose unit is a bar."""

    width: Width
    axis: TimeAxis
    bars: tuple[Candle, ...]


@dataclass(frozen=True)
class Series:
    """One-minute bars (at least one) and gaps of a symbol, in the order of time, before they are given a size.

    `days` are spans of trading time that are shown whether anything was traded in them or not. Without `width` it is
    the smallest one of which all bars have room.
    """

    symbol: str
    zone: ZoneInfo
    minutes: tuple[Candle, ...]
    days: tuple[tuple[datetime, datetime], ...] = ()
    gaps: tuple[Band, ...] = ()
    width: Width | None = None

    @cached_property
    def total(self) -> Candle:
        """All bars as one."""
        return merged(self.minutes, self.minutes[0].started_at, self.minutes[-1].ended_at)

    @property
    def title(self) -> str:
        """The symbol and the days."""
        first, last = (moment.astimezone(self.zone).date() for moment in (self._spans[0][0], self._spans[-1][0]))
        if first == last:
            return f"{self.symbol}, {first:%A %-d %B %Y}"
        return f"{self.symbol}, {first:%-d %B %Y} to {last:%-d %B %Y}"

    def figure(self, room: float) -> Figure:
        """Return the bars resampled, so that their axis is at most `room` bars long, or a day is a bar."""
        widths = tuple(Width) if self.width is None else (self.width,)
        axes = [(width, TimeAxis.of(_aligned(self._spans, width, self.zone))) for width in widths]
        width, axis = next((each for each in axes if each[1].length <= room), axes[-1])
        return Figure(width, axis, tuple(resample(self.minutes, width, self.zone)))

    @cached_property
    def _spans(self) -> list[tuple[datetime, datetime]]:
        """For each day of the exchange its trading time, and the time of its bars where that reaches further."""
        spans = {started_at.astimezone(self.zone).date(): (started_at, ended_at) for started_at, ended_at in self.days}
        for day, group in groupby(self.minutes, key=lambda bar: bar.started_at.astimezone(self.zone).date()):
            bars = list(group)
            started_at, ended_at = spans.get(day, (bars[0].started_at, bars[-1].ended_at))
            spans[day] = min(started_at, bars[0].started_at), max(ended_at, bars[-1].ended_at)
        return sorted(spans.values())


def _aligned(
    spans: Iterable[tuple[datetime, datetime]], width: Width, zone: ZoneInfo
) -> Iterator[tuple[datetime, datetime, float]]:
    """Widen spans to whole bars, and count these; a day is one bar, however long its trading time."""
    before = datetime.min.replace(tzinfo=UTC)
    for started_at, ended_at in spans:
        start, end = started_at, ended_at
        if width is not Width.DAY:
            start = max(width.start(started_at, zone), before)
            last = width.start(ended_at, zone)
            end = last if last == ended_at else last + width.duration
        if start < end:
            yield start, end, 1.0 if width is Width.DAY else (end - start) / width.duration
            before = end
