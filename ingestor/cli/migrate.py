"""`ingestor migrate`: brings a database to the newest schema."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from ingestor.cli._output import say
from ingestor.settings import Settings, load_settings


def migrate(
    to_hypertable: Annotated[
        bool,
        typer.Option(
            "--convert-to-hypertable",
            help="Then move market.ticks from monthly partitions into a hypertable, where TimescaleDB came to the "
            "server later. The daemon goes on, and waits for the last step only. Needs room for a second copy of the "
            "ticks. After an interruption, run it again: it goes on.",
        ),
    ] = False,
) -> None:
    """Make or upgrade the tables, and fill settings and trading calendar. Can be repeated.

    Needs **INGESTOR_DATABASE_URL** with a role that may create schemas in that database. On a server with TimescaleDB
    the ticks go into a hypertable, elsewhere into monthly partitions. With its Community edition the bars of ticks
    that are there already are computed, oldest first: that may take minutes, and goes on where it was.

    The daemon needs less: it runs as a login that is a member of the role `market_write`, which this command makes
    and which owns nothing: `CREATE ROLE ingestor LOGIN PASSWORD '…' IN ROLE market_write`. For analysts there is the
    role `market_read`, and `ingestor grant-analyst`.
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
