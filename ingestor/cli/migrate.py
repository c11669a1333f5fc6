"""`ingestor migrate`: brings a database to the newest schema."""

from __future__ import annotations

import asyncio

from ingestor import settings as configuration
from ingestor.telemetry import scrub


def migrate() -> None:
    """Make or upgrade the tables, and fill settings and trading calendar. Can be repeated.

    Needs **INGESTOR_DATABASE_URL** with a role that may create schemas in that database. On a server with TimescaleDB
    the ticks go into a hypertable, elsewhere into monthly partitions. With its Community edition the bars of ticks
    that are there already are computed, oldest first: that may take minutes, and goes on where it was.

    The daemon needs less: it runs as a login that is a member of the role `market_write`, which this command makes
    and which owns nothing: `CREATE ROLE ingestor LOGIN PASSWORD '…' IN ROLE market_write`. For analysts there is the
    role `market_read`, and `ingestor grant-analyst`.
    """
    from ingestor.store.migrate import migrate as migrate_database

    settings = configuration.load()
    asyncio.run(migrate_database(settings.read_database_url(), settings, lambda line: print(scrub(line))))
