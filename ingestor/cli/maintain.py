"""`ingestor maintain`: regular maintenance of the database."""

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
        typer.Option(metavar="<duration>", help="Repeat with this pause (12h), until SIGTERM, SIGHUP or Ctrl-C."),
    ] = None,
) -> None:
    """Maintain calendar, partitions, bars, retention and keys. Run it once a day; it can be repeated.

    The command makes partitions ahead, stores missing bars and repairs stale ones, with a line of progress every ten
    seconds. On TimescaleDB Community it also sets policies from **INGESTOR_COLUMNSTORE_AFTER**. With
    **INGESTOR_RETENTION** it drops older ticks; their bars stay. It rebuilds bloated keys of ticks after two weeks,
    and of bars, while others read and write, and needs the disk space of one key for that. It can be interrupted at
    any moment.

    The calendar comes from the library exchange-calendars if the extra `calendar` is installed, else from the snapshot
    in this version. Needs **INGESTOR_DATABASE_URL** with the role that migrated.
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
