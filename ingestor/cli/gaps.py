"""`ingestor gaps`: report gaps and coverage."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import Sequence
from datetime import date, datetime, time
from enum import StrEnum
from pathlib import Path
from typing import Annotated
from zoneinfo import ZoneInfo

import typer
from rich.table import Table
from rich.text import Text

from ingestor.cli._options import Since, Until, bounds, moment
from ingestor.cli._output import Console, write_document
from ingestor.coverage.html import MEANING, as_html
from ingestor.coverage.report import Day, Report, as_csv, as_json, duration, in_minutes
from ingestor.errors import IngestorError
from ingestor.settings import Settings, load_settings
from ingestor.store.gaps import Bounds, GapStore

MAX_LISTED_DAYS = 20
STYLES = {"open": "red", "backfilled": "blue", "partial": "yellow", "unfillable": "magenta", "excluded": "dim"}


class Format(StrEnum):
    """The output format of the report."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    HTML = "html"


def gaps(
    since: Since = None,
    until: Until = None,
    output_format: Annotated[
        Format, typer.Option("--format", help="A table for people, json or csv for programs, html for a page to keep.")
    ] = Format.TABLE,
    output: Annotated[Path | None, typer.Option(help="Write the report to this file.", dir_okay=False)] = None,
    exclude: Annotated[
        tuple[str, str, str] | None,
        typer.Option(
            metavar="FROM TO REASON",
            help="First record an exclusion: the exchange did not trade (days, or instants with offset).",
        ),
    ] = None,
) -> None:
    """Show every gap in trading time, with its cause and outcome.

    Trading time is each session of the calendar, extended by the **INGESTOR_COVERAGE_LEAD** and
    **INGESTOR_COVERAGE_TAIL** that the database holds. `--format html` writes one file with a heat map, a time line
    for each day, and all gaps. The documentation has a schema of the JSON.

    Exit status: 0 no gap is open, 1 some gaps are open, 69 the database is unavailable.
    Needs **INGESTOR_DATABASE_URL**.
    """
    span = bounds(since, until)
    excluded = exclude and (moment(exclude[0], "--exclude"), moment(exclude[1], "--exclude"), exclude[2])
    settings = load_settings()
    settings.require("database_url")
    report = asyncio.run(_report(settings, span, excluded))
    if output is not None:
        write(output, _rendered(report, output_format))
    elif output_format is Format.TABLE:
        show(Console(highlight=False), report)
    else:
        write_document(_rendered(report, output_format))
    if report.open_gaps:
        raise typer.Exit(1)


def _rendered(report: Report, output_format: Format) -> str:
    match output_format:
        case Format.JSON:
            return as_json(report) + "\n"
        case Format.CSV:
            return as_csv(report.gaps)
        case Format.HTML:
            return as_html(report)
        case Format.TABLE:
            file = io.StringIO()
            show(Console(file=file, highlight=False), report)
            return file.getvalue()


def write(path: Path, text: str) -> None:
    """Write a file atomically: readers see the old or the new content. Raises IngestorError."""
    try:
        if path.exists() and not path.is_file():  # a pipe, or a terminal
            path.write_text(text, encoding="utf-8", newline="")
            return
        path = path.resolve()
        new = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            new.write_text(text, encoding="utf-8", newline="")
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise IngestorError(f"{path} cannot be written: {error.strerror}.") from None


async def _report(
    settings: Settings, span: Bounds, excluded: tuple[date | datetime, date | datetime, str] | None
) -> Report:
    async with GapStore(settings.read_database_url()) as gap_store:
        if excluded is not None:
            first, last = (_instant(bound, gap_store.timezone) for bound in excluded[:2])
            if first >= last:
                raise typer.BadParameter("FROM must be before TO", param_hint="--exclude")
            await gap_store.exclude(first, last, excluded[2])
        return await gap_store.report(span)


def _instant(bound: date | datetime, timezone: str) -> datetime:
    """Return an instant; for a day, its first."""
    if isinstance(bound, datetime):
        return bound
    return datetime.combine(bound, time(), ZoneInfo(timezone))


def show(console: Console, report: Report) -> None:
    """Print the report as text: totals, incompletely covered days, and all gaps."""
    totals = report.totals
    if totals.percent is None:
        console.print(
            "There was no trading time yet. Coverage begins with the first session of `ingestor run`.", soft_wrap=True
        )
        return
    days = "1 trading day" if len(report.days) == 1 else f"{len(report.days):,} trading days"
    console.print(
        f"{days}, {in_minutes(totals.trading)} of trading time: "
        f"{in_minutes(totals.covered)} covered, {in_minutes(totals.missing)} missing, "
        f"{in_minutes(totals.backfilled)} of it backfilled. Coverage: [bold]{totals.percent:.2f} %[/bold]",
        soft_wrap=True,
    )
    if not report.gaps:
        console.print("No gap.")
        return
    lacking = [day for day in report.days if day.percent is not None and day.percent < 100]
    if lacking:
        console.print(_days(lacking[-MAX_LISTED_DAYS:]))
        if len(lacking) > MAX_LISTED_DAYS:
            console.print(
                f"… and {len(lacking) - MAX_LISTED_DAYS:,} days before them; `--until` shows those.", style="dim"
            )
    show_gaps(console, report)


def show_gaps(console: Console, report: Report) -> None:
    """Print all gaps and the meaning of their outcomes."""
    console.print(_gaps(report))
    for status in {gap.status: None for gap in report.gaps}:
        console.print(Text(f"{status}: ", STYLES[status]) + Text(MEANING[status], "dim"))


def _days(days: Sequence[Day]) -> Table:
    table = Table(title="Days not fully covered", title_justify="left", header_style="dim")
    table.add_column("day")
    for name in ("trading", "covered", "missing", "backfilled", "percent"):
        table.add_column(name, justify="right")
    for day in days:
        minutes = (day.trading_minutes, day.covered_minutes, day.missing_minutes, day.backfilled_minutes)
        table.add_row(f"{day.trading_day:%a} {day.trading_day}", *map(in_minutes, minutes), f"{day.percent:.2f} %")
    return table


def _gaps(report: Report) -> Table:
    zone = ZoneInfo(report.timezone)
    table = Table(title=f"Gaps, in the time of {report.timezone}", title_justify="left", header_style="dim")
    for name in ("day", "from", "to"):
        table.add_column(name, no_wrap=True)
    table.add_column("length", justify="right", no_wrap=True)
    table.add_column("cause")
    table.add_column("outcome", no_wrap=True)
    for gap in report.gaps:
        table.add_row(
            str(gap.trading_day),
            f"{gap.started_at.astimezone(zone):%H:%M:%S}",
            f"{gap.ended_at.astimezone(zone):%H:%M:%S}",
            duration(gap.duration),
            Text(gap.cause),
            Text(gap.status, STYLES[gap.status]),
        )
    return table
