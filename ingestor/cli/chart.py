"""`ingestor chart`: draw a symbol's bars and gaps."""

from __future__ import annotations

import asyncio
import io
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Annotated
from zoneinfo import ZoneInfo

import typer
from rich.text import Text

from ingestor.chart import svg, terminal
from ingestor.chart.series import Band, Candle, Series, Width, midnight
from ingestor.cli._options import Since, Until, bounds
from ingestor.cli._output import Console, write_document
from ingestor.cli.gaps import STYLES, show_gaps, write
from ingestor.coverage.report import Report
from ingestor.errors import NoDataError
from ingestor.model import BAR_LENGTH, Bar
from ingestor.settings import load_settings
from ingestor.store.gaps import Bounds, GapStore

MAX_LISTED_GAPS = 20

EARLIEST = datetime(1990, 1, 1, tzinfo=UTC)
"""The first instant that an option can name."""

ROLES = {"title": "bold", "faint": "dim", "up": "green", "down": "red", "plain": "", **STYLES}
"""The terminal style of each part of a chart."""


class Format(StrEnum):
    """The output format of a chart."""

    TERMINAL = "terminal"
    SVG = "svg"


def chart(
    symbol: Annotated[str, typer.Argument(help="The exchange's symbol, such as AIR.NZ.")],
    since: Since = None,
    until: Until = None,
    width: Annotated[
        Width | None, typer.Option(help="Length of a bar; by default the shortest at which all bars fit.")
    ] = None,
    output_format: Annotated[
        Format,
        typer.Option("--format", help="Text for this terminal, or svg: a file for a browser or for printing."),
    ] = Format.TERMINAL,
    output: Annotated[Path | None, typer.Option(help="Write the chart to this file.", dir_okay=False)] = None,
) -> None:
    """Draw candles and volume of a symbol, with the gaps shaded.

    The default is the last trading day that has bars. Bars come from `market.bars_1m`: ours if the minute was wholly
    covered, else backfilled ones, drawn hollow. The colour of a gap shows its outcome, on a terminal also its first
    letter (**o**pen, **b**ackfilled, **p**artial, **u**nfillable, **e**xcluded). Gaps are listed under the chart with
    their causes. Nights are left out; times are in the exchange's time zone.

    `ingestor chart AIR.NZ`

    `ingestor chart AIR.NZ --since 2026-11-16 --until 2026-11-21 --width 1h`

    `ingestor chart AIR.NZ --format svg --output air.svg`

    Exit status: 0 drawn, 1 there is nothing to draw, 69 the database is unavailable.
    Needs **INGESTOR_DATABASE_URL**.
    """
    span = bounds(since, until)
    settings = load_settings()
    settings.require("database_url")
    series, report = asyncio.run(read(settings.read_database_url(), symbol, span, width))
    if output is not None:
        write(output, _rendered(series, report, output_format))
    elif output_format is Format.TERMINAL:
        show(Console(highlight=False), series, report)
    else:
        write_document(svg.draw(series))


def _rendered(series: Series, report: Report, output_format: Format) -> str:
    if output_format is Format.SVG:
        return svg.draw(series)
    file = io.StringIO()
    show(Console(file=file, highlight=False), series, report)
    return file.getvalue()


def show(console: Console, series: Series, report: Report) -> None:
    """Print the chart to fill the terminal; at most a quarter of the height is left for the list of gaps."""
    listed = 8 + min(len(series.gaps), MAX_LISTED_GAPS) if series.gaps else 1
    rows = max(console.height - listed, 3 * console.height // 4)
    for line in terminal.draw(series, console.width, rows):
        text = Text.assemble(*((piece, ROLES[role]) for piece, role in line), no_wrap=True, overflow="crop", end="")
        text.rstrip()
        console.print(text)
    if report.gaps:
        console.print()
        show_gaps(console, replace(report, gaps=report.gaps[-MAX_LISTED_GAPS:]))
        if len(report.gaps) > MAX_LISTED_GAPS:
            console.print(
                f"… and {len(report.gaps) - MAX_LISTED_GAPS:,} before them: `ingestor gaps` lists all.", style="dim"
            )


async def read(url: str, symbol: str, span: Bounds, width: Width | None) -> tuple[Series, Report]:
    """Return the series and the gap report to draw. Raises NoDataError if there are no bars."""
    async with GapStore(url) as gap_store:
        latest = await gap_store.now() + timedelta(days=1)
        zone = ZoneInfo(gap_store.timezone)
        symbol = await _known(gap_store, symbol, latest)
        since, until = await _bounded(gap_store, symbol, span, latest)
        start, end = (_instant(bound, zone) for bound in (since, until))
        minutes = await gap_store.bars(symbol, start, end)
        if not minutes:
            raise await _nothing(gap_store, symbol, latest)
        report = await gap_store.report(Bounds(since, until))
    days = ((max(day.started_at, start), min(day.ended_at, end)) for day in report.days)
    gaps = (Band(gap.started_at, gap.ended_at, gap.status, gap.cause) for gap in report.gaps)
    return Series(symbol, zone, tuple(map(_candle, minutes)), tuple(days), tuple(gaps), width), report


def _candle(bar: Bar) -> Candle:
    """Return the candle of one minute."""
    return Candle(bar.time, bar.time + BAR_LENGTH, bar.open, bar.high, bar.low, bar.close, bar.volume, bar.backfilled)


async def _known(gap_store: GapStore, symbol: str, latest: datetime) -> str:
    """Return the symbol as recorded: as given, else in upper case. Raises NoDataError."""
    listed = await gap_store.listed_symbols()
    for name in (symbol, symbol.upper()):
        if name in listed or await gap_store.last_trade(name, EARLIEST, latest) is not None:
            return name
    near = get_close_matches(symbol.upper(), listed, n=3)
    raise NoDataError(
        f"Nothing is on record of {symbol}.",
        hint=f"Did you mean {' or '.join(near)}?" if near else "Write it with its suffix, such as AIR.NZ.",
    )


async def _bounded(
    gap_store: GapStore, symbol: str, span: Bounds, latest: datetime
) -> tuple[date | datetime, date | datetime]:
    """Return the bounds to draw; without a beginning, the last day that has bars. Raises NoDataError."""
    if span.since is not None:
        return span.since, span.until or latest
    zone = ZoneInfo(gap_store.timezone)
    last = await gap_store.last_bar(symbol, EARLIEST, latest if span.until is None else _instant(span.until, zone))
    if last is None:
        raise await _nothing(gap_store, symbol, latest)
    day = last.astimezone(zone).date()
    return day, span.until or day + timedelta(days=1)


async def _nothing(gap_store: GapStore, symbol: str, latest: datetime) -> NoDataError:
    """Return the error that names the last day with bars."""
    last = await gap_store.last_bar(symbol, EARLIEST, latest)
    if last is None:
        return NoDataError(
            f"{symbol} has no bars yet.",
            hint="A minute becomes one when it was wholly covered, or by `ingestor backfill`; "
            "`ingestor gaps` lists the gaps.",
        )
    return NoDataError(
        f"{symbol} has no bars in that time; its last are of {last.astimezone(ZoneInfo(gap_store.timezone)):%Y-%m-%d}.",
        hint="Choose other days with --since and --until; `ingestor gaps` lists the gaps.",
    )


def _instant(bound: date | datetime, zone: ZoneInfo) -> datetime:
    return bound if isinstance(bound, datetime) else midnight(bound, zone)
