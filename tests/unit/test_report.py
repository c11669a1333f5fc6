from __future__ import annotations

import csv
import io
import json
import re
import struct
import subprocess
from dataclasses import replace
from datetime import date, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestor.chart.palette import colours
from ingestor.coverage.html import as_html
from ingestor.coverage.report import Report, as_csv, as_json, duration
from tests.reports import CAUSES, MADE_AT, sample
from tests.tools import need

SCHEMA = json.loads((Path(__file__).parents[2] / "docs/reference/gaps.schema.json").read_text(encoding="utf-8"))
EMPTY = Report(date(2026, 11, 20), MADE_AT, "Pacific/Auckland", MADE_AT, (), ())


@pytest.mark.parametrize("report", [sample(), sample(1), EMPTY, replace(sample(10), since=MADE_AT)])
def test_the_json_is_as_its_schema_says(report: Report) -> None:
    """The JSON follows its schema, down to the formats of days and instants."""
    document = json.loads(as_json(report))
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(document, SCHEMA, format_checker=jsonschema.FormatChecker())
    assert len(document["gaps"]) == len(report.gaps)
    assert len(document["coverage"]) == len(report.days)


def test_the_schema_is_strict_enough() -> None:
    """The schema refuses a missing field and a field of another type."""
    document = json.loads(as_json(sample(20)))
    for change in ({"seconds": "1"}, {"status": "closed"}, {"started_at": "2026-11-20T10:00:00"}, {"trading_day": 7}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**document, "gaps": [{**document["gaps"][0], **change}]}, SCHEMA)


def test_the_csv_can_be_read_back() -> None:
    """Every field is read back, whatever characters a cause has."""
    report = sample()
    rows = list(csv.DictReader(io.StringIO(as_csv(report.gaps))))
    for row, gap in zip(rows, report.gaps, strict=True):
        assert date.fromisoformat(row["trading_day"]) == gap.trading_day
        assert datetime.fromisoformat(row["started_at"]) == gap.started_at
        assert float(row["seconds"]) == gap.duration.total_seconds()
        assert (row["cause"], row["status"]) == (gap.cause, gap.status)


def test_totals() -> None:
    """The totals are sums over the days; only a complete one is 100 %."""
    report = sample(1)
    assert report.totals.percent == 100
    (day,) = report.days
    almost = replace(day, covered_minutes=494.999, missing_minutes=0.001)
    assert replace(report, days=(almost,)).totals.percent == 99.99
    assert replace(report, days=(replace(almost, backfilled_minutes=0.001),)).totals.percent == 100
    assert EMPTY.totals.percent is None


@given(covered=st.integers(0, 60_000_000), missing=st.integers(1_000, 60_000_000))
def test_a_fully_backfilled_day_is_100_percent(covered: int, missing: int) -> None:
    """A day with every missing microsecond backfilled is at 100 %, although each minute is rounded."""
    (day,) = sample(1).days
    trading_minutes, covered_minutes, missing_minutes = (
        round(n / 60_000_000, 6) for n in (covered + missing, covered, missing)
    )
    filled = replace(
        day,
        trading_minutes=trading_minutes,
        covered_minutes=covered_minutes,
        missing_minutes=missing_minutes,
        backfilled_minutes=missing_minutes,
    )
    assert replace(sample(1), days=(filled,)).totals.percent == 100


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (0.041, "41 ms"), (5.25, "5.2 s"), (59, "59 s"), (723, "12 min 3 s"), (12_000, "3 h 20 min"),
     (5_000_000, "1,388 h 53 min")],
)  # fmt: skip
def test_duration(seconds: float, words: str) -> None:
    """Durations are formatted for people."""
    assert duration(timedelta(seconds=seconds)) == words


class Page(HTMLParser):
    """Collects the visible text of a page, and the resources that it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str, **attributes: str) -> int:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}.items()
        return sum(name == tag and wanted <= found.items() for name, found in self.tags)


def test_the_page_needs_no_network() -> None:
    """The page has no external reference and no script."""
    text = as_html(sample())
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object"}
    assert not {name for _, found in page.tags for name in found} & {"src", "href", "onclick", "onload"}
    assert not re.search(r"url\(|@import|https?://|javascript:", text)


def test_the_page_has_colours_without_variables() -> None:
    """A plain colour precedes each variable one, for converters to PDF."""
    style = as_html(sample()).partition("<style>")[2].partition("</style>")[0]
    uses = re.findall(r"([\w-]+): ?([^;{}]*);\s*([\w-]+): ?([^;{}]*var\(--(\w+)\)[^;{}]*)", style)
    assert len(uses) == len(re.findall(r"var\(", style))
    for name, plain, again, value, colour in uses:
        assert (name, plain.strip()) == (again, value.replace(f"var(--{colour})", colours()[colour]).strip())


def test_the_page_shows_everything() -> None:
    """Each day has a square and a time line, each gap a row, and no cause becomes markup."""
    report = sample()
    text = as_html(report)
    page = Page(text)
    assert page.count("svg", class_="year") == 2
    assert page.count("svg", viewbox="0 0 1000 15") == len(report.days)
    assert page.count("tr") == len(report.days) + len(report.gaps) + 1
    for status in ("open", "backfilled", "partial", "unfillable", "excluded"):
        assert page.count("rect", class_=status, height="15") == sum(gap.status == status for gap in report.gaps)
    assert all(cause in page.text for cause in CAUSES)
    assert "<the exchange>" not in text
    assert f"{report.totals.percent:.2f} %" in page.text
    assert f"{report.open_gaps} of {len(report.gaps)}" in page.text


def test_an_empty_page() -> None:
    """The page works before the first session."""
    text = Page(as_html(EMPTY)).text
    assert "no trading day" in text
    assert "None." in text


def chromium(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run a browser that cannot resolve any host."""
    command = need("chromium", package="chromium")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    return subprocess.run([command, *options, *arguments], capture_output=True, check=True, timeout=90)


@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_the_page(tmp_path: Path, width: int) -> None:
    """Chromium shows the page at the size of a desktop and of a phone, and prints it."""
    report = sample()
    file = tmp_path / "gaps.html"
    file.write_text(as_html(report), encoding="utf-8")
    read: Any = Page(chromium("--dump-dom", file.as_uri()).stdout.decode())
    assert read.count("svg", viewbox="0 0 1000 15") == len(report.days)
    assert read.count("tr") == len(report.days) + len(report.gaps) + 1
    picture = tmp_path / "gaps.png"
    chromium(f"--window-size={width},1500", f"--screenshot={picture}", file.as_uri())
    assert struct.unpack(">II", picture.read_bytes()[16:24]) == (width, 1500)
    assert picture.stat().st_size > 50_000
    paper = tmp_path / "gaps.pdf"
    chromium(f"--print-to-pdf={paper}", file.as_uri())
    assert paper.read_bytes().startswith(b"%PDF")
