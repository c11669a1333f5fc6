"""Made-up bars for the tests of charts."""

from __future__ import annotations

import struct
import zlib
from collections import Counter
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


def pixels(png: bytes) -> Counter[tuple[int, int, int]]:
    """Return the colours of a picture (PNG, 8 bits a channel, not interlaced), and how many pixels have each."""
    width, _, depth, kind, _, _, interlaced = struct.unpack(">IIBBBBB", png[16:29])
    assert (depth, interlaced) == (8, 0)
    size = {2: 3, 6: 4}[kind]
    data, at = b"", 8
    while at < len(png):
        length, name = struct.unpack(">I4s", png[at : at + 8])
        data += png[at + 8 : at + 8 + length] if name == b"IDAT" else b""
        at += 12 + length
    lines, stride, above = zlib.decompress(data), width * size, bytes(width * size)
    found: Counter[tuple[int, int, int]] = Counter()
    for start in range(0, len(lines), stride + 1):
        line = bytearray(lines[start + 1 : start + 1 + stride])
        for place in range(stride) if lines[start] else ():
            left = line[place - size] if place >= size else 0
            corner = above[place - size] if place >= size else 0
            line[place] = (line[place] + _predicted(lines[start], left, above[place], corner)) % 256
        above = bytes(line)
        found.update((line[place], line[place + 1], line[place + 2]) for place in range(0, stride, size))
    return found


def _predicted(filtering: int, left: int, up: int, corner: int) -> int:
    """Return the prediction of a byte by its neighbours: the filters of PNG."""
    match filtering:
        case 1:
            return left
        case 2:
            return up
        case 3:
            return (left + up) // 2
    guess = left + up - corner
    return min((left, up, corner), key=lambda each: abs(guess - each))


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
