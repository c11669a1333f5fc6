"""`ingestor backfill`: fill gaps with the provider's bars."""

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
        typer.Option(
            "--retry-unfillable", help="Also retry unfillable symbols: unknown to the provider, or with wrong records."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the requests that would be made.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Keep running, and fill gaps as they appear.")] = False,
    every: Annotated[str, typer.Option(metavar="<duration>", help="With --watch: pause between two checks.")] = "1m",
) -> None:
    """Ask Financefeast's REST API for the one-minute bars of every open gap, into `market.bars`.

    For each day with a gap, the command requests every symbol that may have traded. It honours the rate limit. An
    interrupted run resumes at the symbol where it stopped. Outcomes are recorded in `ingest.backfills`:

    - a symbol without bars had `no trades`;
    - a symbol unknown to the provider is `unfillable` until `--retry-unfillable` (a listed one after three answers);
    - after three answers with wrong records a symbol is `partial` or `unfillable`; its valid bars are stored;
    - a gap older than a year is `unfillable`: the provider keeps bars for a year.

    A minute is requested once it has been over for a minute and **INGESTOR_COVERAGE_MARGIN**. With --watch, a failed
    request is retried after a minute, then after four times as long each time, up to a day.

    Exit status: 0 nothing is left to fill, 1 some requests failed (run it again later), 69 the database or the
    provider is unavailable.
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
