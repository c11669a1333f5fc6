from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from ingestor.chart import terminal
from ingestor.chart.series import Series, Width
from tests.charts import EDGES, bar, friday, gap, many, sample


def text(series: Series, columns: int = 80, rows: int = 24) -> list[str]:
    return ["".join(piece for piece, _ in line).rstrip() for line in terminal.draw(series, columns, rows)]


EXPECTED = """
AIR.NZ, Friday 20 November 2026
15m bars. Open 1.5, high 1.6, low 1.5, close 1.57, volume 2,700
 1.60 ┤░░                ░░░░                          │             ░░░░
      │░░                ░░░░          │               │ │           ░░░░
 1.58 ┤░░              ╷ ░░░░          │ ╷           ╷ │ │ ╷       ╷ ░░░░
      │░░              │ ░░░░          │ │           │ │ │ │       │ ░░░░
      │░░              │ │░░░        │ │ │ │       │ ┃ █ │ │ │   │ ┃ ░░░░
 1.56 ┤░░            │ │ │░│░      │ ┃ █ │ │ │   │ ┃ ┃ █ █ │ │ │ ┃ ┃ ░░░░
      │░░          │ ┃ █ │░│░│   │ ┃ ┃ █ █ │ │ │ ┃ ┃ ╹ ▀ █ █ │ ┃ ┃ ╹ ░░░░
 1.54 ┤░░        ╷ ╽ ┃ █ ▒░│░│ ╷ ╥ ┃ ┃ █ █ ▄ │ ╽ ┃ ┃     █ █ ▄ ┃ ┃   ░░░░
      │░░        │ ┃ ┃ █ ▒░│░│ │ ║ ┃     █ █ │ ┃ ┃         █ █ ┃     ░░░░
      │░░      │ ┃ ┃ ╹ ▀ ▒░▒░│ ┃ ║ ╹     ▀ █ █ ┃ ╹         ▀ █ ╹     ░░░░
 1.52 ┤░░      ┃ ┃ ╹     ▒░▒░█ ┃ ╨         ▀ █ ╹             ▀       ░░░░
      │░░      ┃ ╹       ░░▒░█ ╹             ▀                       ░░░░
 1.50 ┤░░      ┃         ░░░░█                                       ░░░░
      │oo                bbbb                  p                     eeee
  200 ┤        █       ▂ █       ▂ █       ▂ █       ▂ █       ▂ █
      │        █     ▄ █ █     ▄ █ █     ▄ █ █     ▄ █ █     ▄ █ █
      │        █   ▆ █ █ █   ▆ █ █ █   ▆ █ █ █   ▆ █ █ █   ▆ █ █ █
      └┬───────┬───────┬───────┬───────┬───────┬───────┬───────┬───────┬────
     09:00   10:00   11:00   12:00   13:00   14:00   15:00   16:00   17:00
┃ rises  █ falls  ║ ▒ with backfilled minutes  ░ gap  Pacific/Auckland
"""


def test_a_day() -> None:
    """Candles, gaps and volumes lie over their times, and are distinct without colours."""
    assert text(sample(), 76, 22) == EXPECTED.strip("\n").splitlines()


def test_roles() -> None:
    """Rising and falling candles and gaps have different colours."""
    lines = terminal.draw(sample(), 76, 22)
    roles = {role for line in lines for _, role in line}
    assert roles == {"title", "faint", "plain", "up", "down", "open", "backfilled", "partial", "excluded"}
    assert lines[0] == [("AIR.NZ, Friday 20 November 2026", "title")]


@pytest.mark.parametrize("columns", [30, 80, 200])
@pytest.mark.parametrize("rows", [12, 24, 60])
@pytest.mark.parametrize("series", EDGES.values(), ids=EDGES)
def test_edges(series: Series, columns: int, rows: int) -> None:
    """The chart fits the terminal (except the legend on a very narrow one), and each candle is drawn."""
    lines = text(series, columns, rows)
    assert all(len(line) <= columns for line in lines[1:-1])
    assert len(lines) <= max(rows, 15)
    assert any(sign in line for line in lines[2:-1] for sign in "╻╹╽╿┃▄▀█│")


def test_gaps_that_share_their_columns_with_candles() -> None:
    """A gap over the whole day is behind every candle, and one at the very end is visible."""
    lines = text(friday(bar(60, 1, 2), gaps=(gap(0, 495),)))
    assert lines[3].count("░") > 60
    assert text(friday(bar(60, 1, 2), gaps=(gap(493, 495),)))[3].endswith("░")
    lines = text(friday(bar(60, 1, 2), gaps=(gap(494.9, 495, "partial"),)))
    assert any(line.endswith("p") for line in lines)
    assert not any("░" in line for line in lines[:-1])


def test_too_many_bars_for_the_columns() -> None:
    """Bars that share a column are drawn as one, which is reported."""
    lines = text(replace(sample(), width=Width.MINUTE), 40)
    assert "several bars" in " ".join(lines)
    assert max(len(line) for line in lines[3:-1]) <= 40


def test_the_height_of_a_candle() -> None:
    """A body lies between open and close, and its wicks reach the extremes, to half a line."""
    series = friday(bar(60, 1.8, 3.2, high=4, low=1))
    assert "".join(line[-1] for line in text(series, 60, 13)[2:8]) == "│╽┃┃╿│"
    fetched = replace(series, minutes=(replace(series.minutes[0], backfilled=True),))
    assert "".join(line[-1] for line in text(fetched, 60, 13)[2:8]) == "│╥║║╨│"


def test_days() -> None:
    """Each day is one candle, with its date below."""
    lines = text(replace(many(20 * 1440), width=Width.DAY))
    assert "1d bars." in lines[1]
    assert lines[-2].split()[:2] == ["31", "Oct"]
    assert timedelta(days=1) == Width.DAY.duration
