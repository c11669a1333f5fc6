"""The data of a chart: the bars of one symbol and its gaps, resampled so that all candles have room."""

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
    """The length of a bar."""

    MINUTE = "1m"
    FIVE = "5m"
    QUARTER = "15m"
    HOUR = "1h"
    DAY = "1d"

    @property
    def duration(self) -> timedelta:
        """The length; of a day, 24 hours."""
        return timedelta(minutes={"1m": 1, "5m": 5, "15m": 15, "1h": 60, "1d": 1440}[self])

    def start(self, moment: datetime, zone: ZoneInfo) -> datetime:
        """Return the start of the bar that contains a moment, by the exchange's clock."""
        if self is Width.DAY:
            return midnight(moment.astimezone(zone).date(), zone)
        return wall_floor(moment, self.duration, zone)

    def end(self, start: datetime, zone: ZoneInfo) -> datetime:
        """Return the end of the bar that starts at `start`."""
        if self is Width.DAY:
            return midnight(start.astimezone(zone).date() + timedelta(days=1), zone)
        return start + self.duration


def midnight(day: date, zone: ZoneInfo) -> datetime:
    """Return the start of a day of the exchange, in UTC: differences in UTC are right across a clock change."""
    return datetime.combine(day, time(), zone).astimezone(UTC)


@dataclass(frozen=True, slots=True)
class Candle:
    """The trades from `started_at` (inclusive) to `ended_at` (exclusive), volume in units.

    It is `backfilled` if any of its minutes was fetched from the provider.
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
        """Whether it closed at or above its open."""
        return self.close >= self.open


@dataclass(frozen=True, slots=True)
class Band:
    """A shaded span: a gap. `kind` is its status, `label` its cause."""

    started_at: datetime
    ended_at: datetime
    kind: str
    label: str


def merged(bars: Sequence[Candle], started_at: datetime, ended_at: datetime) -> Candle:
    """Return one candle for at least one bar, given in the order of time."""
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
    """Yield longer bars of one-minute bars, which are in the order of time."""
    for start, bars in groupby(minutes, key=lambda bar: width.start(bar.started_at, zone)):
        yield merged(list(bars), start, width.end(start, zone))


@dataclass(frozen=True, slots=True)
class Figure:
    """Bars of one width, and the axis of their time, whose unit is a bar."""

    width: Width
    axis: TimeAxis
    bars: tuple[Candle, ...]


@dataclass(frozen=True)
class Series:
    """One-minute bars (at least one) and gaps of a symbol, in the order of time.

    `days` are spans of trading time that are shown even without trades. Without `width` the smallest width is chosen
    at which all bars have room.
    """

    symbol: str
    zone: ZoneInfo
    minutes: tuple[Candle, ...]
    days: tuple[tuple[datetime, datetime], ...] = ()
    gaps: tuple[Band, ...] = ()
    width: Width | None = None

    @cached_property
    def total(self) -> Candle:
        """One candle of all bars."""
        return merged(self.minutes, self.minutes[0].started_at, self.minutes[-1].ended_at)

    @property
    def title(self) -> str:
        """The symbol and the days."""
        first, last = (moment.astimezone(self.zone).date() for moment in (self._spans[0][0], self._spans[-1][0]))
        if first == last:
            return f"{self.symbol}, {first:%A %-d %B %Y}"
        return f"{self.symbol}, {first:%-d %B %Y} to {last:%-d %B %Y}"

    def figure(self, room: float) -> Figure:
        """Return the bars resampled so that their axis is at most `room` bars long, or each bar is a day."""
        widths = tuple(Width) if self.width is None else (self.width,)
        axes = [(width, TimeAxis.of(_aligned(self._spans, width, self.zone))) for width in widths]
        width, axis = next((each for each in axes if each[1].length <= room), axes[-1])
        return Figure(width, axis, tuple(resample(self.minutes, width, self.zone)))

    @cached_property
    def _spans(self) -> list[tuple[datetime, datetime]]:
        """The trading time of each day of the exchange, widened to the time of its bars."""
        spans = {started_at.astimezone(self.zone).date(): (started_at, ended_at) for started_at, ended_at in self.days}
        for day, group in groupby(self.minutes, key=lambda bar: bar.started_at.astimezone(self.zone).date()):
            bars = list(group)
            started_at, ended_at = spans.get(day, (bars[0].started_at, bars[-1].ended_at))
            spans[day] = min(started_at, bars[0].started_at), max(ended_at, bars[-1].ended_at)
        return sorted(spans.values())


def _aligned(
    spans: Iterable[tuple[datetime, datetime]], width: Width, zone: ZoneInfo
) -> Iterator[tuple[datetime, datetime, float]]:
    """Yield the spans widened to whole bars, with their number of bars; a daily bar counts as one."""
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
