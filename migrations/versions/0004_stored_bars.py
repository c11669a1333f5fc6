"""Stored bars in every edition, with views that give at any moment the answer that the ticks alone would give.

Revision 0004, after 0003. Without continuous aggregates, bars are stored in `ingest.rollup_*` by `ingest.roll_up`;
with them, TimescaleDB stores them. The views are the same in both cases. Each reads a stored bar where it is valid,
computes the bars of stale minutes, and computes the bars that are not stored yet.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import sqlalchemy as sa
from alembic import context, op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

log = logging.getLogger("ingestor.migrations")

WRITER = "market_write"

WIDTHS = {"1m": "1 minute", "5m": "5 minutes", "1h": "1 hour", "1d": "1 day"}
"""The bars' names and widths."""

SOURCES = {"5m": "1m", "1h": "5m", "1d": "5m"}
"""The smaller bars that a bar consists of. A day may begin within an hour of UTC."""

SMALLER = {"5m": ["1m"], "1h": ["5m", "1m"], "1d": ["5m", "1m"]}
"""The stored bars that the last bucket, which is not complete, is computed from."""

ZONE = "(SELECT exchange_timezone FROM ingest.settings)"

RELATIONS = (
    "market.bars_1m",
    "market.latest",
    *(f"market.ohlcv_{name}" for name in reversed(WIDTHS)),
    *(f"ingest.exact_{name}" for name in reversed(WIDTHS)),
    "ingest.live_1m",
    "ingest.stale",
    *(f"ingest.stored_{name}" for name in WIDTHS),
    "ingest.rolled",
)
"""The relations that `make_relations` makes, in the order in which they can be dropped."""

WORDS = {"1m": "One-minute", "5m": "Five-minute", "1h": "One-hour", "1d": "One-day"}

ORIGIN = "'2000-01-01 00:00:00+00'::timestamptz"
BUCKETS = {
    **{name: f"date_bin('{width}', {{time}}, {ORIGIN})" for name, width in WIDTHS.items() if name != "1d"},
    "1d": "(date_trunc('day', {time} AT TIME ZONE {zone}) AT TIME ZONE {zone})",
}
ENDS = {
    **{name: f"{{time}} + interval '{width}'" for name, width in WIDTHS.items() if name != "1d"},
    "1d": "(({time} AT TIME ZONE {zone} + interval '1 day') AT TIME ZONE {zone})",
}

# A price beyond these bounds would let the whole sum overflow, or its quotient underflow. Both are errors.
MONEY = "CASE WHEN abs(price) BETWEEN 1e-280 AND 1e280 THEN price * volume ELSE 0 END"
VOLUME = "least(sum(volume), 9223372036854775807)::bigint"

COLUMNS = "symbol, time, open, high, low, close, volume, turnover, ticks, first_at, last_at, last_received_at"

FROM_TICKS = f"""
       market.open_price(price, t.time, received_at, occurrence) AS open, max(price) AS high, min(price) AS low,
       market.close_price(price, t.time, received_at, occurrence) AS close, {VOLUME} AS volume,
       sum({MONEY}) AS turnover, count(*) AS ticks, min(t.time) AS first_at, max(t.time) AS last_at,
       max(received_at) AS last_received_at"""

# Bars of one symbol do not overlap, so their own times order them.
FROM_BARS = f"""
       market.open_price(open, b.time, b.time, 1) AS open, max(high) AS high, min(low) AS low,
       market.close_price(close, b.time, b.time, 1) AS close, {VOLUME} AS volume,
       sum(turnover) AS turnover, sum(ticks)::bigint AS ticks, min(first_at) AS first_at, max(last_at) AS last_at,
       max(last_received_at) AS last_received_at"""

# A late tick whose time was dropped is merged into the stored bar. That one's ticks arrived before it.
FROM_PARTS = f"""
       market.open_price(open, first_at, received_at, occurrence) AS open, max(high) AS high, min(low) AS low,
       market.close_price(close, last_at, received_at, occurrence) AS close, {VOLUME} AS volume,
       sum(turnover) AS turnover, sum(ticks)::bigint AS ticks, min(first_at) AS first_at, max(last_at) AS last_at,
       max(last_received_at) AS last_received_at"""

ROLLED = """
CREATE VIEW ingest.rolled AS
SELECT until_1m, until_5m, until_1h, until_1d, announced_until AS noted_before FROM ingest.rollup_state
"""
STORED = f"CREATE VIEW ingest.stored_{{name}} AS SELECT {COLUMNS} FROM ingest.rollup_{{name}}"

STALE = """
CREATE VIEW ingest.stale AS
SELECT symbol, time, {bucket_5m} AS bucket_5m, {bucket_1h} AS bucket_1h, {bucket_1d} AS bucket_1d,
       coalesce(time < (SELECT ticks_since FROM ingest.settings), false) AS is_dropped
FROM ingest.stale_bars WHERE time < (SELECT until_1m FROM ingest.rolled)
"""

# The upper bound tells the planner that the span is short.
LIVE = f"""
CREATE VIEW ingest.live_1m AS
SELECT symbol, {{bucket}} AS time,{FROM_TICKS}
FROM market.ticks AS t
WHERE t.time >= (SELECT until_1m FROM ingest.rolled) AND t.time < '9999-01-01 00:00:00+00' GROUP BY symbol, {{bucket}}
"""

EXACT = f"""
CREATE VIEW ingest.exact_1m AS
SELECT {COLUMNS} FROM ingest.stored_1m AS b
WHERE NOT EXISTS (SELECT FROM ingest.stale AS s WHERE s.symbol = b.symbol AND s.time = b.time)
UNION ALL
SELECT s.symbol, s.time, bar.* FROM ingest.stale AS s, LATERAL (
    SELECT{FROM_PARTS}
    FROM (
        SELECT price AS open, t.time AS first_at, received_at, occurrence, price AS close, t.time AS last_at,
               price AS high, price AS low, volume, {MONEY} AS turnover, 1 AS ticks,
               received_at AS last_received_at
        FROM market.ticks AS t
        WHERE t.symbol = s.symbol AND t.time >= s.time AND t.time < s.time + interval '1 minute'
        UNION ALL
        SELECT open, first_at, '-infinity', 0, close, last_at, high, low, volume, turnover, ticks, last_received_at
        FROM ingest.stored_1m AS b WHERE s.is_dropped AND b.symbol = s.symbol AND b.time = s.time
    ) AS parts HAVING count(*) > 0
) AS bar
UNION ALL
SELECT {COLUMNS} FROM ingest.live_1m
"""

OHLCV = """
CREATE VIEW market.ohlcv_{name} AS
SELECT symbol, time, open, high, low, close, volume, turnover, turnover / nullif(volume, 0) AS vwap, ticks
FROM ingest.exact_{name}
"""

# The last bucket is not complete: it consists of stored bars of smaller widths, and of ticks.
WIDER = f"""
CREATE VIEW ingest.exact_{{name}} AS
SELECT {COLUMNS} FROM ingest.stored_{{name}} AS b
WHERE NOT EXISTS (SELECT FROM ingest.stale AS s WHERE s.symbol = b.symbol AND s.bucket_{{name}} = b.time)
UNION ALL
SELECT s.symbol, s.time, bar.*
FROM (SELECT DISTINCT symbol, bucket_{{name}} AS time FROM ingest.stale) AS s, LATERAL (
    SELECT{FROM_BARS}
    FROM ingest.exact_1m AS b
    WHERE b.symbol = s.symbol AND b.time >= s.time AND b.time < {{end}} HAVING count(*) > 0
) AS bar
UNION ALL
SELECT symbol, bucket,{FROM_BARS}
FROM (SELECT *, {{bucket}} AS bucket FROM ({{parts}}
    SELECT {COLUMNS} FROM ingest.live_1m) AS parts) AS b
WHERE bucket >= (SELECT until_{{name}} FROM ingest.rolled)
  AND NOT EXISTS (SELECT FROM ingest.stale AS s WHERE s.symbol = b.symbol AND s.bucket_{{name}} = b.bucket)
GROUP BY symbol, bucket
"""
PART = f"""
        SELECT {COLUMNS} FROM ingest.stored_{{part}}
        WHERE time >= (SELECT until_{{wider}} FROM ingest.rolled) AND time < (SELECT until_{{part}} FROM ingest.rolled)
        UNION ALL"""

LATEST = """
CREATE VIEW market.latest AS
SELECT s.symbol, last.time, last.received_at, last.price, last.volume
FROM (SELECT symbol, max(time) AS day FROM market.ohlcv_1d GROUP BY symbol) AS s,
     LATERAL (SELECT * FROM market.ticks t WHERE t.symbol = s.symbol AND t.time >= s.day
              ORDER BY t.time DESC, t.received_at DESC, t.occurrence DESC LIMIT 1) AS last
"""

BARS_1M = """
CREATE VIEW market.bars_1m AS
SELECT symbol, time, open, high, low, close, volume, 'stream' AS source
FROM market.ohlcv_1m, (SELECT spans FROM ingest.fully_covered OFFSET 0) AS covered
WHERE tstzrange(time, time + interval '1 minute') <@ spans
UNION ALL
SELECT symbol, time, open, high, low, close, volume, 'backfill'
FROM market.bars, (SELECT spans FROM ingest.fully_covered OFFSET 0) AS covered
WHERE resolution = interval '1 minute' AND NOT tstzrange(time, time + interval '1 minute') <@ spans
"""

# Each runs with its owner's rights, so that the daemon's role needs none on the tables. None compiles its queries: that
# took two thirds of their time.
ANNOUNCE = """
CREATE FUNCTION ingest.announce_rollup(target timestamptz) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
UPDATE ingest.rollup_state SET announced_until = target WHERE announced_until < target
$$
"""
NEXT = """
CREATE FUNCTION ingest.next_rollup(span interval, lag interval) RETURNS timestamptz
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan
SET jit = off AS $$
DECLARE
    stored timestamptz;
    first timestamptz;
    target timestamptz := date_bin('1 minute', clock_timestamp() - lag, '2000-01-01 00:00:00+00');
BEGIN
    SELECT until_1m INTO stored FROM ingest.rollup_state;
    IF stored >= target THEN
        RETURN NULL;
    END IF;
    IF stored > target - span THEN
        RETURN target;
    END IF;
    IF EXISTS (SELECT FROM market.ticks t WHERE t.time >= stored AND t.time < stored + span) THEN
        RETURN stored + span;
    END IF;
    WITH RECURSIVE symbols AS (
        (SELECT symbol FROM market.ticks ORDER BY symbol LIMIT 1)
        UNION ALL
        SELECT (SELECT t.symbol FROM market.ticks t WHERE t.symbol > s.symbol ORDER BY t.symbol LIMIT 1)
        FROM symbols s WHERE s.symbol IS NOT NULL
    )
    SELECT min((SELECT t.time FROM market.ticks t WHERE t.symbol = s.symbol AND t.time >= stored
                ORDER BY t.time LIMIT 1)) INTO first FROM symbols s WHERE s.symbol IS NOT NULL;
    IF first IS NULL OR first >= target THEN
        RETURN CASE WHEN stored > '0001-01-01 00:00:00+00' THEN target END;  -- without ticks, nothing to store
    END IF;
    RETURN least(target, date_bin('1 minute', greatest(first, stored) + span, '2000-01-01 00:00:00+00'));
END
$$
"""
# For ticks that an operator has inserted or deleted: only the daemon notes its own late ticks.
MARK_STALE = """
CREATE FUNCTION ingest.mark_stale(since timestamptz, until timestamptz) RETURNS bigint
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
WITH marked AS (
    INSERT INTO ingest.stale_bars (symbol, time)
    SELECT symbol, date_bin('1 minute', t.time, '2000-01-01 00:00:00+00') AS minute
    FROM market.ticks AS t WHERE t.time >= since AND t.time < until
    UNION
    SELECT symbol, time FROM ingest.stored_1m AS b WHERE b.time >= since AND b.time < until
    ORDER BY symbol, minute
    ON CONFLICT (symbol, time) DO UPDATE SET noted_at = clock_timestamp() RETURNING 1
)
SELECT count(*) FROM marked
$$
"""
LOCK_STATE = """    IF waits THEN
        SELECT * INTO state FROM ingest.rollup_state FOR UPDATE;
    ELSE
        SELECT * INTO state FROM ingest.rollup_state FOR UPDATE SKIP LOCKED;
        IF NOT FOUND THEN
            RETURN NULL;  -- another process does the work
        END IF;
    END IF;"""
ROLL_UP = """
CREATE FUNCTION ingest.roll_up(target timestamptz, waits boolean) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan
SET jit = off AS $$
DECLARE
    state ingest.rollup_state;
    rows bigint;
    until timestamptz;
    zone text := (SELECT exchange_timezone FROM ingest.settings);
BEGIN
{lock}
    target := least(target, state.announced_until);
    IF target <= state.until_1m THEN
        RETURN 0;
    END IF;
    INSERT INTO ingest.rollup_1m ({names})
    SELECT symbol, {bucket} AS bucket,{columns}
    FROM market.ticks AS t WHERE t.time >= state.until_1m AND t.time < target
    GROUP BY symbol, bucket ORDER BY bucket, symbol;
    GET DIAGNOSTICS rows = ROW_COUNT;
    state.until_1m := target;{wider}
    UPDATE ingest.rollup_state SET until_1m = state.until_1m, until_5m = state.until_5m, until_1h = state.until_1h,
        until_1d = state.until_1d;
    RETURN rows;
END
$$
"""
ROLL_UP_WIDER = f"""
    until := {{until}};
    IF until > state.until_{{name}} THEN
        INSERT INTO ingest.rollup_{{name}} ({COLUMNS})
        SELECT symbol, {{bucket}} AS bucket,{FROM_BARS}
        FROM ingest.rollup_{{source}} AS b WHERE b.time >= state.until_{{name}} AND b.time < until
        GROUP BY symbol, bucket ORDER BY bucket, symbol;
        state.until_{{name}} := until;
    END IF;"""

# The list is read without a lock: a minute that is noted again meanwhile stays on it. Of time that retention has
# dropped, the late ticks are merged into the stored bar and dropped too, minute by minute, since a DELETE that joins
# would decompress every chunk of the columnstore. It reads the stored bars by their views, so that on TimescaleDB
# Community a repaired bar takes the place of the aggregate's.
REPAIR = f"""
CREATE FUNCTION ingest.repair_bars(most integer, waits boolean) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan
SET jit = off AS $$
DECLARE
    state ingest.rollup_state;
    until record;
    symbols text[];
    minutes timestamptz[];
    notes timestamptz[];
    stale record;
    zone text := (SELECT exchange_timezone FROM ingest.settings);
BEGIN
{LOCK_STATE}
    SELECT * INTO until FROM ingest.rolled;
    SELECT array_agg(s.symbol), array_agg(s.time), array_agg(s.noted_at) INTO symbols, minutes, notes FROM (
        SELECT * FROM ingest.stale_bars AS b WHERE b.time < until.until_1m ORDER BY b.time, b.symbol LIMIT most) AS s;
    IF symbols IS NULL THEN
        RETURN 0;
    END IF;
    FOR stale IN
        SELECT s.symbol, s.time FROM unnest(symbols, minutes) AS s (symbol, time)
        WHERE s.time < (SELECT ticks_since FROM ingest.settings)
    LOOP
        WITH dropped AS (
            DELETE FROM market.ticks AS t
            WHERE t.symbol = stale.symbol AND t.time >= stale.time AND t.time < stale.time + interval '1 minute'
            RETURNING t.symbol, stale.time AS time, t.price, t.time AS at, t.received_at, t.occurrence, t.volume
        ), parts AS (
            SELECT symbol, time, price AS open, at AS first_at, received_at, occurrence, price AS close, at AS last_at,
                   price AS high, price AS low, volume, {MONEY} AS turnover, 1 AS ticks,
                   received_at AS last_received_at
            FROM dropped
            UNION ALL
            SELECT b.symbol, b.time, open, first_at, '-infinity', 0, close, last_at, high, low, volume, turnover, ticks,
                   last_received_at
            FROM (SELECT DISTINCT symbol, time FROM dropped) AS s JOIN ingest.stored_1m AS b USING (symbol, time)
        )
        INSERT INTO ingest.rollup_1m AS r ({COLUMNS})
        SELECT symbol, time,{FROM_PARTS}
        FROM parts GROUP BY symbol, time
        ON CONFLICT (symbol, time) DO UPDATE SET {{updates}};
    END LOOP;
    WITH keys AS (
        SELECT s.symbol, s.time FROM unnest(symbols, minutes) AS s (symbol, time)
        WHERE s.time >= coalesce((SELECT ticks_since FROM ingest.settings), '0001-01-01 00:00:00+00')
    ), fresh AS (
        SELECT k.symbol, k.time, bar.* FROM keys AS k, LATERAL (
            SELECT{FROM_TICKS}
            FROM market.ticks AS t
            WHERE t.symbol = k.symbol AND t.time >= k.time AND t.time < k.time + interval '1 minute' HAVING count(*) > 0
        ) AS bar
    ){{store_1m}};{{wider}}
    DELETE FROM ingest.stale_bars AS b USING (
        SELECT b.symbol, b.time FROM ingest.stale_bars AS b
        JOIN unnest(symbols, minutes, notes) AS s (symbol, time, noted_at) USING (symbol, time, noted_at)
        FOR UPDATE OF b SKIP LOCKED
    ) AS done WHERE b.symbol = done.symbol AND b.time = done.time;
    RETURN cardinality(symbols);
END
$$
"""
REPAIR_WIDER = f"""
    WITH keys AS (
        SELECT DISTINCT s.symbol, {{bucket}} AS time FROM unnest(symbols, minutes) AS s (symbol, time)
        WHERE {{bucket}} < until.until_{{name}}
    ), fresh AS (
        SELECT k.symbol, k.time, bar.* FROM keys AS k, LATERAL (
            SELECT{FROM_BARS}
            FROM ingest.stored_{{source}} AS b
            WHERE b.symbol = k.symbol AND b.time >= k.time AND b.time < {{end}} HAVING count(*) > 0
        ) AS bar
    ){{store}};"""
# A bar whose ticks were deleted goes.
STORE = f""", gone AS (
        DELETE FROM ingest.rollup_{{name}} AS r USING keys AS k WHERE r.symbol = k.symbol AND r.time = k.time
          AND NOT EXISTS (SELECT FROM fresh AS f WHERE f.symbol = r.symbol AND f.time = r.time)
    )
    INSERT INTO ingest.rollup_{{name}} ({COLUMNS})
    SELECT * FROM fresh ON CONFLICT (symbol, time) DO UPDATE SET {{updates}}"""
# A bar of an aggregate can't be deleted: one without ticks takes its place, which no view shows.
STORE_BESIDE_AGGREGATES = f"""
    INSERT INTO ingest.rollup_{{name}} ({COLUMNS})
    SELECT * FROM fresh
    UNION ALL
    SELECT symbol, time, 0, 0, 0, 0, 0, 0, 0, time, time, '-infinity' FROM keys AS k
    WHERE NOT EXISTS (SELECT FROM fresh AS f WHERE f.symbol = k.symbol AND f.time = k.time)
    ON CONFLICT (symbol, time) DO UPDATE SET {{updates}}"""
UPDATES = ", ".join(f"{name} = excluded.{name}" for name in COLUMNS.split(", ")[2:])

# TimescaleDB Community: a tick older than an hour is noted as late, and only time older than two hours is computed. So
# no refresh hides a tick that is being written. `announced_until` is how far all widths are computed: a watermark of
# TimescaleDB would not do, since it leaps over time in which no job ran, and over a wider bar that is not complete.
ROLLED_BY_AGGREGATES = f"""
CREATE VIEW ingest.rolled AS
SELECT greatest(until_1m, announced_until) AS until_1m,
       greatest(until_5m, date_bin('5 minutes', announced_until, {ORIGIN})) AS until_5m,
       greatest(until_1h, date_bin('1 hour', announced_until, {ORIGIN})) AS until_1h,
       greatest(until_1d, {{midnight}}) AS until_1d,
       clock_timestamp() - interval '1 hour' AS noted_before
FROM ingest.rollup_state
"""
# New time in spans, then stale minutes, then old bars to the columnstore. Every refresh commits, so the progress is put
# on record at the end. A job of TimescaleDB does all of it; `ingestor maintain` calls it step by step, as job 0.
# The wider bars are forced: TimescaleDB loses track of a bar that was computed before all of its parts were there.
# Time without chunks is skipped, but only after the day that the last span ended in: its bar is not computed yet.
REFRESH = f"""
CREATE PROCEDURE ingest.refresh_bars(job_id integer, config jsonb)
LANGUAGE plpgsql AS $$
DECLARE
    zone text := (SELECT s.exchange_timezone FROM ingest.settings s);
    span interval := coalesce(CAST(config ->> 'span' AS interval), '7 days');
    target timestamptz := date_bin('1 hour', now() - interval '2 hours', {ORIGIN});
    since timestamptz;
    until timestamptz;
    latest timestamptz;
    chunk regclass;
BEGIN
    LOOP
        PERFORM set_config('jit', 'off', true);
        latest := (SELECT s.announced_until FROM ingest.rollup_state s);
        EXIT WHEN latest >= target;
        SELECT min(greatest(c.range_start, latest)) INTO since FROM timescaledb_information.chunks c
        WHERE c.hypertable_schema = 'market' AND c.hypertable_name = 'ticks' AND c.range_end > {{day}};
        EXIT WHEN since IS NULL AND latest <= '0001-01-01 00:00:00+00';  -- no ticks: a copy of old ones may follow
        since := least(coalesce(since, target), target);
        until := least(date_bin('1 hour', since + span, {ORIGIN}), target);
        latest := until;
        IF since < until THEN
            CALL refresh_continuous_aggregate('ingest.aggregate_1m', since, until);
            CALL refresh_continuous_aggregate(
                'ingest.aggregate_5m', date_bin('1 hour', since, {ORIGIN}), until, force => true);
            CALL refresh_continuous_aggregate(
                'ingest.aggregate_1h', date_bin('1 hour', since, {ORIGIN}), until, force => true);
        END IF;
        since := {{since}};
        until := {{until}};
        IF since < until THEN
            CALL refresh_continuous_aggregate('ingest.aggregate_1d', since, until, force => true);
        END IF;
        UPDATE ingest.rollup_state SET announced_until = greatest(announced_until, latest);
        COMMIT;
        IF job_id = 0 THEN
            RETURN;
        END IF;
    END LOOP;
    WHILE ingest.repair_bars(coalesce(CAST(config ->> 'repairs' AS integer), 5000), true) > 0 LOOP
        COMMIT;
        IF job_id = 0 THEN
            RETURN;
        END IF;
    END LOOP;
    FOR chunk IN
        SELECT format('%I.%I', k.schema_name, k.table_name)::regclass
        FROM timescaledb_information.continuous_aggregates a
        JOIN timescaledb_information.chunks c
            ON c.hypertable_schema = a.materialization_hypertable_schema
            AND c.hypertable_name = a.materialization_hypertable_name
        JOIN _timescaledb_catalog.chunk k ON k.schema_name = c.chunk_schema AND k.table_name = c.chunk_name
        WHERE a.view_schema = 'ingest' AND NOT c.is_compressed
          AND c.range_end < now() - CAST(config ->> 'columnstore_after' AS interval)
    LOOP
        PERFORM compress_chunk(chunk, true);
        COMMIT;
    END LOOP;
END
$$
"""
DELETE_JOB = "SELECT delete_job(job_id) FROM timescaledb_information.jobs WHERE proc_schema = 'ingest'"
# The table has the bars from before the database had aggregates, and the repaired ones.
STORED_BY_AGGREGATES = f"""
CREATE VIEW ingest.stored_{{name}} AS
SELECT {COLUMNS} FROM ingest.rollup_{{name}} WHERE ticks > 0
UNION ALL
SELECT {COLUMNS} FROM ingest.aggregate_{{name}} AS a
WHERE time >= (SELECT until_{{name}} FROM ingest.rollup_state) AND time < (SELECT until_{{name}} FROM ingest.rolled)
  AND NOT EXISTS (SELECT FROM ingest.rollup_{{name}} AS r WHERE r.symbol = a.symbol AND r.time = a.time)
"""
# WITH NO DATA, since a transaction can't fill it: `ingestor migrate` refreshes it from the oldest tick on.
AGGREGATE = """
CREATE MATERIALIZED VIEW ingest.aggregate_{name}
WITH (timescaledb.continuous, timescaledb.materialized_only = true, timescaledb.chunk_interval = '14 days') AS
SELECT symbol, time_bucket('{width}', {alias}.time{zone}) AS time,{columns}
FROM {source} AS {alias} GROUP BY symbol, time_bucket('{width}', {alias}.time{zone})
WITH NO DATA
"""
# An aggregate is computed from ticks. Of the time whose ticks were dropped, the table keeps the bars.
KEEP_DROPPED = """
DELETE FROM ingest.rollup_{name}
WHERE time >= coalesce((SELECT ticks_since FROM ingest.settings), '0001-01-01 00:00:00+00')
"""
KEEP_UNTIL = """
UPDATE ingest.rollup_state SET until_{name} = coalesce((
        SELECT CASE WHEN {bucket} = ticks_since THEN ticks_since ELSE {end} END FROM ingest.settings),
        '0001-01-01 00:00:00+00'),
    announced_until = coalesce((SELECT ticks_since FROM ingest.settings), '0001-01-01 00:00:00+00')
"""
TAKE_OVER = f"""
INSERT INTO ingest.rollup_{{name}} ({COLUMNS})
SELECT {COLUMNS.partition(", first_at")[0]}, time, time, time FROM market.ohlcv_{{name}}
WHERE time < (SELECT ticks_since FROM ingest.settings)
"""
# By the key's columns too, so that a duplicate is looked for in few rows.
COLUMNSTORE = """
ALTER TABLE market.ticks SET (timescaledb.enable_columnstore, timescaledb.segmentby = 'symbol',
                              timescaledb.orderby = 'time, received_at, price, volume, occurrence')
"""
AGGREGATE_COLUMNSTORE = """
ALTER MATERIALIZED VIEW ingest.aggregate_{name}
SET (timescaledb.enable_columnstore, timescaledb.segmentby = 'symbol', timescaledb.orderby = 'time')
"""

COMMENTS = {
    "symbol": "The exchange's symbol with its suffix.",
    "open": "First price, in the order (time, received_at, occurrence).",
    "high": "Highest price.",
    "low": "Lowest price.",
    "close": "Last price, in the order (time, received_at, occurrence).",
    "volume": "Units traded.",
    "turnover": "Money traded: the sum of price times volume.",
    "vwap": "Volume-weighted average price, turnover / volume; null if no units were traded.",
    "ticks": "Number of ticks.",
}
STORED_COMMENTS = {
    **{name: comment for name, comment in COMMENTS.items() if name != "vwap"},
    "open": "First price.",
    "close": "Last price.",
    "first_at": "Time of the first tick: a late tick is placed by it after retention.",
    "last_at": "Time of the last tick.",
    "last_received_at": "When the last of its ticks to arrive was received.",
}
VIEW_COMMENTS = {
    **COMMENTS,
    "time": "Start of the bar.",
    "first_at": "Time of the first tick.",
    "last_at": "Time of the last tick.",
    "last_received_at": "When the last of its ticks to arrive was received.",
    "bucket_5m": "Start of its five minutes.",
    "bucket_1h": "Start of its hour.",
    "bucket_1d": "Midnight of its day at the exchange.",
    "is_dropped": "Whether retention has dropped its first ticks.",
    "until_1m": "One-minute bars before this can be read from storage.",
    "until_5m": "Five-minute bars before this can be read from storage.",
    "until_1h": "One-hour bars before this can be read from storage.",
    "until_1d": "Bars of days before this can be read from storage.",
    "noted_before": "A tick before this is late: its minute is noted as stale.",
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
        "margin of 5 s), contains an unreadable message, or has lost its ticks to retention."
    ),
    "market.bars_1m.symbol": "The exchange's symbol with its suffix.",
    "market.bars_1m.time": "Start of the minute, by the exchange's clock.",
    "market.bars_1m.open": "First price.",
    "market.bars_1m.high": "Highest price.",
    "market.bars_1m.low": "Lowest price.",
    "market.bars_1m.close": "Last price.",
    "market.bars_1m.volume": "Units traded.",
    "market.bars_1m.source": "stream: from our ticks. backfill: fetched from the provider.",
    "ingest.rolled": "How far stored bars can be read, for each width; and from which age on a tick is late.",
    "ingest.stale": "Stale minutes of the time that is stored, and whether their first ticks were dropped.",
    "ingest.live_1m": "One-minute bars of the ticks whose bars are not stored yet.",
    **{f"ingest.exact_{name}": "Bars as the ticks give them: stored, repaired on the fly, or live." for name in WIDTHS},
}

GRANTS = f"""
GRANT SELECT ON market.bars_1m, ingest.rolled TO {WRITER};
GRANT SELECT, INSERT, UPDATE ON ingest.stale_bars TO {WRITER};
"""
FUNCTION_GRANTS = f"""
GRANT EXECUTE ON FUNCTION ingest.announce_rollup, ingest.next_rollup, ingest.roll_up, ingest.repair_bars TO {WRITER};
"""
FUNCTIONS = ("mark_stale", "repair_bars", "announce_rollup", "next_rollup", "roll_up")


def upgrade() -> None:
    """Replace the views (or aggregates) of 0003 by stored bars and exact views."""
    connection = op.get_bind()
    text = Path(__file__).with_suffix(".sql").read_text(encoding="utf-8")
    for statement in re.split(r";\n(?=\n|COMMENT )", text.rstrip().removesuffix(";")):
        connection.exec_driver_sql(statement)
    kind = "VIEW"
    if _has(connection, "market", "ohlcv_1m"):
        kind = "MATERIALIZED VIEW"
        for name in WIDTHS:
            connection.exec_driver_sql(TAKE_OVER.format(name=name))
    for view in ("market.bars_1m", "market.latest"):
        connection.exec_driver_sql(f"DROP VIEW {view}")
    for name in reversed(WIDTHS):
        connection.exec_driver_sql(f"DROP {kind} market.ohlcv_{name}")
    connection.exec_driver_sql("DROP INDEX market.ticks_buckets_idx")
    make_index(connection, "ticks_time_idx", "market.ticks")
    for name in WIDTHS:
        for column, comment in {**STORED_COMMENTS, "time": "Start of the bar."}.items():
            _comment(connection, "COLUMN", f"ingest.rollup_{name}.{column}", comment)
    make_relations(connection)
    if not _role_exists(connection, WRITER):
        grants = " ".join(f"{GRANTS}{FUNCTION_GRANTS}".split())
        log.warning("There is no role %s. When it is made, it needs in addition: %s", WRITER, grants)


def downgrade() -> None:
    """Restore the relations of 0003. The stored bars go, also those whose ticks were dropped."""
    connection = op.get_bind()
    drop_relations(connection)
    connection.exec_driver_sql("DROP INDEX market.ticks_time_idx")
    for table in (*(f"rollup_{name}" for name in WIDTHS), "rollup_state", "stale_bars"):
        connection.exec_driver_sql(f"DROP TABLE ingest.{table}")
    script = op.get_context().script
    assert script is not None
    earlier = script.get_revision(down_revision).module
    connection.exec_driver_sql(
        "CREATE TABLE ingest.stale_ranges (range_from timestamptz NOT NULL, range_until timestamptz NOT NULL, "
        "noted_at timestamptz NOT NULL DEFAULT clock_timestamp(), PRIMARY KEY (range_from, range_until))"
    )
    if _role_exists(connection, WRITER):
        connection.exec_driver_sql(f"GRANT SELECT, INSERT, UPDATE ON ingest.stale_ranges TO {WRITER}")
    earlier.make_index(connection, "ticks_buckets_idx", "market.ticks")
    earlier.make_relations(connection)


def make_index(connection: sa.Connection, name: str, table: str) -> None:
    """Make the index on the time of a table of ticks. Ticks are inserted in its order, so it takes kilobytes."""
    connection.exec_driver_sql(f"CREATE INDEX {name} ON {table} USING brin (time) WITH (autosummarize = on)")


def make_relations(connection: sa.Connection) -> None:
    """Make the views of bars, and what stores the bars in the edition that is found."""
    if is_community(connection):
        _make_aggregates(connection)
    else:
        connection.exec_driver_sql(ROLLED)
        for name in WIDTHS:
            connection.exec_driver_sql(STORED.format(name=name))
    _make_views(connection)
    connection.exec_driver_sql(MARK_STALE)
    connection.exec_driver_sql(_repair(STORE_BESIDE_AGGREGATES if is_community(connection) else STORE))
    connection.exec_driver_sql("REVOKE ALL ON FUNCTION ingest.repair_bars FROM PUBLIC")
    _comment_all(connection)
    grants = GRANTS
    if not is_community(connection):
        grants += FUNCTION_GRANTS
        for statement in (ANNOUNCE, NEXT, _roll_up()):
            connection.exec_driver_sql(statement.replace("%", "%%"))
        for name in FUNCTIONS[2:]:
            connection.exec_driver_sql(f"REVOKE ALL ON FUNCTION ingest.{name} FROM PUBLIC")
    if _role_exists(connection, WRITER):
        for statement in re.split(r";\s+", grants.strip().removesuffix(";")):
            connection.exec_driver_sql(statement)


def drop_relations(connection: sa.Connection) -> None:
    """Drop everything that `make_relations` makes."""
    for name in FUNCTIONS:
        connection.exec_driver_sql(f"DROP FUNCTION IF EXISTS ingest.{name}")
    for name in RELATIONS:
        connection.exec_driver_sql(f"DROP VIEW {name}")
    if has_aggregates(connection):
        connection.exec_driver_sql(DELETE_JOB)
        connection.exec_driver_sql("DROP PROCEDURE IF EXISTS ingest.refresh_bars")
        for name in ("1d", "1h", "5m", "1m"):
            connection.exec_driver_sql(f"DROP MATERIALIZED VIEW ingest.aggregate_{name}")


def is_community(connection: sa.Connection) -> bool:
    """Return whether `market.ticks` is a hypertable of an edition that has continuous aggregates."""
    licence = connection.scalar(sa.text("SELECT current_setting('timescaledb.license', true)"))
    installed = "SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb')"
    if licence != "timescale" or not connection.scalar(sa.text(installed)):
        return False
    is_hypertable = (
        "SELECT EXISTS (SELECT FROM timescaledb_information.hypertables "
        "WHERE hypertable_schema = 'market' AND hypertable_name = 'ticks')"
    )
    return bool(connection.scalar(sa.text(is_hypertable)))


def has_aggregates(connection: sa.Connection) -> bool:
    """Return whether TimescaleDB stores the bars. It does not if the edition was another one at first."""
    return _has(connection, "ingest", "aggregate_1m")


def _has(connection: sa.Connection, schema: str, name: str) -> bool:
    installed = "SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb')"
    aggregates = (
        "SELECT EXISTS (SELECT FROM timescaledb_information.continuous_aggregates "
        "WHERE view_schema = :schema AND view_name = :name)"
    )
    return bool(
        connection.scalar(sa.text(installed))
        and connection.scalar(sa.text(aggregates), {"schema": schema, "name": name})
    )


def _make_aggregates(connection: sa.Connection) -> None:
    """Make the continuous aggregates, and keep the stored bars whose ticks were dropped."""
    zone = _timezone(connection)
    for name in WIDTHS:
        connection.exec_driver_sql(KEEP_DROPPED.format(name=name))
        bucket = _bucket(name, "ticks_since", "exchange_timezone")
        end = ENDS[name].format(time=bucket, zone="exchange_timezone")
        connection.exec_driver_sql(KEEP_UNTIL.format(name=name, bucket=bucket, end=end))
    for name, width in WIDTHS.items():
        source, alias, columns = "market.ticks", "t", FROM_TICKS
        if name in SOURCES:
            source, alias, columns = f"ingest.aggregate_{SOURCES[name]}", "b", FROM_BARS
        in_zone = f", '{zone}'" if name == "1d" else ""
        connection.exec_driver_sql(
            AGGREGATE.format(name=name, width=width, source=source, alias=alias, zone=in_zone, columns=columns)
        )
    connection.exec_driver_sql(ROLLED_BY_AGGREGATES.format(midnight=_bucket("1d", "announced_until")))
    refresh = REFRESH.format(
        day=_bucket("1d", "latest", "zone"),
        since=_bucket("1d", "since", "zone"),
        until=_bucket("1d", "latest", "zone"),
    )
    connection.exec_driver_sql(refresh)
    connection.exec_driver_sql("REVOKE ALL ON PROCEDURE ingest.refresh_bars FROM PUBLIC")
    for name in WIDTHS:
        connection.exec_driver_sql(STORED_BY_AGGREGATES.format(name=name))
    enabled = (
        "SELECT compression_enabled FROM timescaledb_information.hypertables "
        "WHERE hypertable_schema = 'market' AND hypertable_name = 'ticks'"
    )
    if not connection.scalar(sa.text(enabled)):
        connection.exec_driver_sql(COLUMNSTORE)
    for name in WIDTHS:
        connection.exec_driver_sql(AGGREGATE_COLUMNSTORE.format(name=name))


def _make_views(connection: sa.Connection) -> None:
    """Make the views, which are the same in every edition."""
    connection.exec_driver_sql(STALE.format(**{f"bucket_{name}": _bucket(name, "time") for name in SOURCES}))
    connection.exec_driver_sql(LIVE.format(bucket=_bucket("1m", "t.time")))
    connection.exec_driver_sql(EXACT)
    for name, smaller in SMALLER.items():
        parts = "".join(
            PART.format(part=part, wider=wider) for wider, part in zip([name, *smaller], smaller, strict=False)
        )
        end = ENDS[name].format(time="s.time", zone=ZONE)
        connection.exec_driver_sql(WIDER.format(name=name, bucket=_bucket(name, "time"), end=end, parts=parts))
    for name in WIDTHS:
        connection.exec_driver_sql(OHLCV.format(name=name))
    connection.exec_driver_sql(LATEST)
    connection.exec_driver_sql(BARS_1M)


def _timezone(connection: sa.Connection) -> str:
    """Return the exchange's time zone for a literal: as recorded, or in a new database as `env.py` passes it."""
    found = connection.scalar(sa.text(f"SELECT {ZONE}"))
    if found is None:
        found = context.config.attributes["exchange_timezone"]
    return str(found).replace("'", "''")


def _roll_up() -> str:
    wider = "".join(
        ROLL_UP_WIDER.format(
            name=name, source=source, until=_bucket(name, "target", "zone"), bucket=_bucket(name, "b.time", "zone")
        )
        for name, source in SOURCES.items()
    )
    return ROLL_UP.format(
        lock=LOCK_STATE, names=COLUMNS, bucket=_bucket("1m", "t.time"), columns=FROM_TICKS, wider=wider
    )


def _repair(store: str) -> str:
    wider = "".join(
        REPAIR_WIDER.format(
            name=name,
            source=source,
            bucket=_bucket(name, "s.time", "zone"),
            end=ENDS[name].format(time="k.time", zone="zone"),
            store=store.format(name=name, updates=UPDATES),
        )
        for name, source in SOURCES.items()
    )
    return REPAIR.format(updates=UPDATES, store_1m=store.format(name="1m", updates=UPDATES), wider=wider)


def _bucket(name: str, time: str, zone: str = ZONE) -> str:
    return BUCKETS[name].format(time=time, zone=zone)


def _comment_all(connection: sa.Connection) -> None:
    for name, words in WORDS.items():
        view = f"market.ohlcv_{name}"
        start = {"1d": "Midnight of the exchange's day", "5m": "Start of the five minutes"}.get(
            name, f"Start of the {WIDTHS[name].split()[1]}"
        )
        about = f"{words} bars from the ticks that were received, whether all of that time was covered or not."
        _comment(connection, "VIEW", view, about)
        for column, comment in {**COMMENTS, "time": f"{start}, by the exchange's clock."}.items():
            _comment(connection, "COLUMN", f"{view}.{column}", comment)
    for relation in RELATIONS:
        if relation.startswith("ingest."):
            _comment(connection, "VIEW", relation, OTHER_COMMENTS.get(relation, "Stored bars of one width."))
            for column in _columns(connection, relation):
                _comment(connection, "COLUMN", f"{relation}.{column}", VIEW_COMMENTS[column])
    for relation, comment in OTHER_COMMENTS.items():
        _comment(connection, "VIEW" if relation.count(".") == 1 else "COLUMN", relation, comment)


def _columns(connection: sa.Connection, relation: str) -> list[str]:
    sql = "SELECT attname FROM pg_attribute WHERE attrelid = CAST(:name AS regclass) AND attnum > 0"
    return [str(name) for name in connection.scalars(sa.text(sql), {"name": relation})]


def _comment(connection: sa.Connection, kind: str, name: str, comment: str) -> None:
    escaped = comment.replace("'", "''").replace("%", "%%")
    connection.exec_driver_sql(f"COMMENT ON {kind} {name} IS '{escaped}'")


def _role_exists(connection: sa.Connection, name: str) -> bool:
    exists = sa.text("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = :name)")
    return bool(connection.scalar(exists, {"name": name}))
