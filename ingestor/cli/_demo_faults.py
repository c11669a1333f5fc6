"""The second half of `ingestor demo --faults`: report the gaps, fill them, and compare with the market."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ingestor.backfill.fill import asked_for
from ingestor.cli._backfill import fill, filling
from ingestor.cli._output import Console
from ingestor.cli.gaps import show, write
from ingestor.coverage.html import as_html
from ingestor.coverage.report import Report
from ingestor.demo import Demo
from ingestor.model import BAR_LENGTH, GapSpan, minute_of
from ingestor.service.process import StopRequest
from ingestor.store.gaps import Bounds, GapStore

PAGE = "gaps.html"

COVERAGE_LAG = timedelta(seconds=20)
"""On a quiet stream, coverage advances with each pong (10 s) and is recorded by the next heartbeat (5 s)."""


async def repair(console: Console, demo: Demo, request: StopRequest) -> list[str]:
    """Report, wait, fill, report again, and compare with the market; return the problems found."""
    last_minute = minute_of(datetime.now(UTC)) + BAR_LENGTH
    await _pause(console, "Waiting until the report includes the last half minute", 32, request)
    console.print("\n[bold]The gaps[/bold] (ingestor gaps)\n")
    report, ready_at = await _look(demo)
    show(console, report)
    # The market's last minute is fully covered when coverage has passed its end.
    wait = (max(ready_at, last_minute + COVERAGE_LAG) - datetime.now(UTC)).total_seconds()
    await _pause(console, "Waiting until the missing minutes have been over for a minute", wait, request)
    if request.stop.is_set():
        return []
    console.print("\n[bold]Filling them[/bold] (ingestor backfill)\n")
    async with filling(console, demo.settings) as (job, _):
        await fill(console, job, Bounds(), ())
    console.print("\n[bold]After the backfill[/bold] (ingestor gaps)\n")
    report, _ = await _look(demo)
    show(console, report)
    made, same = await demo.compare()
    console.print(
        f"\nThe market made {made:,} one-minute bars; market.bars_1m has {same:,} of them unchanged: "
        "from the stream if the minute was wholly covered, else from the backfill.",
        soft_wrap=True,
    )
    page = demo.settings.state_path(PAGE)
    write(page, as_html(report))
    if console.is_terminal:
        console.print(f"The same report as a page (ingestor gaps --format html): {page}", soft_wrap=True)
    problems: list[str] = []
    if made != same:
        problems.append(f"{made - same:,} of the market's {made:,} bars differ in the database.")
    if report.totals.percent != 100:
        problems.append(f"Coverage is {report.totals.percent} % after the backfill.")
    return problems


async def _look(demo: Demo) -> tuple[Report, datetime]:
    """Return the report and the time from which all of its gaps can be filled."""
    async with GapStore(demo.settings.read_database_url()) as gap_store:
        report = await gap_store.report(Bounds())
        ends = [asked_for(GapSpan(gap.started_at, gap.ended_at), gap_store.margin)[1] for gap in report.gaps]
        return report, max(ends, default=report.made_at) + gap_store.margin + BAR_LENGTH + timedelta(seconds=1)


async def _pause(console: Console, why: str, seconds: float, request: StopRequest) -> None:
    """Wait with a progress bar, until the time is over or a stop is requested."""
    if seconds <= 0 or request.stop.is_set():
        return
    if not console.is_terminal:
        console.print(f"{why}: {seconds:.0f} s.")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task, began = bar.add_task(why, total=seconds), time.monotonic()
        while not bar.tasks[0].finished and not request.stop.is_set():
            await request.pause(min(0.5, seconds))
            bar.update(task, completed=time.monotonic() - began)
