"""A chart as one self-contained SVG, without script or network, for light and dark screens and for paper.

All colours and sizes are attributes, since many renderers support no style variables or no style sheets at all. The
style sheet adds features of browsers, such as the colours of a dark screen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from html import escape
from importlib.resources import files
from string import Template

from ingestor.chart.geometry import Scale, Tick, price_ticks, time_ticks, widened
from ingestor.chart.palette import colours
from ingestor.chart.series import Candle, Figure, Series
from ingestor.chart.text import KEYS, VOLUME_DIGITS, caption, compact, described, price, span

WIDTH, HEIGHT = 960, 560
"""Size in units of the drawing, which is scaled to its place on the page."""

LEFT, TOP = 16.0, 84.0
PRICES = (TOP, 390.0)
VOLUMES = (410.0, 466.0)
"""Upper and lower ends of the two panels."""

ROOM = 200
"""The most candles that can be distinguished."""

DIGIT = 14.5
"""Width of a digit at the size that a phone shows."""

LABEL_DISTANCE = 84.0
"""Least distance between two labels of the time axis."""

EDGE_WIDTH = 2.0
"""The least width of a gap's upper edge: a gap of one second stays visible."""

SHADE_WIDTH = 0.5
"""The least width of a gap's shade, so that a year of short gaps is not all shade."""

_COLOURS = colours()
_TEXT = f'font-family="system-ui, sans-serif" font-size="13" fill="{_COLOURS["faint"]}"'
_LINE = f'stroke="{_COLOURS["line"]}"'
_DAY = f'class="day" stroke="{_COLOURS["faint"]}" stroke-dasharray="2 4"'
_CENTRED = 'dy="0.35em"'
"""Centres a text at its `y`. Renderers differ in whether a text inherits `dominant-baseline` from a group."""

_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML forbids, even escaped."""


@dataclass(frozen=True, slots=True)
class _Plot:
    """A figure with its scales."""

    series: Series
    figure: Figure
    prices: Scale
    volumes: Scale
    times: Scale
    price_ticks: list[Tick]

    @property
    def unit(self) -> float:
        """The number of bars in one unit of the drawing."""
        return self.figure.axis.length / (self.times.end - self.times.start)

    def edges(self, bar: Candle, share: float) -> tuple[float, float]:
        """Return the left edge and the width of the middle `share` of a bar's room."""
        start, end = (self.times.place(self.figure.axis.place(moment)) for moment in (bar.started_at, bar.ended_at))
        return start + (end - start) * (1 - share) / 2, (end - start) * share


def draw(series: Series) -> str:
    """Return the chart as SVG."""
    plot = _plot(series)
    style = Template(files(__package__).joinpath("svg.css").read_text(encoding="utf-8"))
    parts = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" {_TEXT}>',
        f"<title>{_escaped(series.title)}</title>",
        f"<desc>{_escaped(described(series, plot.figure))}</desc>",
        f"<style>\n{style.substitute(colours(dark=True))}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}" fill="{_COLOURS["paper"]}"/>',
        _title(series),
        f'<text class="caption" x="{LEFT:g}" y="64">{_escaped(caption(series, plot.figure))}</text>',
        *_group("gaps", _gaps(plot)),
        *_group("grid prices", _price_grid(plot)),
        *_group("grid times", _time_grid(plot), 'text-anchor="middle"'),
        *_group("volumes", _volumes(plot)),
        *_group("bars", _bars(plot)),
        *_group("keys", _keys(plot)),
        "</svg>\n",
    )
    return "\n".join(parts)


def _title(series: Series) -> str:
    look = f'font-size="20" font-weight="600" fill="{_COLOURS["ink"]}"'
    return f'<text class="title" x="{LEFT:g}" y="34" {look}>{_escaped(series.title)}</text>'


def _plot(series: Series) -> _Plot:
    total = series.total
    figure = series.figure(ROOM)
    low, high = widened(total.low, total.high, 0.04)
    ticks = price_ticks(low, high, 7)
    right = WIDTH - LEFT - DIGIT * max(VOLUME_DIGITS, *(len(tick.label) for tick in ticks))
    return _Plot(
        series,
        figure,
        Scale(low, high, PRICES[1], PRICES[0]),
        Scale(0, max(1, *(bar.volume for bar in figure.bars)), VOLUMES[1], VOLUMES[0]),
        Scale(0, figure.axis.length, LEFT, right),
        ticks,
    )


def _group(name: str, parts: Iterable[str], look: str = "") -> Iterator[str]:
    """Yield parts within a group, whose attributes they inherit."""
    yield f'<g class="{name}" {look}>'
    yield from parts
    yield "</g>"


def _gaps(plot: _Plot) -> Iterator[str]:
    """Shade each gap over both panels, and mark its upper edge in full colour."""
    for gap in plot.series.gaps:
        yield f"<g {_toned(gap.kind)}><title>{_escaped(span(gap, plot.series.zone))}</title>"
        for look, narrowest, height in (
            ('class="shade" fill-opacity="0.16"', SHADE_WIDTH, VOLUMES[1] - TOP),
            ('class="edge"', EDGE_WIDTH, 5),
        ):
            start, width = plot.figure.axis.band(gap.started_at, gap.ended_at, narrowest * plot.unit)
            place = f'x="{plot.times.place(start):.1f}" width="{width / plot.unit:.1f}" y="{TOP:g}" height="{height:g}"'
            yield f"<rect {look} {place}/>"
        yield "</g>"


def _toned(kind: str) -> str:
    return f'class="gap" fill="{_COLOURS[kind]}"'


def _price_grid(plot: _Plot) -> Iterator[str]:
    right = plot.times.end
    for tick in plot.price_ticks:
        y = plot.prices.place(tick.at)
        yield f'<path d="M{LEFT:g},{y:.1f}H{right:.1f}" {_LINE}/>'
        yield f'<text x="{right + 8:.1f}" y="{y:.1f}" {_CENTRED}>{tick.label}</text>'
    most = compact(round(plot.volumes.high))
    yield f'<path d="M{LEFT:g},{VOLUMES[1]:g}H{right:.1f}" {_LINE}/>'
    yield f'<text class="volume-label" x="{right + 8:.1f}" y="{VOLUMES[0] + 8:.1f}" {_CENTRED}>{most}</text>'


def _time_grid(plot: _Plot) -> Iterator[str]:
    for tick in time_ticks(plot.figure.axis, plot.series.zone, LABEL_DISTANCE * plot.unit):
        x = plot.times.place(tick.at)
        yield f'<path {_DAY if tick.major else _LINE} d="M{x:.1f},{TOP:g}V{VOLUMES[1]:g}"/>'
        first = ' class="first" text-anchor="start"' if x < LEFT + DIGIT * len(tick.label) / 2 else ""
        yield f'<text{first} x="{LEFT if first else x:.1f}" y="{VOLUMES[1] + 24:g}">{tick.label}</text>'


def _volumes(plot: _Plot) -> Iterator[str]:
    for bar in plot.figure.bars:
        x, width = plot.edges(bar, 0.7)
        y = plot.volumes.place(bar.volume)
        place = f'x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{VOLUMES[1] - y:.1f}"'
        look = f'fill-opacity="0.2" stroke="{_tone(bar)}"' if bar.backfilled else 'fill-opacity="0.6"'
        yield f'<rect class="volume {_kind(bar)}" fill="{_tone(bar)}" {look} {place}/>'


def _bars(plot: _Plot) -> Iterator[str]:
    """Draw each candle as one path: wicks and body. The body of a backfilled candle is hollow."""
    label = _labels(plot)
    for bar in plot.figure.bars:
        x, width = plot.edges(bar, 0.7)
        low, high = plot.prices.place(bar.low), plot.prices.place(bar.high)
        bottom, top = (plot.prices.place(edge) for edge in sorted((bar.open, bar.close)))
        middle = x + width / 2
        shape = (
            f"M{middle:.2f},{high:.1f}V{top:.1f}M{middle:.2f},{bottom:.1f}V{low:.1f}"
            f"M{x:.2f},{top:.1f}h{width:.2f}V{bottom:.1f}h-{width:.2f}z"
        )
        look = f'class="bar {_kind(bar)}" {_candle(_tone(bar), hollow=bar.backfilled)}'
        yield f'<path {look} d="{shape}"><title>{_escaped(label(bar))}</title></path>'


def _kind(bar: Candle) -> str:
    return ("up" if bar.rises else "down") + (" backfilled" if bar.backfilled else "")


def _tone(bar: Candle) -> str:
    return _COLOURS["up" if bar.rises else "down"]


def _candle(tone: str, *, hollow: bool) -> str:
    return f'fill="{_COLOURS["paper"] if hollow else tone}" stroke="{tone}"'


def _labels(plot: _Plot) -> Callable[[Candle], str]:
    zone, is_daily = plot.series.zone, plot.figure.width == "1d"

    def when(moment: datetime) -> str:
        return f"{moment.astimezone(zone):{'%a %-d %b %Y' if is_daily else '%a %-d %b %H:%M'}}"

    def label(bar: Candle) -> str:
        prices = ", ".join(f"{name} {price(getattr(bar, name))}" for name in ("open", "high", "low", "close"))
        source = "; backfilled" if bar.backfilled else ""
        return f"{when(bar.started_at)}: {prices}; volume {bar.volume:,}{source}"

    return label


def _keys(plot: _Plot) -> Iterator[str]:
    """Explain the colours: of candles in one line, of gaps in the other."""
    x = LEFT
    for name, label in KEYS.items():
        if "backfilled" in name and not plot.series.total.backfilled:
            continue
        look = _candle(_COLOURS["down" if "down" in name else "up"], hollow="backfilled" in name)
        yield f'<rect class="bar {name}" {look} x="{x + 1:.1f}" y="509" width="14" height="14"/>'
        yield _key(x + 24, 516, label)
        x += 40 + 0.9 * DIGIT * len(label)
    zone = _escaped(plot.series.zone.key)
    yield f'<text x="{WIDTH - LEFT:g}" y="516" text-anchor="end" {_CENTRED}>{zone}</text>'
    if plot.series.gaps:
        yield _key(LEFT, 543, "gaps")
    x = LEFT + 70
    for kind in dict.fromkeys(gap.kind for gap in plot.series.gaps):
        yield f'<g {_toned(kind)}><rect class="edge" x="{x:.1f}" y="535" width="16" height="16"/></g>'
        yield _key(x + 24, 543, kind)
        x += 40 + 0.9 * DIGIT * len(kind)


def _key(x: float, y: float, label: str) -> str:
    return f'<text x="{x:.1f}" y="{y:g}" {_CENTRED}>{_escaped(label)}</text>'


def _escaped(text: str) -> str:
    return escape(_FORBIDDEN.sub("\ufffd", text))
