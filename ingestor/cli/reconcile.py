"""`ingestor reconcile`: compare our bars with the provider's."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Annotated

import typer

from ingestor.cli._options import moment
from ingestor.settings import load_settings


def reconcile(
    day: Annotated[str, typer.Option("--date", metavar="<day>", help="The trading day, such as 2026-11-20.")],
    symbol: Annotated[
        list[str] | None, typer.Option(metavar="<symbol>", help="Only this symbol; can be repeated.")
    ] = None,
    set_bar_label: Annotated[
        bool,
        typer.Option(
            "--set-bar-label",
            help="Store the label that fits best, and move the fetched bars to it.",
        ),
    ] = False,
) -> None:
    """Compare each wholly covered minute with the provider's bar: open, high, low, close and volume.

    This finds ticks that the server dropped while the stream looked alive. Differences go to `ingest.reconciliations`.
    The provider does not document whether it labels a bar by its start or its end: the command tries both and prints
    the one that fits.

    Exit status: 0 all bars agree, 1 a bar differs or a symbol could not be compared, 69 nothing could be compared.
    Needs **INGESTOR_TOKEN** and **INGESTOR_DATABASE_URL**.
    """
    trading_day = moment(day, "--date")
    if isinstance(trading_day, datetime):
        raise typer.BadParameter("give a day, such as 2026-11-20", param_hint="--date")
    settings = load_settings()
    settings.require("token", "database_url")
    from ingestor.cli import _reconcile

    if not asyncio.run(
        _reconcile.run(settings, trading_day, frozenset(each.upper() for each in symbol or ()), adopt=set_bar_label)
    ):
        raise typer.Exit(1)
