"""`ingestor migrate`: bring a database to the newest schema."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from ingestor.cli._output import say
from ingestor.settings import Settings, load_settings, require_nats


def migrate(
    to_hypertable: Annotated[
        bool,
        typer.Option(
            "--convert-to-hypertable",
            help="Then move market.ticks from monthly partitions into a hypertable, if TimescaleDB came later. "
            "The daemon keeps running and waits only for the last step. Needs disk space for a second copy of the "
            "ticks. After an interruption, run it again to resume.",
        ),
    ] = False,
) -> None:
    """Create or upgrade the tables, and store settings and trading calendar. Can be repeated.

    Needs **INGESTOR_DATABASE_URL** with a role that may create schemas in that database. On a server with TimescaleDB
    the ticks go into a hypertable, else into monthly partitions. The command stores the bars of existing ticks, oldest
    first; this may take minutes, can be resumed, and the daemon may write meanwhile.

    The daemon runs as a member of the role `market_write`, which this command makes and which owns nothing:
    `CREATE ROLE ingestor LOGIN PASSWORD '…' IN ROLE market_write`. Analysts use the role `market_read`: see
    `ingestor grant-analyst`.

    With **INGESTOR_BUFFER_URL**, the command also creates the JetStream stream. It never changes one that is there.
    """
    asyncio.run(_migrate(load_settings(), to_hypertable=to_hypertable))


async def _migrate(settings: Settings, *, to_hypertable: bool) -> None:
    from ingestor.admin.hypertable import convert_to_hypertable, tell_of_adoption
    from ingestor.admin.migrate import migrate as migrate_database

    url = settings.read_database_url()
    await migrate_database(url, settings, say)
    if to_hypertable:
        await convert_to_hypertable(url, settings, say)
    else:
        await tell_of_adoption(url, say)
    if settings.buffer_url is not None:
        await _prepare_buffer(settings)


async def _prepare_buffer(settings: Settings) -> None:
    """Create the stream of the replicated buffer, or report how it differs."""
    require_nats()
    from ingestor.jetstream.survey import prepare

    setup = await prepare(settings)
    name = settings.buffer_stream
    if setup.created:
        say(f"The stream {name} was created, with {settings.buffer_replicas} copies.")
    elif not setup.differences:
        say(f"The stream {name} is there and as it should be.")
    for difference in setup.differences:
        say(f"The stream {name} was left as it is, but {difference}.")
