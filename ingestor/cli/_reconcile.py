"""Run a reconciliation and print its results, for `ingestor reconcile`."""

from __future__ import annotations

from datetime import date
from zoneinfo import ZoneInfo

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ingestor.backfill.client import RestClient
from ingestor.backfill.reconcile import Reconciliation, reconcile
from ingestor.cli._output import Console
from ingestor.clock import SystemClock
from ingestor.model import Bar
from ingestor.redaction import outside_text
from ingestor.settings import Settings
from ingestor.store.gaps import GapStore

MAX_TABLE_ROWS = 40


async def run(settings: Settings, day: date, only: frozenset[str], *, adopt: bool) -> bool:
    """Compare, print the result, and return whether all bars agree."""
    console = Console(highlight=False)
    clock = SystemClock()
    columns = (TextColumn("[bold]compare[/bold]"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    async with GapStore(settings.read_database_url()) as gap_store:
        async with RestClient(
            settings.rest_url, settings.read_token(), timezone=gap_store.timezone, clock=clock
        ) as client:
            with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
                task = bar.add_task("", total=None)
                found = await reconcile(
                    gap_store,
                    client,
                    day,
                    await gap_store.now(),
                    only=only,
                    on_symbols=lambda count: bar.update(task, total=count),
                    on_done=lambda _: bar.update(task, advance=1),
                )
        show(console, found, ZoneInfo(gap_store.timezone))
        if adopt and found.is_decided and found.best.label != gap_store.label:
            await gap_store.adopt(found.best.label)
            console.print(f"From now on bars are taken by their {found.best.label}. Run `ingestor backfill`.")
        elif found.is_decided and found.best.label != gap_store.label:
            console.print(
                f"Bars are stored by their {gap_store.label}: run this again with --set-bar-label.",
                style="yellow",
            )
    return bool(found.symbols) and not (found.best.differences or found.failed or found.doubtful)


def show(console: Console, found: Reconciliation, zone: ZoneInfo) -> None:
    """Print the counts and the differences."""
    best, other = found.best, found.other
    console.print(
        f"{found.day}: {found.minutes:,} minutes wholly covered, {len(found.symbols):,} symbols. "
        f"Bars compared: {best.compared:,}, the same: {best.same:,}, different: {len(best.differences):,}."
    )
    if found.is_decided:
        console.print(
            f"The provider labels a bar by its {best.label}: {best.same:,} bars fit, "
            f"by its {other.label} {other.same:,}."
        )
    else:
        console.print("This day does not show whether the provider labels a bar by its start or its end.")
    if found.unknown:
        console.print(
            f"Unknown to the provider: {', '.join(map(outside_text, found.unknown))}", soft_wrap=True, markup=False
        )
    for symbol, error in found.failed:
        console.print(
            f"{outside_text(symbol)} could not be compared: {error}", style="yellow", soft_wrap=True, markup=False
        )
    for symbol, error in found.doubtful:
        console.print(
            f"{outside_text(symbol)}: {error}: these minutes are not compared.",
            style="yellow",
            soft_wrap=True,
            markup=False,
        )
    if best.differences:
        console.print(_table(found, zone))
        if len(best.differences) > MAX_TABLE_ROWS:
            console.print(
                f"… and {len(best.differences) - MAX_TABLE_ROWS:,} more in ingest.reconciliations.", style="dim"
            )


def _table(found: Reconciliation, zone: ZoneInfo) -> Table:
    table = Table(header_style="dim")
    for name in ("symbol", "minute", "difference"):
        table.add_column(name, no_wrap=True)
    for name in ("ours: open high low close x volume", "theirs"):
        table.add_column(name, justify="right")
    for each in found.best.differences[:MAX_TABLE_ROWS]:
        minute = f"{each.time.astimezone(zone):%H:%M}"
        table.add_row(Text(outside_text(each.symbol)), minute, each.kind, _bar(each.ours), _bar(each.theirs))
    return table


def _bar(bar: Bar | None) -> str:
    return "" if bar is None else f"{bar.open:g} {bar.high:g} {bar.low:g} {bar.close:g} x {bar.volume:,}"
