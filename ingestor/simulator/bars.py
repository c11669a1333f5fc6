"""One-minute bars, kept from the very ticks that were streamed; longer ones are made from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ingestor.model import SECOND, Duration, Micros, Tick

MINUTE_MICROS: Duration = 60 * SECOND


@dataclass(slots=True)
class Bar:
    """The trades of one symbol from `start` on, for a minute or longer."""

    start: Micros
    open: float
    high: float
    low: float
    close: float
    volume: int


class Bars:
    """Every minute of every symbol that traded."""

    def __init__(self) -> None:
        self._minutes: dict[str, dict[Micros, Bar]] = {}

    def add(self, tick: Tick) -> None:
        """Count a tick; within a bar they come in order."""
        start = tick.time // MINUTE_MICROS * MINUTE_MICROS
        bar = Bar(start, tick.price, tick.price, tick.price, tick.price, tick.volume)
        _merge(self._minutes.setdefault(tick.symbol, {}), bar)

    def everything(self) -> Iterator[tuple[str, Bar]]:
        """Yield each symbol's minutes."""
        for symbol, minutes in self._minutes.items():
            for bar in minutes.values():
                yield symbol, bar

    def of(self, symbol: str, begin: Micros, end: Micros, start_of: Callable[[Micros], Micros]) -> list[Bar]:
        """Return the bars that start in [begin, end); `start_of` tells in which bar a minute lies."""
        bars: dict[Micros, Bar] = {}
        for minute in sorted(self._minutes.get(symbol, {}).values(), key=lambda bar: bar.start):
            start = start_of(minute.start)
            if begin <= start < end:
                _merge(bars, Bar(start, minute.open, minute.high, minute.low, minute.close, minute.volume))
        return list(bars.values())


def _merge(bars: dict[Micros, Bar], later: Bar) -> None:
    bar = bars.setdefault(later.start, later)
    if bar is not later:
        bar.high, bar.low = max(bar.high, later.high), min(bar.low, later.low)
        bar.close = later.close
        bar.volume += later.volume
