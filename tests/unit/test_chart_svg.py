from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest

from ingestor.chart import svg, terminal
from ingestor.chart.palette import colours
from ingestor.chart.series import Series
from ingestor.coverage.report import STATUSES
from tests.charts import EDGES, bar, friday, gap, pixels, sample
from tests.tools import need

SVG = "{http://www.w3.org/2000/svg}"


def drawn(series: Series) -> ET.Element:
    return ET.fromstring(svg.draw(series))


def having(root: ET.Element, name: str) -> list[ET.Element]:
    return [each for each in root.iter() if name in each.get("class", "").split()]


def candles(root: ET.Element) -> list[tuple[float, list[float]]]:
    """Return the middle of each candle, and the heights of its high, upper end, lower end and low."""
    found = []
    for path in root.iter(f"{SVG}path"):
        if "bar" in path.get("class", "").split():
            x, high, top, _, bottom, low = (float(number) for number in re.findall(r"[\d.]+", path.get("d", ""))[:6])
            found.append((x, [high, top, bottom, low]))
    return found


def test_candles_lie_in_their_order() -> None:
    """Candles stand from left to right by time, the highest price on top, the wick around the body."""
    root = drawn(sample())
    found = candles(root)
    assert len(found) == 27
    assert all(one[0] < other[0] for one, other in pairwise(found))
    assert all(heights == sorted(heights) for _, heights in found)
    assert all(svg.PRICES[0] <= heights[0] <= heights[3] <= svg.PRICES[1] for _, heights in found)
    assert sum("backfilled" in path.get("class", "") for path in having(root, "bar") if path.tag == f"{SVG}path") == 3
    assert len(having(root, "volume")) == 27


def test_gaps_are_shaded_by_status() -> None:
    """Each gap has its colour, place and cause; the shortest is wide enough to see."""
    shades = having(drawn(sample()), "gap")[:4]
    assert [shade.get("fill") for shade in shades] == [
        colours()[kind] for kind in ("open", "backfilled", "partial", "excluded")
    ]
    places = [(float(rect.get("x", "")), float(rect.get("width", ""))) for rect in (shade[2] for shade in shades)]
    assert places[0][0] == svg.LEFT
    assert places[2][1] == svg.EDGE_WIDTH
    assert all(x + width < other for (x, width), (other, _) in pairwise(places))
    assert shades[3][0].text == "Fri 20 Nov 2026, 16:50:00 to 17:15:00: a <halt> (excluded)"


def test_the_picture_has_a_text_alternative() -> None:
    """The picture is an image with a title and a description."""
    root = drawn(sample())
    assert root.get("role") == "img"
    assert root[0].text == "AIR.NZ, Friday 20 November 2026"
    assert "3 of them with backfilled minutes. Gaps: Fri 20 Nov 2026, 09:00:00 to 09:10:00" in (root[1].text or "")
    assert (drawn(friday(bar(60, 1, 1)))[1].text or "").endswith("Gaps: None.")


def test_the_picture_needs_no_network() -> None:
    """The picture has no script and no external reference; a dark screen gets other colours."""
    text = svg.draw(sample())
    assert not {element.tag for element in ET.fromstring(text).iter()} & {f"{SVG}script", f"{SVG}image", f"{SVG}use"}
    assert not re.search(r"url\(|@import|href|javascript:|https?://(?!www\.w3\.org/2000/svg\")", text)
    assert "prefers-color-scheme: dark" in text


def paints(element: ET.Element, inherited: tuple[str, str] = ("black", "none")) -> Iterator[tuple[str, str, str]]:
    """Yield the class, fill and stroke of each shape for a renderer that reads attributes only."""
    fill, stroke = element.get("fill", inherited[0]), element.get("stroke", inherited[1])
    if element.tag in {f"{SVG}{name}" for name in ("path", "rect", "text")}:
        yield element.get("class", ""), fill, stroke
    for child in element:
        yield from paints(child, (fill, stroke))


@pytest.mark.parametrize("kind", STATUSES)
def test_the_picture_is_complete_without_its_style_sheet(kind: str) -> None:
    """Each shape has a colour of the light palette as an attribute, without variables."""
    text = svg.draw(replace(sample(), gaps=(gap(0, 10, kind),)))
    assert "var(" not in text
    light = colours()
    found = list(paints(ET.fromstring(text)))
    assert {fill for name, fill, _ in found if name} >= {light[name] for name in ("up", "down", "ink", "paper", kind)}
    assert {paint for _, *both in found for paint in both} <= {*light.values(), "none"}
    lines = [stroke for name, fill, stroke in found if name in {"", "day"} and stroke != "none"]
    assert set(lines) <= {light["line"], light["faint"]}


def test_a_dark_screen_has_colours_of_its_own() -> None:
    """The style sheet holds each colour that differs on a dark screen, and only for dark screens."""
    style = svg.draw(sample()).partition("<style>")[2].partition("</style>")[0]
    before, _, dark = style.partition("@media (prefers-color-scheme: dark) {")
    used = ("ink", "paper", "faint", "line", "up", "down")
    assert {name for name in used if colours(dark=True)[name] not in dark.partition("@media")[0]} == set()
    assert "#" not in before
    assert "$" not in style


def test_markup_characters_are_escaped() -> None:
    """Any symbol and cause is shown literally, without the characters that XML forbids."""
    series = friday(bar(60, 1, 1), gaps=(gap(1, 2, cause='"]]><a&b\x01'),), symbol="<A&B'\"].NZ")
    root = drawn(series)
    assert (having(root, "title")[0].text or "").startswith("<A&B'\"].NZ, ")
    assert '"]]><a&b\ufffd (open)' in (having(root, "gap")[0][0].text or "")


@pytest.mark.parametrize("series", EDGES.values(), ids=EDGES)
def test_edges(series: Series) -> None:
    """Everything lies within the picture."""
    for rect in drawn(series).iter(f"{SVG}rect"):
        x, width = float(rect.get("x", 0)), float(rect.get("width", 0))
        assert x >= 0
        assert x + width <= svg.WIDTH
    assert len(candles(drawn(series))) == len(series.minutes)


@pytest.mark.parametrize("prices", [(1.5, 1.7e308), (-1e308, 1e308), (1e308, 1e308), (5e-324, 1.5), (-1.7e308, 0.0)])
def test_extreme_prices(prices: tuple[float, float]) -> None:
    """Any stored price can be drawn: the axis is finite, and its labels are short."""
    series = friday(bar(60, 1.5, 1.5), bar(61, *prices), bar(62, 1.5, 1.5))
    root = drawn(series)
    assert candles(root)
    labels = [text.text or "" for text in having(root, "prices")[0].iter(f"{SVG}text")]
    assert labels
    assert max(map(len, labels)) <= 20
    assert terminal.draw(series, 80, 30)


def test_a_renderer_without_variables_of_css() -> None:
    """A renderer that knows no variables of CSS draws everything in its colour, and nothing in black."""
    command = [need("rsvg-convert", package="librsvg2-bin"), "--format=png"]
    picture = subprocess.run(command, input=svg.draw(sample()).encode(), check=True, capture_output=True).stdout
    found, light = pixels(picture), colours()
    names = ("paper", "ink", "faint", "line", "up", "down", "open", "backfilled", "partial", "excluded")
    assert {name for name in names if not found[_rgb(light[name])]} == set()
    assert found[_rgb(light["paper"])] > found.total() / 2
    assert found[0, 0, 0] == 0


def _rgb(colour: str) -> tuple[int, int, int]:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    red, green, blue = bytes.fromhex(digits)
    return red, green, blue
