"""`ingestor backfill`: fills what was not heard."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from ingestor.cli._options import Since, Until, bounds, in_seconds
from ingestor.settings import load_settings
from ingestor.telemetry.standard_streams import never_block


def backfill(
    since: Since = None,
    until: Until = None,
    symbol: Annotated[
        list[str] | None, typer.Option(metavar="<symbol>", help="Only this symbol; can be repeated.")
    ] = None,
    retry_unfillable: Annotated[
        bool,
        typer.Option("--retry-unfillable", help="Also what was given up: unknown to the provider, or wrong records."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be asked for.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on for ever, and fill gaps as they appear.")] = False,
    every: Annotated[
        str, typer.Option(metavar="<duration>", help="With --watch: how long to wait between two looks.")
    ] = "1m",
) -> None:
    """Ask Financefeast's REST API for the one-minute bars of every open gap, into `market.bars`.

    Every symbol that may have traded is asked for, on each day with a gap. The rate limit is honoured, and what was
    interrupted is taken up again at the symbol where it stopped. A symbol that the provider does not know (of those
    that it lists: three times) is `unfillable` until `--retry-unfillable`, one without bars had `no trades`, and gaps
    older than a year, which the provider no longer keeps, are `unfillable` as a whole: all of it is on record in
    `ingest.backfills`. Wrong records in an answer are named there; the others are stored, and the symbol is asked for
    again, three times, before it is `partial` or `unfillable`. A minute is asked for when it has been over for a
    minute and **INGESTOR_COVERAGE_MARGIN**.

    With --watch, what has failed is asked for again after a minute, then four times as late each time, up to a day.

    Ends with 0 when nothing is left to fill, with 1 when some of it failed (run it again later), and with 69 when the
    database or the provider is unavailable.
    Needs **INGESTOR_TOKEN** and **INGESTOR_DATABASE_URL**.
    """
    span = bounds(since, until)
    interval = in_seconds(every, "--every", least=1)
    if watch:
        never_block()
    settings = load_settings()
    settings.require("token", "database_url")
    from ingestor.cli import _backfill

    only = frozenset(each.upper() for each in symbol or ())
    if watch:
        asyncio.run(_backfill.watch(settings, span, only, interval))
    elif not asyncio.run(_backfill.once(settings, span, only, retry_unfillable=retry_unfillable, dry_run=dry_run)):
        raise typer.Exit(1)
