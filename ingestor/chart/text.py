"""The texts of a chart, for SVG and terminal alike."""

from __future__ import annotations

from zoneinfo import ZoneInfo

from ingestor.chart.series import Band, Candle, Figure, Series

KEYS = {"up": "rises", "down": "falls", "up backfilled": "with backfilled minutes"}
"""The meaning of a candle's look."""

VOLUME_DIGITS = 5
"""Characters that `compact` returns for volumes that occur."""


def price(value: float) -> str:
    """Return a price with the digits that were sent, and no more."""
    return f"{value:.15g}"


def compact(count: int) -> str:
    """Return a number of units in short form: `950`, `12.3k`, `4.56M`."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}" if count < 1000 * size else f"{count / size:,.0f}{letter}"
    return str(count)


def caption(series: Series, figure: Figure) -> str:
    """Return one line: the width of the bars, and the prices and volume of the whole time."""
    return f"{figure.width} bars. {_prices(series.total)}"


def described(series: Series, figure: Figure) -> str:
    """Return a description of the chart for readers who can't see it."""
    fetched = sum(bar.backfilled for bar in figure.bars)
    gaps = "".join(f" {span(gap, series.zone)}." for gap in series.gaps) or " None."
    return (
        f"Candles and volume: {caption(series, figure)}. Times are those of {series.zone.key}. "
        f"{len(figure.bars):,} bars, {fetched:,} of them with backfilled minutes. Gaps:{gaps}"
    )


def _prices(total: Candle) -> str:
    words = ", ".join(f"{name} {price(getattr(total, name))}" for name in ("open", "high", "low", "close"))
    return f"{words[0].upper()}{words[1:]}, volume {total.volume:,}"


def span(gap: Band, zone: ZoneInfo) -> str:
    """Return the times, the cause and the status of a gap."""
    first, last = gap.started_at.astimezone(zone), gap.ended_at.astimezone(zone)
    return f"{first:%a %-d %b %Y, %H:%M:%S} to {last:%H:%M:%S}: {gap.label} ({gap.kind})"
