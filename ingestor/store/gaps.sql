-- The SQL of gaps, backfill and reconciliation, in named blocks. `ingestor.store.queries` reads them by name.

-- name: gap_settings
-- What of the settings the backfill goes by.
SELECT exchange_timezone, coverage_margin, bar_label, ticks_since FROM ingest.settings

-- name: database_now
SELECT clock_timestamp()

-- name: report_made_at
SELECT now()

-- name: lock_gaps
-- Backfills and reconciliations take turns: each holds this lock until its transaction ends, and takes it before every
-- other lock. So they never wait in a circle, and of two that settle the last two symbols of a gap one sees the other.
SELECT pg_advisory_xact_lock(hashtext('ingest.backfills'))

-- name: report_days
-- $1 and $2: trading days, from the first up to but not including the second; null: no bound. $3, $4: the same as instants.
SELECT c.trading_day, lower(t.span) AS started_at, upper(t.span) AS ended_at, c.trading_minutes::float8,
       c.covered_minutes::float8, c.missing_minutes::float8, c.backfilled_minutes::float8, c.percent::float8
FROM market.coverage c JOIN ingest.trading_time t USING (trading_day)
WHERE ($1::date IS NULL OR trading_day >= $1) AND ($2::date IS NULL OR trading_day < $2)
  AND t.span && tstzrange($3, $4)
ORDER BY trading_day

-- name: report_gaps
SELECT trading_day, started_at, ended_at, cause, status FROM market.gaps
WHERE ($1::date IS NULL OR trading_day >= $1) AND ($2::date IS NULL OR trading_day < $2)
  AND tstzrange(started_at, ended_at) && tstzrange($3, $4)
ORDER BY started_at

-- name: open_gaps
SELECT count(*), min(started_at) FROM market.gaps WHERE status = 'open'

-- name: exclude
INSERT INTO ingest.exclusions (excluded_from, excluded_until, reason) VALUES ($1, $2, $3)
ON CONFLICT (excluded_from, excluded_until) DO UPDATE SET reason = excluded.reason, noted_at = now()

-- name: upsert_instrument
INSERT INTO market.instruments (symbol, exchange, company_name, industry, uuid, active)
VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (symbol) DO UPDATE SET exchange = excluded.exchange, company_name = excluded.company_name,
    industry = excluded.industry, uuid = excluded.uuid, active = excluded.active
WHERE (instruments.exchange, instruments.company_name, instruments.industry, instruments.uuid, instruments.active)
    IS DISTINCT FROM (excluded.exchange, excluded.company_name, excluded.industry, excluded.uuid, excluded.active)

-- name: count_unlisted
SELECT count(*) FROM market.instruments WHERE exchange = $1 AND active AND symbol <> ALL ($2::text[])

-- name: retire_instruments
-- What the provider no longer lists.
UPDATE market.instruments SET active = false WHERE exchange = $1 AND active AND symbol <> ALL ($2::text[])

-- name: note_seen_instruments
-- First and last tick of every symbol, by steps through the key instead of through the ticks.
WITH RECURSIVE symbols AS (
    (SELECT symbol FROM market.ticks ORDER BY symbol LIMIT 1)
    UNION ALL
    SELECT (SELECT t.symbol FROM market.ticks t WHERE t.symbol > s.symbol ORDER BY t.symbol LIMIT 1)
    FROM symbols s WHERE s.symbol IS NOT NULL
)
INSERT INTO market.instruments (symbol, exchange, first_seen, last_seen)
SELECT symbol, $1, (SELECT t.time FROM market.ticks t WHERE t.symbol = s.symbol ORDER BY t.time LIMIT 1),
       (SELECT t.time FROM market.ticks t WHERE t.symbol = s.symbol ORDER BY t.time DESC LIMIT 1)
FROM symbols s WHERE symbol IS NOT NULL
ON CONFLICT (symbol) DO UPDATE SET first_seen = least(instruments.first_seen, excluded.first_seen),
    last_seen = greatest(instruments.last_seen, excluded.last_seen)  -- retention may have dropped the first of them
WHERE (instruments.first_seen, instruments.last_seen) IS DISTINCT FROM (
    least(instruments.first_seen, excluded.first_seen), greatest(instruments.last_seen, excluded.last_seen))

-- name: active_symbols
-- Symbols that may have traded since $1: listed, unknown, or received in the month before or later.
SELECT symbol FROM market.instruments
WHERE coalesce(active, true) OR last_seen >= $1::timestamptz - interval '30 days' ORDER BY symbol

-- name: unknown_symbols
SELECT symbol FROM unnest($1::text[]) AS symbol WHERE symbol NOT IN (SELECT symbol FROM market.instruments) ORDER BY symbol

-- name: fillable
-- The trading time that is not fully covered (gaps with their margin, the edges of coverage, uncertain spans),
-- not excluded, and neither settled nor begun: by trading day, within the bounds.
WITH open_time AS MATERIALIZED (
    SELECT unnest((SELECT range_agg(span) FROM ingest.trading_time) - (SELECT spans FROM ingest.fully_covered)
                  - coalesce((SELECT range_agg(tstzrange(excluded_from, excluded_until)) FROM ingest.exclusions), '{}')
                  - coalesce((SELECT range_agg(tstzrange(gap_from, gap_until)) FROM ingest.backfills
                              WHERE symbol = '*'), '{}')) AS span
), days AS MATERIALIZED (
    SELECT span, date FROM open_time, LATERAL generate_series(
        date_trunc('day', lower(span) AT TIME ZONE 'UTC'), upper(span) AT TIME ZONE 'UTC', interval '1 day') AS date
), trading AS MATERIALIZED (
    SELECT trading_day, span, date_trunc('day', lower(span) AT TIME ZONE 'UTC') + number * interval '1 day' AS date
    FROM ingest.trading_time, (VALUES (0), (1), (2), (3), (4)) AS following (number)
    WHERE date_trunc('day', lower(span) AT TIME ZONE 'UTC') + number * interval '1 day' <= upper(span) AT TIME ZONE 'UTC'
), parts AS (  -- as in ingest.gap_parts
    SELECT trading_day, days.span * trading.span AS span
    FROM days JOIN trading USING (date)
    WHERE days.span && trading.span
      AND date_trunc('day', greatest(lower(days.span), lower(trading.span)) AT TIME ZONE 'UTC') = date
)
SELECT trading_day, lower(span) AS gap_from, upper(span) AS gap_until FROM parts
WHERE ($1::date IS NULL OR trading_day >= $1) AND ($2::date IS NULL OR trading_day < $2)
  AND span && tstzrange($3, $4)
ORDER BY span

-- name: forget_needless
-- Backfills whose time is covered after all: a spool was written meanwhile. Without any trading time on record `spans` is
-- null, and nothing is deleted.
WITH needed AS MATERIALIZED (
    SELECT (SELECT range_agg(span) FROM ingest.trading_time) - (SELECT spans FROM ingest.fully_covered) AS spans
), needless AS (
    SELECT gap_from, gap_until FROM ingest.backfills, needed
    WHERE symbol = '*' AND status = 'pending' AND NOT tstzrange(gap_from, gap_until) && spans
)
DELETE FROM ingest.backfills b USING needless n WHERE b.gap_from = n.gap_from AND b.gap_until = n.gap_until

-- name: begin_backfill
INSERT INTO ingest.backfills (gap_from, gap_until, symbol, status)
SELECT $1, $2, symbol, 'pending' FROM unnest($3::text[] || '*'::text) AS symbol
ON CONFLICT (gap_from, gap_until, symbol) DO NOTHING

-- name: give_up_backfill
-- What the provider does not keep any more is not asked for.
INSERT INTO ingest.backfills (gap_from, gap_until, symbol, status, error, finished_at)
VALUES ($1, $2, '*', 'unfillable', $3, now()) ON CONFLICT (gap_from, gap_until, symbol) DO NOTHING

-- name: pending_backfills
SELECT gap_from, gap_until, symbol, attempts, coalesce(active, false) AS is_listed
FROM ingest.backfills LEFT JOIN market.instruments USING (symbol)
WHERE status = 'pending' AND symbol <> '*' AND tstzrange(gap_from, gap_until) && tstzrange($1, $2)
  AND (NOT $3 OR coalesce(next_attempt_at <= now(), true))
ORDER BY symbol, gap_from, gap_until

-- name: given_up_backfills
SELECT DISTINCT gap_from, gap_until FROM ingest.backfills
WHERE status IN ('partial', 'unfillable') AND symbol <> '*' AND tstzrange(gap_from, gap_until) && tstzrange($1, $2)
  AND gap_from > now() - interval '364 days'
ORDER BY gap_from, gap_until

-- name: ask_again
UPDATE ingest.backfills SET status = 'pending', attempts = 0, finished_at = NULL, next_attempt_at = NULL
WHERE gap_from = $1 AND gap_until = $2 AND (symbol = '*' OR status IN ('partial', 'unfillable'))

-- name: upsert_bar
INSERT INTO market.bars (symbol, time, resolution, open, high, low, close, volume, source)
VALUES ($1, $2, interval '1 minute', $3, $4, $5, $6, $7, 'financefeast')
ON CONFLICT (symbol, resolution, time) DO UPDATE SET open = excluded.open, high = excluded.high, low = excluded.low,
    close = excluded.close, volume = excluded.volume, source = excluded.source, fetched_at = now()

-- name: settle_backfill
UPDATE ingest.backfills SET status = $4, bars = $5, error = $6, attempts = attempts + 1,
    finished_at = CASE WHEN $4 = 'pending' THEN NULL ELSE now() END,
    next_attempt_at = CASE WHEN $4 = 'pending'
        THEN now() + least(power(4, least(attempts, 6)) * interval '1 minute', interval '1 day') END
WHERE gap_from = $1 AND gap_until = $2 AND symbol = $3 AND status = 'pending'

-- name: settle_whole_backfill
-- Once every symbol is settled, so is the gap.
UPDATE ingest.backfills w SET bars = s.bars, attempts = s.attempts, finished_at = now(),
    status = CASE WHEN s.every THEN 'unfillable' WHEN s.some THEN 'partial' ELSE 'backfilled' END
FROM (SELECT coalesce(sum(bars), 0)::integer AS bars, coalesce(max(attempts), 0) AS attempts,
             bool_or(status = 'pending') AS pending, bool_and(status = 'unfillable') AS every,
             bool_or(status IN ('partial', 'unfillable')) AS some
      FROM ingest.backfills WHERE gap_from = $1 AND gap_until = $2 AND symbol <> '*') AS s
WHERE w.gap_from = $1 AND w.gap_until = $2 AND w.symbol = '*' AND NOT s.pending

-- name: trading_day_span
SELECT lower(span) AS started_at, upper(span) AS ended_at FROM ingest.trading_time WHERE trading_day = $1

-- name: whole_minutes
-- The minutes between $1 and $2 that were wholly covered.
SELECT minute FROM generate_series(date_bin('1 minute', $1, '2000-01-01 00:00:00+00'), $2, interval '1 minute') AS minute,
    (SELECT spans FROM ingest.fully_covered OFFSET 0) AS whole
WHERE tstzrange(minute, minute + interval '1 minute') <@ spans

-- name: own_bars
-- Our bars of the minutes between $1 and $2, of one symbol.
SELECT date_bin('1 minute', time, '2000-01-01 00:00:00+00') AS time,
       market.open_price(price, time, received_at, occurrence) AS open, max(price) AS high, min(price) AS low,
       market.close_price(price, time, received_at, occurrence) AS close, sum(volume)::bigint AS volume
FROM market.ticks WHERE symbol = $3 AND time >= $1 AND time < $2
GROUP BY 1

-- name: bars
-- The one series of bars of a symbol, from $2 up to but not including $3.
SELECT time, open, high, low, close, volume, source = 'backfill' FROM market.bars_1m
WHERE symbol = $1 AND time >= $2 AND time < $3 ORDER BY time

-- name: last_trade
-- When a symbol was last traded before $3, whether its minute is a bar or not; from the keys alone.
SELECT greatest(
    (SELECT time FROM market.ticks WHERE symbol = $1 AND time >= $2 AND time < $3 ORDER BY time DESC LIMIT 1),
    (SELECT time FROM market.bars WHERE symbol = $1 AND resolution = interval '1 minute' AND time >= $2 AND time < $3
     ORDER BY time DESC LIMIT 1))

-- name: last_bar
SELECT max(time) FROM market.bars_1m WHERE symbol = $1 AND time >= $2 AND time < $3

-- name: listed_symbols
SELECT symbol FROM market.instruments ORDER BY symbol

-- name: forget_reconciliations
DELETE FROM ingest.reconciliations WHERE trading_day = $1 AND symbol = ANY ($2::text[])

-- name: note_difference
INSERT INTO ingest.reconciliations (trading_day, symbol, time, difference, our_open, our_high, our_low, our_close,
    our_volume, their_open, their_high, their_low, their_close, their_volume)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)

-- name: set_bar_label
UPDATE ingest.settings SET bar_label = $1

-- name: current_label
-- Held until the commit, so that no other process changes it in between.
SELECT bar_label FROM ingest.settings FOR SHARE

-- name: shift_bars
-- They were taken by the other label. Bars that the provider no longer keeps can't be fetched again, so all are moved.
-- In an order, since to sort them all must be deleted before the first is inserted: each may take the next one's place.
WITH moved AS (DELETE FROM market.bars WHERE source = 'financefeast' AND resolution = interval '1 minute' RETURNING *)
INSERT INTO market.bars (symbol, time, resolution, open, high, low, close, volume, source, fetched_at)
SELECT symbol, time + $1::interval, resolution, open, high, low, close, volume, source, fetched_at FROM moved
ORDER BY symbol, time

-- name: forget_backfills
-- So that the minutes at the edges are fetched as well, while the source keeps them.
DELETE FROM ingest.backfills WHERE gap_from > now() - interval '364 days'
