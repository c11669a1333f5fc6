"""Bars of every width from the ticks, the last ticks, one series without holes, and the role of analysts.

Revision 0003, after 0002. On TimescaleDB Community the bars are continuous aggregates, elsewhere views of the same
names and columns. Adds only, so a daemon of before goes on.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import sqlalchemy as sa
from alembic import context, op
from alembic.util import CommandError

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

log = logging.getLogger("ingestor.migrations")

MINIMUM_TIMESCALE = (2, 18)
"""Of the Community edition: the first version with a columnstore by that name."""

WRITER = "market_write"
READER = "market_read"

WIDTHS = {"1m": "1 minute", "5m": "5 minutes", "1h": "1 hour", "1d": "1 day"}
"""The bars' names and widths, each of whole ones of the width before it."""

RELATIONS = ("market.bars_1m", "market.latest", *(f"market.ohlcv_{name}" for name in reversed(WIDTHS)))
"""The relations of `make_relations`, each before those that it reads."""

WORDS = {"1m": "One-minute", "5m": "Five-minute", "1h": "One-hour", "1d": "One-day"}

# A price so far from any market's would let the whole sum overflow, or its quotient underflow: both are errors.
TURNOVER = "sum(CASE WHEN abs(price) BETWEEN 1e-280 AND 1e280 THEN price * volume ELSE 0 END)"
VOLUME = "least(sum(volume), 9223372036854775807)::bigint"

FROM_TICKS = f"""
       market.open_price(price, ticks.time, received_at, occurrence) AS open, max(price) AS high, min(price) AS low,
       market.close_price(price, ticks.time, received_at, occurrence) AS close, {VOLUME} AS volume,
       {TURNOVER} AS turnover, {TURNOVER} / nullif(sum(volume), 0) AS vwap, count(*) AS ticks"""

FROM_BARS = f"""
       market.open_price(open, {{source}}.time, {{source}}.time, 1) AS open, max(high) AS high, min(low) AS low,
       market.close_price(close, {{source}}.time, {{source}}.time, 1) AS close, {VOLUME} AS volume,
       sum(turnover) AS turnover, sum(turnover) / nullif(sum(volume), 0) AS vwap, sum(ticks)::bigint AS ticks"""

BINNED = "date_bin('{width}', time, '2000-01-01 00:00:00+00'::timestamptz)"
MIDNIGHT = "(date_trunc('day', time AT TIME ZONE '{zone}') AT TIME ZONE '{zone}')"
BUCKETS = {"1m": BINNED, "5m": BINNED, "1h": BINNED, "1d": MIDNIGHT}

# The buckets hide the time from the key. Ticks come in the order of time, so one entry for each 128 pages tells which
# buckets are where: kilobytes for millions of rows.
INDEX = "CREATE INDEX {name} ON {table} USING brin ({columns}) WITH (autosummarize = on)"
VIEW = f"""
CREATE VIEW market.ohlcv_{{name}} AS
SELECT symbol, {{bucket}} AS time,{FROM_TICKS}
FROM market.ticks GROUP BY symbol, {{bucket}}
"""

# WITH NO DATA, or it could not be made in a transaction; `ingestor migrate` materialises from the oldest tick on.
# Real-time aggregation is off unless it is asked for.
AGGREGATE = """
CREATE MATERIALIZED VIEW market.ohlcv_{name}
WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS
SELECT symbol, {bucket} AS time,{columns}
FROM market.{source} GROUP BY symbol, {bucket}
WITH NO DATA
"""

# By the key's columns too, so that a copy is looked for in few rows.
COLUMNSTORE = """
ALTER TABLE market.ticks SET (timescaledb.enable_columnstore, timescaledb.segmentby = 'symbol',
                              timescaledb.orderby = 'time, received_at, price, volume, occurrence')
"""

LATEST_BY_KEY = """
WITH RECURSIVE symbols AS (
    (SELECT symbol FROM market.ticks ORDER BY symbol LIMIT 1)
    UNION ALL
    SELECT (SELECT t.symbol FROM market.ticks t WHERE t.symbol > s.symbol ORDER BY t.symbol LIMIT 1)
    FROM symbols s WHERE s.symbol IS NOT NULL
)
SELECT s.symbol, last.time, last.received_at, last.price, last.volume
FROM symbols s, LATERAL (SELECT * FROM market.ticks t WHERE t.symbol = s.symbol
                         ORDER BY t.time DESC, t.received_at DESC, t.occurrence DESC LIMIT 1) AS last
"""
LATEST_BY_DAY = """
SELECT s.symbol, last.time, last.received_at, last.price, last.volume
FROM (SELECT symbol, max(time) AS day FROM market.ohlcv_1d GROUP BY symbol) AS s,
     LATERAL (SELECT * FROM market.ticks t WHERE t.symbol = s.symbol AND t.time >= s.day
              ORDER BY t.time DESC, t.received_at DESC, t.occurrence DESC LIMIT 1) AS last
"""

BARS_1M = """
CREATE VIEW market.bars_1m AS
SELECT symbol, time, open, high, low, close, volume, 'stream' AS source
FROM market.ohlcv_1m, (SELECT spans FROM ingest.fully_covered OFFSET 0) AS whole
WHERE tstzrange(time, time + interval '1 minute') <@ spans
UNION ALL
SELECT symbol, time, open, high, low, close, volume, 'backfill'
FROM market.bars, (SELECT spans FROM ingest.fully_covered OFFSET 0) AS whole
WHERE resolution = interval '1 minute' AND NOT tstzrange(time, time + interval '1 minute') <@ spans
"""

OHLCV_COMMENTS = {
    "symbol": "The exchange's symbol with its suffix.",
    "open": "First price, in the order (time, received_at, occurrence).",
    "high": "Highest price.",
    "low": "Lowest price.",
    "close": "Last price, in the order (time, received_at, occurrence).",
    "volume": "Units traded.",
    "turnover": "Money traded: the sum of price times volume.",
    "vwap": "Volume-weighted average price, turnover / volume; null where no units were traded.",
    "ticks": "Number of ticks.",
}
OTHER_COMMENTS = {
    "market.latest": "The last tick of each symbol.",
    "market.latest.symbol": "The exchange's symbol with its suffix.",
    "market.latest.time": "When the trade happened, by the exchange's clock.",
    "market.latest.received_at": "When the message arrived here.",
    "market.latest.price": "Price of one unit.",
    "market.latest.volume": "Units traded.",
    "market.bars_1m": (
        "One series of one-minute bars: ours if the minute is fully covered, else the backfilled one. A minute with "
        "neither had no trades, or is not fully covered and not backfilled: it touches a gap (market.gaps, with a "
        "margin of 5 s), a message in it could not be read, or its ticks were dropped."
    ),
    "market.bars_1m.symbol": "The exchange's symbol with its suffix.",
    "market.bars_1m.time": "Start of the minute, by the exchange's clock.",
    "market.bars_1m.open": "First price.",
    "market.bars_1m.high": "Highest price.",
    "market.bars_1m.low": "Lowest price.",
    "market.bars_1m.close": "Last price.",
    "market.bars_1m.volume": "Units traded.",
    "market.bars_1m.source": "stream: from our ticks. backfill: fetched from the provider.",
}

WRITER_GRANTS = f"""
GRANT SELECT ON market.bars_1m TO {WRITER};
"""
READER_GRANTS = f"""
GRANT USAGE ON SCHEMA market TO {READER};
GRANT SELECT ON ALL TABLES IN SCHEMA market TO {READER};
ALTER DEFAULT PRIVILEGES FOR ROLE {{owner}} IN SCHEMA market GRANT SELECT ON TABLES TO {READER};
"""


def upgrade() -> None:
    """Add the functions, the list of refreshes and the relations, and let both roles read them."""
    connection = op.get_bind()
    text = Path(__file__).with_suffix(".sql").read_text(encoding="utf-8")
    for statement in re.split(r";\n(?=\n|COMMENT )", text.rstrip().removesuffix(";")):
        connection.exec_driver_sql(statement)
    make_index(connection, "ticks_buckets_idx", "market.ticks")
    make_relations(connection)
    if _role_exists(connection, WRITER):
        _run(connection, WRITER_GRANTS)
    else:
        log.warning("There is no role %s. When it is made, it needs in addition: %s", WRITER, _line(WRITER_GRANTS))
    grant_reader(connection)


def downgrade() -> None:
    """Take away what was added, but for the role, which the whole server shares."""
    connection = op.get_bind()
    drop_relations(connection)
    if _role_exists(connection, READER):
        op.execute(f"ALTER DEFAULT PRIVILEGES IN SCHEMA market REVOKE SELECT ON TABLES FROM {READER}")
        op.execute(f"REVOKE ALL ON ALL TABLES IN SCHEMA market FROM {READER}")
        op.execute(f"REVOKE USAGE ON SCHEMA market FROM {READER}")
    op.execute("DROP TABLE IF EXISTS market.ticks_adopted")  # of an adoption that was not finished
    op.execute("ALTER TABLE ingest.settings DROP COLUMN ticks_since")
    op.execute("DROP TABLE ingest.stale_ranges")
    op.execute("DROP INDEX market.ticks_buckets_idx")
    for aggregate in ("open_price", "close_price"):
        op.execute(f"DROP AGGREGATE market.{aggregate}(double precision, timestamptz, timestamptz, integer)")
    for function in ("price_of", "later_of", "earlier_of", "later_price", "earlier_price"):
        op.execute(f"DROP FUNCTION market.{function}")
    op.execute("DROP TYPE market.placed_price")


def make_index(connection: sa.Connection, name: str, table: str) -> None:
    """Make the index of buckets on a table of ticks; where bars are computed ahead, it needs the time alone."""
    buckets = [] if _has_licence(connection) else _buckets(connection).values()
    connection.exec_driver_sql(INDEX.format(name=name, table=table, columns=", ".join(["time", *buckets])))


def make_relations(connection: sa.Connection) -> None:
    """Make the bars of each width, the last ticks and the series without holes, for the edition that is found."""
    if is_community(connection):
        _make_aggregates(connection)
    else:
        _make_views(connection)
    connection.exec_driver_sql(BARS_1M)
    for name, words in WORDS.items():
        view = f"market.ohlcv_{name}"
        start = "Midnight of the exchange's day" if name == "1d" else f"Start of the {WIDTHS[name].split()[1]}"
        if name == "5m":
            start = "Start of the five minutes"
        about = f"{words} bars from the ticks that were received, whether all of that time was covered or not."
        _comment(connection, "VIEW", view, about)
        for column, comment in {**OHLCV_COMMENTS, "time": f"{start}, by the exchange's clock."}.items():
            _comment(connection, "COLUMN", f"{view}.{column}", comment)
    for what, comment in OTHER_COMMENTS.items():
        _comment(connection, "VIEW" if what.count(".") == 1 else "COLUMN", what, comment)


def _make_views(connection: sa.Connection) -> None:
    for name, bucket in _buckets(connection).items():
        connection.exec_driver_sql(VIEW.format(name=name, bucket=bucket))
    connection.exec_driver_sql(f"CREATE VIEW market.latest AS {LATEST_BY_KEY}")


def _buckets(connection: sa.Connection) -> dict[str, str]:
    zone = _timezone(connection)
    return {name: bucket.format(width=WIDTHS[name], zone=zone) for name, bucket in BUCKETS.items()}


def _make_aggregates(connection: sa.Connection) -> None:
    _check_version(connection)
    timezone = _timezone(connection)
    source, columns = "ticks", FROM_TICKS
    for name, width in WIDTHS.items():
        if name == "1d" and not _has_whole_hours(connection, timezone):
            source = "ohlcv_5m"
        zone = f", '{timezone}'" if name == "1d" else ""
        bucket = f"time_bucket('{width}', {source}.time{zone})"
        columns = FROM_TICKS if source == "ticks" else FROM_BARS.format(source=source)
        connection.exec_driver_sql(AGGREGATE.format(name=name, bucket=bucket, source=source, columns=columns))
        source = f"ohlcv_{name}"
    connection.exec_driver_sql(f"CREATE VIEW market.latest AS {LATEST_BY_DAY}")
    connection.exec_driver_sql(COLUMNSTORE)


def drop_relations(connection: sa.Connection) -> None:
    """Drop what `make_relations` has made."""
    connection.exec_driver_sql("DROP VIEW market.bars_1m")
    connection.exec_driver_sql("DROP VIEW market.latest")
    kind = "VIEW"
    if has_aggregates(connection):
        kind = "MATERIALIZED VIEW"
        connection.exec_driver_sql("CALL remove_columnstore_policy('market.ticks', if_exists => true)")
        connection.exec_driver_sql("SELECT decompress_chunk(chunk, true) FROM show_chunks('market.ticks') AS chunk")
        connection.exec_driver_sql("ALTER TABLE market.ticks SET (timescaledb.enable_columnstore = false)")
    for name in reversed(WIDTHS):
        connection.exec_driver_sql(f"DROP {kind} market.ohlcv_{name}")


def is_community(connection: sa.Connection) -> bool:
    """Whether `market.ticks` is a hypertable of an edition that has continuous aggregates."""
    if not _has_licence(connection):
        return False
    is_hypertable = (
        "SELECT EXISTS (SELECT FROM timescaledb_information.hypertables "
        "WHERE hypertable_schema = 'market' AND hypertable_name = 'ticks')"
    )
    return bool(connection.scalar(sa.text(is_hypertable)))


def has_aggregates(connection: sa.Connection) -> bool:
    """Whether the bars are continuous aggregates: they are views where the edition was another one at first."""
    aggregates = (
        "SELECT EXISTS (SELECT FROM timescaledb_information.continuous_aggregates "
        "WHERE view_schema = 'market' AND view_name = 'ohlcv_1m')"
    )
    return _has_licence(connection) and bool(connection.scalar(sa.text(aggregates)))


def _has_licence(connection: sa.Connection) -> bool:
    """Whether TimescaleDB is in use, in its Community edition."""
    licence = connection.scalar(sa.text("SELECT current_setting('timescaledb.license', true)"))
    installed = "SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb')"
    return licence == "timescale" and bool(connection.scalar(sa.text(installed)))


def grant_reader(connection: sa.Connection) -> None:
    """Make the role that analysts' logins are members of; where that is not allowed, say what to run."""
    grants = READER_GRANTS.format(owner=connection.scalar(sa.text("SELECT format('%I', current_user)")))
    try:
        with connection.begin_nested():
            if not _role_exists(connection, READER):
                connection.execute(sa.text(f"CREATE ROLE {READER} NOLOGIN"))
    except sa.exc.DBAPIError as error:  # roles belong to the whole server: another migration may just have made it
        if not _role_exists(connection, READER):
            log.warning(
                "The role %s could not be made (%s). For analysts, let a superuser run: CREATE ROLE %s NOLOGIN; %s",
                READER,
                error.orig,
                READER,
                _line(grants),
            )
            return
    _run(connection, grants)


def _timezone(connection: sa.Connection) -> str:
    """Return the exchange's time zone for a literal: as recorded, or in a new database as `env.py` passes it."""
    found = connection.scalar(sa.text("SELECT exchange_timezone FROM ingest.settings"))
    if found is None:
        found = context.config.attributes["exchange_timezone"]
    return str(found).replace("'", "''")


def _check_version(connection: sa.Connection) -> None:
    """Raise CommandError if TimescaleDB is older than `MINIMUM_TIMESCALE`."""
    version = str(connection.scalar(sa.text("SELECT extversion FROM pg_extension WHERE extname = 'timescaledb'")))
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < MINIMUM_TIMESCALE:
        raise CommandError(
            f"TimescaleDB {version} is too old: {'.'.join(map(str, MINIMUM_TIMESCALE))} or newer is needed. "
            "Upgrade its package, then: psql -X, and as its first command ALTER EXTENSION timescaledb UPDATE."
        )


def _has_whole_hours(connection: sa.Connection, timezone: str) -> bool:
    """Whether every day there begins with an hour of UTC, so that days are made of whole hours."""
    offsets = sa.text(
        "SELECT bool_and(extract(minute FROM day AT TIME ZONE :zone) = 0) "
        "FROM generate_series(timestamptz '1990-01-01 00:00Z', now() + interval '1 year', interval '1 day') AS day"
    )
    return bool(connection.scalar(offsets, {"zone": timezone}))


def _comment(connection: sa.Connection, kind: str, name: str, comment: str) -> None:
    escaped = comment.replace("'", "''").replace("%", "%%")
    connection.exec_driver_sql(f"COMMENT ON {kind} {name} IS '{escaped}'")


def _role_exists(connection: sa.Connection, name: str) -> bool:
    exists = sa.text("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = :name)")
    return bool(connection.scalar(exists, {"name": name}))


def _run(connection: sa.Connection, statements: str) -> None:
    for statement in statements.strip().removesuffix(";").split(";\n"):
        connection.exec_driver_sql(statement)


def _line(statements: str) -> str:
    return " ".join(statements.split())
