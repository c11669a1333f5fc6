"""Run a backfill and show its progress, for `ingestor backfill` and `ingestor demo`."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Collection, Coroutine
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ingestor.backfill.client import RestClient
from ingestor.backfill.fill import Backfill, Plan, Summary
from ingestor.backfill.instruments import Refresh, refresh_instruments
from ingestor.cli._output import Console
from ingestor.clock import SystemClock
from ingestor.coverage.report import duration
from ingestor.errors import ConfigurationError, IngestorError
from ingestor.redaction import outside_text, redact
from ingestor.service.process import StopRequest, stop_on_signals
from ingestor.settings import Settings
from ingestor.store.gaps import Bounds, GapStore

RELIST_SECONDS = 3600.0
"""Seconds after which `--watch` fetches the list of instruments again."""

REFUSED_PAUSE_SECONDS = 60.0
"""Minimum time between two attempts with a token that was accepted before and is refused now."""


async def once(
    settings: Settings, span: Bounds, only: Collection[str], *, retry_unfillable: bool, dry_run: bool
) -> bool:
    """Fill the open gaps once; return whether none is left to be retried."""
    console = Console(highlight=False)
    async with filling(console, settings) as (job, listed):
        console.print(f"{listed:,} instruments are listed.")
        await job.check(only)
        if dry_run:
            describe(console, await job.plan(span), only)
            return True
        if retry_unfillable:
            await job.ask_again(span)
        summary = await fill(console, job, span, only)
        return not summary.pending


async def watch(settings: Settings, span: Bounds, only: Collection[str], interval: float) -> None:
    """Fill gaps until stopped, retrying failures. Raises ConfigurationError if the settings never worked."""
    console = Console(highlight=False)
    watcher = _Watcher(console, settings, span, only)
    with stop_on_signals(lambda name: console.print(f"{name} is ignored.")) as request:
        while not request.stop.is_set():
            pause = interval
            try:
                await _until_stopped(watcher.look(), request)
            except IngestorError as error:
                if isinstance(error, ConfigurationError):
                    if not watcher.has_worked:
                        raise
                    pause = max(interval, REFUSED_PAUSE_SECONDS)
                console.print(f"Not now: {redact(str(error))}", style="yellow", soft_wrap=True, markup=False)
            await request.pause(pause)


class _Watcher:
    """Fills gaps repeatedly. `has_worked`: the provider has accepted this token."""

    def __init__(self, console: Console, settings: Settings, span: Bounds, only: Collection[str]) -> None:
        self._console = console
        self._settings = settings
        self._span = span
        self._only = only
        self._clock = SystemClock()
        self._listed_until = -math.inf
        self.has_worked = False

    async def look(self) -> None:
        """Fill the gaps that are open now."""
        is_listed = self._clock.monotonic() < self._listed_until
        async with filling(self._console, self._settings, listing=not is_listed, patient=True) as (job, _):
            if not is_listed:
                await job.check(self._only)
                self._listed_until = self._clock.monotonic() + RELIST_SECONDS
            try:
                await fill(self._console, job, self._span, self._only, quiet=True)
            finally:
                self.has_worked |= job.was_accepted


async def _until_stopped(work: Coroutine[Any, Any, None], request: StopRequest) -> None:
    """Await the work, or cancel it on a stop: the next run resumes it."""
    doing = asyncio.create_task(work, name="backfill")
    stop = asyncio.create_task(request.stop.wait(), name="stop")
    await asyncio.wait({doing, stop}, return_when=asyncio.FIRST_COMPLETED)
    for task in (doing, stop):
        if not task.done():
            task.cancel()
    await asyncio.gather(doing, stop, return_exceptions=True)
    if not doing.cancelled():
        doing.result()


@contextlib.asynccontextmanager
async def filling(
    console: Console, settings: Settings, *, listing: bool = True, patient: bool = False
) -> AsyncIterator[tuple[Backfill, int]]:
    """Connect to database and provider; yield the job and, with `listing`, the number of listed instruments."""
    clock = SystemClock()

    def waiting(seconds: float) -> None:
        console.print(f"The rate limit is reached: waiting {seconds:.0f} s.", style="dim")

    async with (
        GapStore(settings.read_database_url()) as gap_store,
        RestClient(
            settings.rest_url,
            settings.read_token(),
            timezone=gap_store.timezone,
            clock=clock,
            on_wait=waiting,
        ) as client,
    ):
        found = await refresh_instruments(gap_store, client) if listing else Refresh()
        if found.wrong:
            console.print(f"The list of instruments: {found.wrong}.", style="yellow", soft_wrap=True, markup=False)
        if found.kept:
            why = "some records are wrong" if found.wrong else "too many disappeared at once"
            console.print(
                f"{found.kept:,} instruments are no longer listed. They stay active: {why}.",
                style="yellow",
                soft_wrap=True,
            )
        yield Backfill(gap_store, client, clock=clock, patient=patient), found.listed


def describe(console: Console, plan: Plan, only: Collection[str]) -> None:
    """Print the planned work."""
    for piece, symbols in zip(plan.pieces, plan.symbols, strict=True):
        count = sum(symbol in only for symbol in symbols) if only else len(symbols)
        length = duration(piece.ended_at - piece.started_at)
        console.print(f"{piece.started_at:%Y-%m-%d %H:%M:%S} UTC, {length}: {count:,} symbols", soft_wrap=True)
    if plan.begun:
        console.print(f"{plan.begun:,} symbols of gaps that an earlier run began")
    if plan.too_old:
        console.print(f"{len(plan.too_old):,} gaps are older than the provider keeps one-minute bars (1 year).")
    if plan.too_young:
        console.print(
            f"{len(plan.too_young):,} gaps are too recent: a minute is requested once it has been over for a minute."
        )
    if plan.is_empty and not plan.too_young:
        console.print("No gap is open.")


async def fill(console: Console, job: Backfill, span: Bounds, only: Collection[str], *, quiet: bool = False) -> Summary:
    """Fill the open gaps, with a progress bar on a terminal; `quiet` prints nothing if there are none."""
    plan = await job.plan(span)
    if not (quiet and plan.is_empty):
        describe(console, plan, only)
    await job.begin(plan)
    requests = await job.requests(span, only)
    if not requests:
        return Summary()
    columns = (
        TextColumn("[bold]backfill[/bold]"),
        TextColumn("{task.description:12}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(requests))
        summary = await job.run(
            requests, lambda done: bar.update(task, advance=1, description=outside_text(done.symbol))
        )
    partly = f"{summary.partial:,} partly filled, " if summary.partial else ""
    console.print(
        f"{len(requests) - summary.unasked:,} requests, {summary.bars:,} bars. "
        f"Symbols of gaps: {summary.filled:,} filled, {partly}{summary.no_trades:,} without trades, "
        f"{summary.unfillable:,} unfillable, {summary.pending:,} to be tried again.",
        soft_wrap=True,
    )
    if summary.wrong:
        reasons = "; ".join(f"{reason}: {count:,}" for reason, count in summary.wrong.items())
        console.print(
            f"Wrong records in the answers (details in ingest.backfills): {reasons}.",
            style="yellow",
            soft_wrap=True,
            markup=False,
        )
    if summary.unasked:
        console.print(
            f"The provider is unavailable: {summary.unasked:,} requests were not made. Run the command again later.",
            style="yellow",
        )
    for error, count in summary.failures.items():
        console.print(f"  {count:,} times: {redact(error)}", style="yellow", soft_wrap=True, markup=False)
    return summary
