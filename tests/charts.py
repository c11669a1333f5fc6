"""Made-up bars for the tests of charts."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from ingestor.chart.series import Band, Candle, Series, Width
from tests.sessions import BEGINS, ENDS, MINUTE, at

ZONE = ZoneInfo("Pacific/Auckland")


def bar(
    minute: float | datetime,
    opening: float,
    close: float,
    *,
    high: float | None = None,
    low: float | None = None,
    volume: int = 100,
    backfilled: bool = False,
) -> Candle:
    """Return the bar of a minute, given as an instant or counted from the start of Friday's trading time."""
    start = minute if isinstance(minute, datetime) else at(minute)
    high = max(opening, close) if high is None else high
    low = min(opening, close) if low is None else low
    return Candle(start, start + MINUTE, opening, high, low, close, volume, backfilled)


def gap(since: float, until: float, kind: str = "open", cause: str = "the connection was closed or cut") -> Band:
    """Return a gap between two minutes of Friday's trading time."""
    return Band(at(since), at(until), kind, cause)


def friday(*bars: Candle, gaps: tuple[Band, ...] = (), symbol: str = "AIR.NZ") -> Series:
    """Return the series of these bars over all of Friday's trading time."""
    return Series(symbol, ZONE, bars, ((BEGINS, ENDS),), gaps)


def sample() -> Series:
    """Return a day of every kind of bar: candles rise and fall in alternate hours; two were backfilled."""
    bars = []
    for quarter in range(4, 31):
        price = 1.5 + 0.01 * (abs(quarter % 8 - 4) + quarter // 8)
        change = 0.02 if quarter // 4 % 2 else -0.02
        filled = quarter in {9, 10, 13}
        bars.append(
            bar(15 * quarter, price, price + change, high=price + 0.03, volume=50 * (quarter % 5), backfilled=filled)
        )
    gaps = (gap(0, 10), gap(135, 165, "backfilled"), gap(300, 300.01, "partial"), gap(470, 495, "excluded", "a <halt>"))
    return friday(*bars, gaps=gaps)


def many(count: int) -> Series:
    """Return so many consecutive minutes, over as many days as needed."""
    start = BEGINS - timedelta(days=count // 1440)
    return Series("AIR.NZ", ZONE, tuple(bar(start + n * MINUTE, 1 + n % 7, 1 + n % 5) for n in range(count)))


EDGES = {
    "one": friday(bar(60, 1, 1)),
    "flat": friday(bar(60, 1, 1, volume=0), bar(70, 1, 1, volume=0), gaps=(gap(0, 495),)),
    "large": friday(bar(60, 123456789012345, 123456789012346)),
    "tiny": friday(bar(60, 1e-12, 2e-12)),
    "edges": friday(bar(494, -1, 0), gaps=(gap(0, 0.01), gap(494.99, 495))),
    "many": replace(many(6000), width=Width.MINUTE),
}
"""Extreme series that every picture must handle."""
