"""`ingestor maintain`: what has to be done now and then."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from ingestor.cli._options import in_seconds
from ingestor.cli._output import say
from ingestor.errors import StoreError
from ingestor.service.process import stop_on_signals
from ingestor.settings import Settings, load_settings
from ingestor.telemetry.standard_streams import never_block


def maintain(
    every: Annotated[
        str | None,
        typer.Option(
            metavar="<duration>", help="Do it again and again, with this pause (12h), until SIGTERM, SIGHUP or Ctrl-C."
        ),
    ] = None,
) -> None:
    """Keep calendar, partitions, bars and retention. Can be repeated; once a day is right.

    Partitions are made ahead. On TimescaleDB Community the bars of time into which ticks came late are computed anew,
    and policies follow **INGESTOR_COLUMNSTORE_AFTER**. With **INGESTOR_RETENTION** ticks that are older are dropped.

    The calendar comes from the library exchange-calendars where the extra `calendar` is installed, else from the
    snapshot that this version brought along. Needs **INGESTOR_DATABASE_URL** with the role that migrated.
    """
    interval = None if every is None else in_seconds(every, "--every", least=1)
    if interval is not None:
        never_block()
    settings = load_settings()
    settings.require("database_url")
    asyncio.run(_maintain(settings, interval))


async def _maintain(settings: Settings, interval: float | None) -> None:
    from ingestor.admin.maintenance import maintain as maintain_once

    if interval is None:
        await maintain_once(settings, say)
        return
    with stop_on_signals(lambda name: say(f"{name} is ignored.")) as request:
        while not request.stop.is_set():
            try:
                await maintain_once(settings, say)
            except StoreError as error:
                say(str(error))
            await request.pause(interval)
