"""A chart as lines of text. Each piece has a role, for which the printing code chooses a colour.

A candle is a column of cells with two halves each, so prices have twice the resolution of lines. The chart is readable
without colours: a rising candle is a line, a falling one a block, and a backfilled one looks hollow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from textwrap import wrap
from typing import Literal, TypeAlias

from ingestor.chart.geometry import Scale, Tick, price_ticks, time_ticks, widened
from ingestor.chart.series import Candle, Figure, Series, merged
from ingestor.chart.text import KEYS, VOLUME_DIGITS, caption, compact

GapSpan: TypeAlias = tuple[str, str]
"""A text and its role: `title`, `faint`, `up`, `down`, `plain`, or the kind of a gap."""

Line: TypeAlias = list[GapSpan]

Half: TypeAlias = Literal[" ", "-", "#"]
"""The part of a candle in half a cell: nothing, wick or body."""

LEAST_ROWS, LEAST_COLUMNS = 12, 30
"""The least size of a chart, even on a smaller terminal."""

LABEL_COLUMNS = 8
"""Least number of columns between two labels of the time axis."""

LEAST_SHADED = 0.1
"""Share of a bar and of a column: a shorter gap has only a letter, so that a year of gaps is not all shade."""

SHADE = "░"
EIGHTHS = " ▁▂▃▄▅▆▇█"

_WICKS = {" -": "╷", "- ": "╵", "--": "│"}
_GLYPHS: dict[str, dict[str, str]] = {
    "up": _WICKS | {" #": "╻", "# ": "╹", "-#": "╽", "#-": "╿", "##": "┃"},
    "down": _WICKS | {" #": "▄", "# ": "▀", "-#": "▄", "#-": "▀", "##": "█"},
    "up backfilled": _WICKS | {" #": "╥", "# ": "╨", "-#": "╥", "#-": "╨", "##": "║"},
    "down backfilled": _WICKS | dict.fromkeys((" #", "# ", "-#", "#-", "##"), "▒"),
}


@dataclass(slots=True)
class _Canvas:
    """Cells, each with a character and a role."""

    columns: int
    rows: int
    cells: list[list[GapSpan]] = field(init=False)

    def __post_init__(self) -> None:
        self.cells = [[(" ", "plain")] * self.columns for _ in range(self.rows)]

    def put(self, row: int, column: int, text: str, role: str) -> None:
        """Write a text, cut off at the edges."""
        for index, character in enumerate(text, column):
            if 0 <= index < self.columns:
                self.cells[row][index] = (character, role)

    def lines(self) -> list[Line]:
        """Return the lines, with adjacent cells of one role as one piece."""
        return [
            [("".join(character for character, _ in run), role) for role, run in groupby(row, key=lambda cell: cell[1])]
            for row in self.cells
        ]


@dataclass(frozen=True, slots=True)
class _Layout:
    """The rows of prices, of the gaps' letters (one or none) and of volume; `gutter` is the width of the labels."""

    figure: Figure
    price_rows: int
    gap_rows: int
    volume_rows: int
    gutter: int
    columns: int

    @property
    def pitch(self) -> float:
        """Columns for each bar; less than one if the bars have too little room."""
        room = self.columns / self.figure.axis.length
        return math.floor(room) if room >= 1 else room

    def column(self, place: float) -> int:
        """Return the column of the canvas for a place on the time axis."""
        return self.gutter + min(int(place * self.pitch + 1e-9), self.columns - 1)

    def bars(self) -> list[tuple[int, Candle]]:
        """Return the bars with their first column. Bars that share a column are merged."""
        axis, found = self.figure.axis, []
        for column, group in groupby(self.figure.bars, key=lambda bar: self.column(axis.place(bar.started_at))):
            bars = list(group)
            found.append((column, merged(bars, bars[0].started_at, bars[-1].ended_at)))
        return found


def draw(series: Series, columns: int, rows: int) -> list[Line]:
    """Return the chart in at most `columns` and `rows`."""
    columns, rows = max(columns, LEAST_COLUMNS), max(rows, LEAST_ROWS)
    low, high = widened(series.total.low, series.total.high)
    ticks = price_ticks(low, high, rows // 3)
    gutter = max(VOLUME_DIGITS, *(len(tick.label) for tick in ticks)) + 2
    figure = series.figure(columns - gutter)
    shared = "; several bars share a column" if figure.axis.length > columns - gutter else ""
    head = [(series.title, "title"), *((text, "plain") for text in wrap(caption(series, figure) + shared, columns))]
    gap_rows = 1 if series.gaps else 0
    volume_rows = max(2, rows // 7)
    price_rows = max(rows - len(head) - gap_rows - volume_rows - 3, 3)
    layout = _Layout(figure, price_rows, gap_rows, volume_rows, gutter, columns - gutter)
    canvas = _Canvas(columns, price_rows + gap_rows + volume_rows + 2)
    halves = Scale(low, high, 2 * price_rows - 1, 0)
    bars = layout.bars()
    most = max(1, *(bar.volume for _, bar in bars))
    labels = [(round(halves.place(tick.at)) // 2, tick.label) for tick in ticks]
    _draw_frame(canvas, layout, [*labels, (price_rows + gap_rows, compact(most))])
    _draw_gaps(canvas, layout, series)
    for column, bar in bars:
        _draw_candle(canvas, column + max(0, int(layout.pitch) - 1) // 2, bar, halves)
        _draw_volume(canvas, layout, column, bar, most)
    _draw_times(canvas, layout, time_ticks(figure.axis, series.zone, LABEL_COLUMNS / layout.pitch))
    return [*([piece] for piece in head), *canvas.lines(), _legend(series)]


def _draw_frame(canvas: _Canvas, layout: _Layout, labels: Iterable[tuple[int, str]]) -> None:
    edge = layout.gutter - 1
    for row in range(canvas.rows - 2):
        canvas.put(row, edge, "│", "faint")
    for row, label in labels:
        canvas.put(row, 0, f"{label:>{edge - 1}} ┤", "faint")
    canvas.put(canvas.rows - 2, edge, "└" + "─" * layout.columns, "faint")


def _draw_gaps(canvas: _Canvas, layout: _Layout, series: Series) -> None:
    """Shade the price panel, and write under it the first letter of each gap's status."""
    for gap in series.gaps:
        start, width = layout.figure.axis.band(gap.started_at, gap.ended_at, 0.0)
        first = layout.column(start)
        last = layout.column(max(start, start + width - 1e-6))
        for row in range(layout.price_rows if width * min(layout.pitch, 1) >= LEAST_SHADED else 0):
            canvas.put(row, first, SHADE * (last - first + 1), gap.kind)
        canvas.put(layout.price_rows, first, gap.kind[0] * (last - first + 1), gap.kind)


def _draw_candle(canvas: _Canvas, column: int, bar: Candle, halves: Scale) -> None:
    role = _role(bar)
    glyphs = _GLYPHS[f"{role} backfilled" if bar.backfilled else role]
    for row, cell in _cells(bar, halves):
        canvas.put(row, column, glyphs[cell], role)


def _cells(bar: Candle, halves: Scale) -> list[tuple[int, str]]:
    """Return the rows of a candle, each with its two halves."""
    top, bottom = (round(halves.place(price)) for price in (bar.high, bar.low))
    upper, lower = (round(halves.place(price)) for price in sorted((bar.open, bar.close), reverse=True))

    def half(index: int) -> Half:
        if upper <= index <= lower:
            return "#"
        return "-" if top <= index <= bottom else " "

    return [(row, half(2 * row) + half(2 * row + 1)) for row in range(top // 2, bottom // 2 + 1)]


def _draw_volume(canvas: _Canvas, layout: _Layout, column: int, bar: Candle, most: int) -> None:
    height = math.ceil(8 * layout.volume_rows * bar.volume / most)
    for row in range(layout.volume_rows):
        text = EIGHTHS[min(max(height - 8 * row, 0), 8)] * max(1, int(layout.pitch) - 1)
        canvas.put(canvas.rows - 3 - row, column, text, "faint" if bar.backfilled else _role(bar))


def _role(bar: Candle) -> str:
    return "up" if bar.rises else "down"


def _draw_times(canvas: _Canvas, layout: _Layout, ticks: Sequence[Tick]) -> None:
    written = -1
    for tick in ticks:
        column = layout.column(tick.at)
        start = min(max(column - len(tick.label) // 2, 0), canvas.columns - len(tick.label))
        if start > written:
            canvas.put(canvas.rows - 2, column, "┼" if tick.major else "┬", "faint")
            canvas.put(canvas.rows - 1, start, tick.label, "plain" if tick.major else "faint")
            written = start + len(tick.label)


def _legend(series: Series) -> Line:
    """Return the legend of the looks that occur."""
    found = {name: _GLYPHS[name]["##"] for name in ("up", "down")}
    line: Line = [piece for name, glyph in found.items() for piece in ((glyph, name), (f" {KEYS[name]}  ", "faint"))]
    if series.total.backfilled:
        glyphs = (_GLYPHS[f"{name} backfilled"]["##"] for name in ("up", "down"))
        line += [(" ".join(glyphs), "plain"), (f" {KEYS['up backfilled']}  ", "faint")]
    if series.gaps:
        line += [(SHADE, "plain"), (" gap  ", "faint")]
    return [*line, (series.zone.key, "faint")]
