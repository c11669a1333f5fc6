"""One-minute bars of the streamed ticks; longer bars are made from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ingestor.model import SECOND, Duration, Micros, Tick

MINUTE_MICROS: Duration = 60 * SECOND


@dataclass(slots=True)
class Bar:
    """The trades of one symbol in a minute or longer, from `start` on."""

    start: Micros
    open: float
    high: float
    low: float
    close: float
    volume: int


class Bars:
    """The one-minute bars of all symbols."""

    def __init__(self) -> None:
        self._minutes: dict[str, dict[Micros, Bar]] = {}

    def add(self, tick: Tick) -> None:
        """Add a tick. The ticks of a bar come in order."""
        start = tick.time // MINUTE_MICROS * MINUTE_MICROS
        bar = Bar(start, tick.price, tick.price, tick.price, tick.price, tick.volume)
        _merge(self._minutes.setdefault(tick.symbol, {}), bar)

    def everything(self) -> Iterator[tuple[str, Bar]]:
        """Yield each one-minute bar with its symbol."""
        for symbol, minutes in self._minutes.items():
            for bar in minutes.values():
                yield symbol, bar

    def of(self, symbol: str, begin: Micros, end: Micros, start_of: Callable[[Micros], Micros]) -> list[Bar]:
        """Return the bars that start in [begin, end); `start_of` returns the start of the bar with a minute."""
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
