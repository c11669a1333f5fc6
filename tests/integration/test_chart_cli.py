"""`ingestor chart` works as a user runs it."""

from __future__ import annotations

import asyncio
import io
import re
from datetime import date, timedelta
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from ingestor.chart.series import Width
from ingestor.cli._output import Console
from ingestor.cli.chart import EARLIEST, read, show
from ingestor.errors import IngestorError
from ingestor.store.gaps import Bounds, GapStore
from tests.commands import ingestor
from tests.sessions import BEGINS, ENDS, MINUTE, at, execute, record_session

# A trade a minute, each a cent higher.
TICKS = """
INSERT INTO market.ticks (time, received_at, price, volume, occurrence, symbol)
SELECT minute, minute, 5 + extract(epoch FROM minute - $1) / 6000, 100, 1, $3
FROM generate_series($1::timestamptz, $2::timestamptz, interval '1 minute') AS minute
"""
BARS = """
INSERT INTO market.bars (symbol, time, resolution, open, high, low, close, volume, source)
SELECT $3, minute, interval '1 minute', 6.5, 6.6, 6.4, 6.45, 70, 'financefeast'
FROM generate_series($1::timestamptz, $2::timestamptz, interval '1 minute') AS minute
"""
FILLED = (
    "INSERT INTO ingest.backfills (gap_from, gap_until, symbol, status, finished_at) "
    "VALUES ($1, $2, '*', 'backfilled', now())"
)
FRIDAY = "AIR.NZ, Friday 20 November 2026"


@pytest.fixture
async def traded(database: str) -> None:
    """Cover Friday from 10:00 to 17:00 except half an hour, which is backfilled, and two minutes, which are not."""
    await record_session(database, BEGINS - MINUTE, at(180), "closed")
    await record_session(database, at(210), at(300), "keepalive")
    await record_session(database, at(302), ENDS + MINUTE, "stopped")
    for since, until in ((at(60), at(178)), (at(212), at(420))):
        await execute(database, TICKS, since, until, "AIR.NZ")
    await execute(database, BARS, at(179), at(210), "AIR.NZ")
    await execute(database, FILLED, at(179), at(211))


async def on_a_terminal(url: str, span: Bounds, width: Width | None = None) -> list[str]:
    """Return the lines that a terminal of 100 columns and 40 lines shows for AIR.NZ."""
    file = io.StringIO()
    show(Console(file=file, width=100, height=40), *await read(url, "AIR.NZ", span, width))
    return file.getvalue().splitlines()


async def test_a_chart_on_a_terminal(writer_url: str, traded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chart shows the last day with bars at the terminal's size, and shades and lists gaps with their cause."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "40")
    status, output, errors = await ingestor("chart", "air.nz", DATABASE_URL=writer_url)
    assert (status, errors) == (0, "")
    lines = output.splitlines()
    assert lines == await on_a_terminal(writer_url, Bounds(date(2026, 11, 20), date(2026, 11, 21)))
    assert lines[0] == FRIDAY
    assert lines[1] == "15m bars. Open 5, high 7.08, low 5, close 7.08, volume 34,640"
    assert max(map(len, lines)) <= 100
    assert sum(bool(re.fullmatch(r" +│ +bbbb +o", line)) for line in lines) == 1
    for words in ("░░░░▒", "10:00   11:00", "the server did not answer a ping", "backfilled: missed, and filled"):
        assert words in output, output


async def test_a_part_of_a_day(writer_url: str, traded: None) -> None:
    """Bounds are days or instants; bars and gaps outside are neither drawn nor listed."""
    lines = await on_a_terminal(writer_url, Bounds(at(120), at(150)), Width.MINUTE)
    assert lines[1] == "1m bars. Open 5.6, high 5.89, low 5.6, close 5.89, volume 3,000"
    assert not any("░" in line or "Gaps" in line for line in lines)
    lines = await on_a_terminal(writer_url, Bounds(date(2026, 11, 16), at(185)))
    assert lines[0] == FRIDAY
    assert sum(line.startswith("│ 2026-11-20") for line in lines) == 1


async def test_a_chart_as_svg(writer_url: str, traded: None, tmp_path: Path) -> None:
    """The SVG is written to standard output or to a file, with a candle for each bar."""
    days = ("--since=2026-11-16", "--until=2026-11-21")
    (status, output, _), (written, nothing, _) = await asyncio.gather(
        ingestor("chart", "AIR.NZ", "--format=svg", DATABASE_URL=writer_url),
        ingestor("chart", "AIR.NZ", *days, "--format=svg", "--output=a.svg", "--width=1h", DATABASE_URL=writer_url),
    )
    assert (status, written, nothing) == (0, 0, "")
    title = "{http://www.w3.org/2000/svg}title"
    assert ET.fromstring(output).findtext(title) == FRIDAY
    root = ET.fromstring((tmp_path / "a.svg").read_text(encoding="utf-8"))
    labels = [path.findtext(title, "") for path in root.iter() if path.get("class", "").startswith("bar ")]
    assert [label[:16] for label in labels if label] == [f"Fri 20 Nov {hour}:00" for hour in range(10, 17)]
    assert [label.endswith("; backfilled") for label in labels if label] == [hour in {11, 12} for hour in range(10, 17)]


async def test_nothing_to_draw(writer_url: str, database: str, traded: None) -> None:
    """Missing bars and unknown symbols are reported with the remedy."""
    await execute(database, "INSERT INTO market.instruments (symbol, exchange) VALUES ('MEL.NZ', 'nzx')")
    await execute(database, TICKS, at(209.5), at(209.5), "SPK.NZ")  # received, but its minute was not fully covered
    elsewhere = (
        "AIR.NZ has no bars in that time; its last are of 2026-11-20. Choose other days with --since and --until"
    )
    for symbol, span, words in (
        ("NONE", Bounds(), "Nothing is on record of NONE. Write it with its suffix, such as AIR.NZ."),
        ("MEL", Bounds(), "Nothing is on record of MEL. Did you mean MEL.NZ?"),
        ("MEL.NZ", Bounds(), "MEL.NZ has no bars yet. A minute becomes one"),
        ("SPK.NZ", Bounds(), "SPK.NZ has no bars yet."),
        ("AIR.NZ", Bounds(date(2026, 11, 18), date(2026, 11, 19)), elsewhere),
        ("AIR.NZ", Bounds(None, at(0)), elsewhere),
    ):
        with pytest.raises(IngestorError) as caught:
            await read(writer_url, symbol, span, None)
        assert str(caught.value).startswith(words)


async def test_the_last_bar_is_found_behind_days_without_any(writer_url: str, database: str, traded: None) -> None:
    """Later ticks without bars do not hide the last day that has bars."""
    for days in (2, 5, 9):
        await execute(database, TICKS, ENDS + timedelta(days=days), ENDS + timedelta(days=days), "AIR.NZ")
    async with GapStore(writer_url) as gap_store:
        assert await gap_store.last_bar("AIR.NZ", EARLIEST, ENDS + timedelta(days=20)) == at(420)
        assert await gap_store.last_bar("AIR.NZ", EARLIEST, at(300)) == at(298)
        assert await gap_store.last_bar("AIR.NZ", EARLIEST, at(50)) is None
