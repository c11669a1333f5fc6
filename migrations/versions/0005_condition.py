"""The condition of each trading day, and what was known at a moment.

Revision 0005, after 0004. Adds only, so a daemon of before goes on.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from pathlib import Path
from types import ModuleType

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

log = logging.getLogger("ingestor.migrations")

WRITER = "market_write"
ZONE = "(SELECT exchange_timezone FROM ingest.settings)"

# --- What each day's data are worth

DAY_COVERAGE = """
CREATE VIEW ingest.day_coverage AS
WITH missed AS (
    SELECT trading_day,
           sum(upper(span) - lower(span)) FILTER (WHERE status = 'excluded') AS excluded,
           sum(upper(span) - lower(span)) FILTER (WHERE status <> 'excluded') AS missed,
           sum(upper(span) - lower(span)) FILTER (WHERE status = 'backfilled') AS backfilled,
           range_agg(span) FILTER (WHERE status = 'open') AS open
    FROM ingest.gap_parts GROUP BY trading_day
)
SELECT trading_day, span, coalesce(open, '{}') AS open,
       extract(epoch FROM upper(span) - lower(span) - coalesce(excluded, '0')) / 60 AS trading,
       extract(epoch FROM coalesce(missed, '0')) / 60 AS missed,
       extract(epoch FROM coalesce(backfilled, '0')) / 60 AS backfilled
FROM ingest.trading_time LEFT JOIN missed USING (trading_day)
"""
# Computed as numeric, and shown as double precision: several clients read a numeric as text, or not at all.
PERCENT = "trunc(100 * (trading - missed + backfilled) / nullif(trading, 0), 2)::double precision"
COVERAGE = f"""
CREATE OR REPLACE VIEW market.coverage AS
SELECT trading_day, round(trading, 6)::double precision AS trading_minutes,
       round(trading - missed, 6)::double precision AS covered_minutes,
       round(missed, 6)::double precision AS missing_minutes,
       round(backfilled, 6)::double precision AS backfilled_minutes, {PERCENT} AS percent
FROM ingest.day_coverage
"""

# A day that goes on ends half a minute ago, so a day whose end is earlier is over. A session that lives proves its time
# bit by bit: the day is pending until it has proved the end of the day too.
CONDITION = f"""
CREATE VIEW market.condition AS
WITH bars AS (
    SELECT (time AT TIME ZONE exchange_timezone)::date AS trading_day, sum(ticks)::bigint AS ticks,
           min(first_at) AS first_tick_at, max(last_at) AS last_tick_at, max(last_received_at) AS received_at
    FROM ingest.exact_1d, (SELECT exchange_timezone FROM ingest.settings LIMIT 1) AS s GROUP BY 1
), proved AS (
    SELECT min(coalesce(upper(span), lower(expected))) AS until FROM ingest.covered WHERE end_reason IS NULL
), days AS (
    SELECT *, upper(span) >= now() - interval '30 seconds' OR coalesce(upper(span) > until, false) OR EXISTS (
               SELECT FROM ingest.backfills AS b WHERE b.symbol = '*' AND b.status = 'pending'
               AND tstzrange(gap_from, gap_until) && open) AS is_pending
    FROM ingest.day_coverage, proved, LATERAL (
        SELECT count(*) AS rejected, max(r.received_at) AS rejected_at
        FROM ingest.rejected_messages AS r LEFT JOIN ingest.stream_sessions AS session ON session.id = r.session_id
        WHERE r.received_at >= lower(span) AND r.received_at < upper(span) AND session.kind IS DISTINCT FROM 'replay'
    ) AS rejections
)
SELECT trading_day,
       CASE WHEN coalesce(is_pending, trading_day >= (now() AT TIME ZONE {ZONE})::date) THEN 'pending'
            WHEN trading > 0 AND missed = trading AND backfilled = 0 AND ticks IS NULL THEN 'missing'
            WHEN trading IS NULL OR missed > backfilled OR rejected > 0 THEN 'degraded'
            ELSE 'available' END AS condition,
       coalesce(ticks, 0) AS ticks, first_tick_at, last_tick_at, {PERCENT} AS percent,
       round(coalesce(backfilled, 0), 6)::double precision AS backfilled_minutes, coalesce(rejected, 0) AS rejected,
       greatest(received_at, rejected_at, changed_at) AS last_modified
FROM days FULL JOIN bars USING (trading_day)
    LEFT JOIN (SELECT trading_day, max(changed_at) AS changed_at FROM ingest.day_changes GROUP BY 1) AS changes
        USING (trading_day)
"""

# --- Changes that no tick's arrival shows

# Rows are added, and no transaction waits for another one: a person's transaction that stays open must not stop the
# recording. The older rows of the days go, but for those that another transaction holds.
NOTE_CHANGES = """
CREATE FUNCTION ingest.note_changes(since timestamptz[], until timestamptz[]) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
WITH spans AS (
    SELECT (first AT TIME ZONE exchange_timezone)::date AS first, (last AT TIME ZONE exchange_timezone)::date AS last
    FROM unnest(since, until) AS s (first, last), ingest.settings
), days AS (
    SELECT first AS day FROM spans UNION SELECT last FROM spans
    UNION SELECT trading_day FROM spans JOIN ingest.trading_sessions ON trading_day > first AND trading_day < last
    WHERE first < last - 1
), older AS (
    SELECT trading_day, id FROM ingest.day_changes WHERE trading_day IN (SELECT day FROM days) FOR UPDATE SKIP LOCKED
), gone AS (
    DELETE FROM ingest.day_changes AS c USING older WHERE c.trading_day = older.trading_day AND c.id = older.id
)
INSERT INTO ingest.day_changes (trading_day, changed_at)
SELECT day, greatest(clock_timestamp(), max(changed_at) + interval '1 microsecond')
FROM days LEFT JOIN ingest.day_changes ON trading_day = day WHERE isfinite(day) GROUP BY day
$$
"""
NOTE_SPANS = """
CREATE FUNCTION ingest.note_{table}() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM ingest.note_changes(array_agg({since}), array_agg({until})) FROM changed HAVING count(*) > 0;
    RETURN NULL;
END
$$
"""
TRIGGER = """
CREATE TRIGGER {table}_{name} AFTER {event} ON ingest.{table} REFERENCING {rows} TABLE AS changed
FOR EACH STATEMENT EXECUTE FUNCTION ingest.note_{table}()
"""
INSERTED, REMOVED = ("inserted", "INSERT", "NEW"), ("deleted", "DELETE", "OLD")
# An update may move a row's span: then both spans have changed.
UPDATED = [("updated_from", "UPDATE", "OLD"), ("updated_to", "UPDATE", "NEW")]
TRIGGERS = {
    "exclusions": [INSERTED, *UPDATED, REMOVED],
    "backfills": [INSERTED, *UPDATED, REMOVED],
    "stale_bars": [INSERTED, UPDATED[1]],  # a minute leaves the list when its bar is stored: nothing changes by that
}
SPANS = {
    "exclusions": ("excluded_from", "excluded_until - interval '1 microsecond'"),
    "backfills": ("gap_from", "gap_until - interval '1 microsecond'"),
    "stale_bars": ("time", "time"),
}
"""The tables whose rows change the data of a day, and the span of a row."""

# --- What was known at a moment

# The planner puts its query in the place of a call, so conditions on symbol and time use the indexes. Without a result
# type of the table, so that the conversion to a hypertable can replace the table.
TICKS_AS_OF = """
CREATE FUNCTION market.ticks_as_of(moment timestamptz) RETURNS TABLE (
    "time" timestamptz, received_at timestamptz, price double precision, volume bigint, occurrence integer, symbol text
) LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT t.time, t.received_at, t.price, t.volume, t.occurrence, t.symbol
    FROM market.ticks AS t WHERE t.received_at <= moment
$$
"""
BOTH_SOURCES = """
CREATE VIEW market.bars_1m_sources AS
SELECT symbol, time, open, high, low, close, volume, 'stream' AS source, last_received_at AS known_at,
       CASE WHEN tstzrange(time, time + interval '1 minute') <@ spans THEN time + interval '1 minute' + margin END
           AS covered_at
FROM ingest.exact_1m, (SELECT spans FROM ingest.fully_covered OFFSET 0) AS covered,
     (SELECT coverage_margin AS margin FROM ingest.settings LIMIT 1) AS s
UNION ALL
SELECT symbol, time, open, high, low, close, volume, 'backfill', fetched_at,
       CASE WHEN tstzrange(time, time + interval '1 minute') <@ spans THEN time + interval '1 minute' + margin END
FROM market.bars, (SELECT spans FROM ingest.fully_covered OFFSET 0) AS covered,
     (SELECT coverage_margin AS margin FROM ingest.settings LIMIT 1) AS s
WHERE resolution = interval '1 minute'
"""
# A bar with a tick that came after the moment is computed from those that had come.
BARS_AS_OF = """
CREATE FUNCTION market.bars_1m_as_of(moment timestamptz) RETURNS TABLE (
    symbol text, "time" timestamptz, open double precision, high double precision, low double precision,
    close double precision, volume bigint, source text
) LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT b.symbol, b.time, b.open, b.high, b.low, b.close, b.volume, b.source
    FROM market.bars_1m_sources AS b
    WHERE b.known_at <= moment AND (b.source = 'stream') = coalesce(b.covered_at <= moment, false)
    UNION ALL
    SELECT b.symbol, b.time, bar.open, bar.high, bar.low, bar.close, bar.volume, b.source
    FROM market.bars_1m_sources AS b, LATERAL (
        SELECT market.open_price(t.price, t.time, t.received_at, t.occurrence) AS open, max(t.price) AS high,
               min(t.price) AS low, market.close_price(t.price, t.time, t.received_at, t.occurrence) AS close,
               least(sum(t.volume), 9223372036854775807)::bigint AS volume
        FROM market.ticks AS t
        WHERE t.symbol = b.symbol AND t.time >= b.time AND t.time < b.time + interval '1 minute'
          AND t.received_at <= moment HAVING count(*) > 0
    ) AS bar
    WHERE b.source = 'stream' AND b.known_at > moment AND b.covered_at <= moment
$$
"""

RELATION_COMMENTS = {
    "ingest.day_coverage": {
        "": "The lengths of trading, missed and backfilled time of each trading day, in minutes.",
        "trading_day": "The exchange's day.",
        "span": "Its trading time; of today, so far.",
        "open": "The parts of it that are not covered, and not excluded, backfilled or given up.",
        "trading": "Trading time without what is excluded.",
        "missed": "The part of it that no session covers.",
        "backfilled": "The part of the missed time that is backfilled for every symbol.",
    },
    "market.condition": {
        "": "Each trading day's condition, its number of ticks, and when it last changed.",
        "trading_day": "The exchange's day. Also days without trading time on record, if they have ticks.",
        "condition": (
            "available: all trading time is covered or backfilled. degraded: a part of it is neither, a message was "
            "rejected, or nothing proves coverage. pending: the day is not over, its end is not proved yet, or a "
            "backfill of it is pending. missing: nothing was covered, backfilled or received."
        ),
        "ticks": "Number of ticks, also of those that retention has dropped.",
        "first_tick_at": "Time of its first tick.",
        "last_tick_at": "Time of its last tick.",
        "percent": "Share of the trading time that is covered or backfilled, as in market.coverage.",
        "backfilled_minutes": "Minutes that have the provider's bars in the place of ticks.",
        "rejected": "Messages of its trading time that could not be stored as ticks.",
        "last_modified": (
            "When its data last changed: by a tick, a rejected message, a backfill or an exclusion. Null: never."
        ),
    },
    "market.bars_1m_sources": {
        "": "One-minute bars of both sources, and since when each is known. market.bars_1m chooses from them.",
        "symbol": "The exchange's symbol with its suffix.",
        "time": "Start of the minute, by the exchange's clock.",
        "open": "First price.",
        "high": "Highest price.",
        "low": "Lowest price.",
        "close": "Last price.",
        "volume": "Units traded.",
        "source": "stream: from our ticks. backfill: fetched from the provider.",
        "known_at": "When the last of its ticks to arrive was received, or when it was fetched last.",
        "covered_at": (
            "When its minute and the margin after it were over, if the stream covered the minute in full; else null."
        ),
    },
}
FUNCTION_COMMENTS = {
    "market.ticks_as_of": (
        "The ticks of market.ticks that had arrived by that moment. Ticks that retention has dropped are not among "
        "them."
    ),
    "market.bars_1m_as_of": (
        "The bars of market.bars_1m as they were known at that moment: from the ticks that had arrived, and from the "
        "bars that had been fetched. A bar that was fetched again counts from its last fetch on. A bar that changed "
        "after the moment and whose ticks retention has dropped is left out."
    ),
    "ingest.note_changes": "Notes that the data of the days of some spans have changed.",
}


def _bars() -> ModuleType:
    """Return revision 0004, also where Alembic runs no migration."""
    path = Path(__file__).with_name("0004_stored_bars.py")
    spec = importlib.util.spec_from_file_location("stored_bars", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bars = _bars()

# The views on bars, for the conversion to a hypertable: 0004's, and those of this revision.
RELATIONS = ("market.condition", "market.bars_1m_sources", *bars.RELATIONS)
is_community = bars.is_community
has_aggregates = bars.has_aggregates
make_index = bars.make_index


def upgrade() -> None:
    """Add the table of changes, the views and the functions."""
    connection = op.get_bind()
    text = Path(__file__).with_suffix(".sql").read_text(encoding="utf-8")
    for statement in re.split(r";\n(?=\n|COMMENT )", text.rstrip().removesuffix(";")):
        connection.exec_driver_sql(statement)
    connection.exec_driver_sql(NOTE_CHANGES)
    connection.exec_driver_sql("REVOKE ALL ON FUNCTION ingest.note_changes FROM PUBLIC")
    for table, (since, until) in SPANS.items():
        connection.exec_driver_sql(NOTE_SPANS.format(table=table, since=since, until=until))
        for name, event, rows in TRIGGERS[table]:
            connection.exec_driver_sql(TRIGGER.format(table=table, name=name, event=event, rows=rows))
    connection.exec_driver_sql(DAY_COVERAGE)
    connection.exec_driver_sql(COVERAGE)
    _comment(connection, "ingest.day_coverage")
    connection.exec_driver_sql(TICKS_AS_OF)
    _make_views(connection)
    connection.exec_driver_sql(BARS_AS_OF)
    for name, comment in FUNCTION_COMMENTS.items():
        connection.exec_driver_sql(f"COMMENT ON FUNCTION {name} IS {_quoted(comment)}")
    grant = f"GRANT EXECUTE ON FUNCTION ingest.note_changes TO {WRITER};"
    if connection.scalar(sa.text("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = :name)"), {"name": WRITER}):
        connection.exec_driver_sql(grant)
    else:
        log.warning("There is no role %s. When it is made, it needs in addition: %s", WRITER, grant)


def downgrade() -> None:
    """Drop them, and restore the view of 0002."""
    connection = op.get_bind()
    connection.exec_driver_sql("DROP FUNCTION market.bars_1m_as_of, market.ticks_as_of")
    _drop_views(connection)
    earlier = Path(__file__).with_name("0002_coverage_views.sql").read_text(encoding="utf-8")
    found = re.search(r"CREATE (VIEW market\.coverage AS\n.*?);\n", earlier, re.DOTALL)
    assert found is not None
    connection.exec_driver_sql(f"CREATE OR REPLACE {found[1]}")
    connection.exec_driver_sql("DROP VIEW ingest.day_coverage")
    for table in SPANS:
        connection.exec_driver_sql(f"DROP FUNCTION ingest.note_{table} CASCADE")
    connection.exec_driver_sql("DROP FUNCTION ingest.note_changes")
    connection.exec_driver_sql("DROP TABLE ingest.day_changes")


def make_relations(connection: sa.Connection) -> None:
    """Make the views on bars, for the edition that is found."""
    bars.make_relations(connection)
    _make_views(connection)


def drop_relations(connection: sa.Connection) -> None:
    """Drop everything that `make_relations` makes."""
    _drop_views(connection)
    bars.drop_relations(connection)


def _make_views(connection: sa.Connection) -> None:
    for sql in (CONDITION, BOTH_SOURCES):
        connection.exec_driver_sql(sql)
    for relation in ("market.condition", "market.bars_1m_sources"):
        _comment(connection, relation)


def _drop_views(connection: sa.Connection) -> None:
    for relation in ("market.condition", "market.bars_1m_sources"):
        connection.exec_driver_sql(f"DROP VIEW {relation}")


def _comment(connection: sa.Connection, relation: str) -> None:
    for column, comment in RELATION_COMMENTS[relation].items():
        name = f"COLUMN {relation}.{column}" if column else f"VIEW {relation}"
        connection.exec_driver_sql(f"COMMENT ON {name} IS {_quoted(comment)}")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''").replace("%", "%%") + "'"
