"""`ingestor reconcile`: compares our minutes with the provider's."""

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
            help="From now on go by the label that fits best; what was fetched is moved.",
        ),
    ] = False,
) -> None:
    """Compare each minute that was wholly covered with the provider's: open, high, low, close and volume.

    It finds what the server dropped while the stream looked alive. Differences go to `ingest.reconciliations`. Whether
    the provider labels a bar by its start or by its end is not documented: both are tried, and what fits is said.

    Ends with 0 when all is the same, with 1 when something differs or a symbol could not be compared, and with 69 when
    nothing could be compared.
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
