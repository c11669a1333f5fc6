-- `pg_temp.evaluate` replaces the recorded set of tests/property/test_coverage_views.py by another one and returns the rows of
-- the views. Its rows are rolled back with the transaction. Instants and lengths are microseconds.

CREATE FUNCTION pg_temp.instant(micros bigint) RETURNS timestamptz LANGUAGE sql AS $$
    SELECT CASE WHEN abs(micros) >= 1e18 THEN (CASE WHEN micros > 0 THEN '' ELSE '-' END || 'infinity')::timestamptz
                ELSE timestamptz '1970-01-01 00:00+00' + micros * interval '1 microsecond' END
$$;
CREATE FUNCTION pg_temp.length(micros jsonb) RETURNS interval LANGUAGE sql AS $$
    SELECT micros::bigint * interval '1 microsecond'
$$;
CREATE FUNCTION pg_temp.micros(at timestamptz) RETURNS bigint LANGUAGE sql AS $$
    SELECT (extract(epoch FROM at) * 1000000)::bigint
$$;
CREATE FUNCTION pg_temp.evaluate(world jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    answer jsonb;
BEGIN
    DELETE FROM ingest.trading_sessions;
    DELETE FROM ingest.stream_sessions;
    DELETE FROM ingest.exclusions;
    DELETE FROM ingest.backfills;
    DELETE FROM ingest.rejected_messages;
    DELETE FROM market.ticks;
    DELETE FROM market.bars;
    UPDATE ingest.settings SET coverage_since = pg_temp.instant((world ->> 'since')::bigint),
        coverage_lead = pg_temp.length(world -> 'lead'), coverage_tail = pg_temp.length(world -> 'tail'),
        coverage_margin = pg_temp.length(world -> 'margin'), stall_timeout = pg_temp.length(world -> 'stall');
    INSERT INTO ingest.trading_sessions SELECT 'XNZE', (row ->> 0)::date, pg_temp.instant((row ->> 1)::bigint),
        pg_temp.instant((row ->> 2)::bigint) FROM jsonb_array_elements(world -> 'calendar') AS row;
    INSERT INTO ingest.stream_sessions (id, instance, endpoint, kind, connected_at, authenticated_at, covered_until,
        last_tick_at, last_seen_at, ended_at, end_reason)
        SELECT (row ->> 0)::uuid, 'one', 'ws://x', row ->> 1, pg_temp.instant((row ->> 2)::bigint),
            pg_temp.instant((row ->> 3)::bigint), pg_temp.instant((row ->> 4)::bigint),
            pg_temp.instant((row ->> 5)::bigint), pg_temp.instant((row ->> 6)::bigint),
            pg_temp.instant((row ->> 7)::bigint), row ->> 8 FROM jsonb_array_elements(world -> 'sessions') AS row;
    INSERT INTO ingest.exclusions SELECT pg_temp.instant((row ->> 0)::bigint), pg_temp.instant((row ->> 1)::bigint), row ->> 2
        FROM jsonb_array_elements(world -> 'exclusions') AS row;
    INSERT INTO ingest.backfills (gap_from, gap_until, symbol, status)
        SELECT pg_temp.instant((row ->> 0)::bigint), pg_temp.instant((row ->> 1)::bigint), row ->> 2, row ->> 3
        FROM jsonb_array_elements(world -> 'backfills') AS row;
    INSERT INTO ingest.rejected_messages
        SELECT (row ->> 0)::uuid, number, 1, pg_temp.instant((row ->> 1)::bigint), 'not_json', '', 0
        FROM jsonb_array_elements(world -> 'rejections') WITH ORDINALITY AS each (row, number);
    PERFORM ingest.ensure_partition((pg_temp.instant(minute::bigint) AT TIME ZONE 'UTC')::date)
        FROM jsonb_array_elements_text(world -> 'probes') AS minute;
    INSERT INTO market.ticks (time, received_at, price, volume, occurrence, symbol)
        SELECT pg_temp.instant(minute::bigint) + interval '7 s', now(), 1.5, 10, 1, 'A.NZ'
        FROM jsonb_array_elements_text(world -> 'probes') AS minute;
    INSERT INTO market.bars (symbol, time, resolution, open, high, low, close, volume, source)
        SELECT 'A.NZ', pg_temp.instant(minute::bigint), '1 minute', 9, 9, 9, 9, 9, 'financefeast'
        FROM jsonb_array_elements_text(world -> 'probes') AS minute;
    SELECT jsonb_build_object(
        'gaps', (SELECT jsonb_agg(jsonb_build_array(pg_temp.micros(started_at), pg_temp.micros(ended_at), trading_day,
                                                    cause, status)) FROM market.gaps),
        'days', (SELECT jsonb_agg(jsonb_build_array(trading_day, trading_minutes, covered_minutes, missing_minutes,
                                                    backfilled_minutes, percent)) FROM market.coverage),
        'conditions', (SELECT jsonb_agg(jsonb_build_array(trading_day, condition, ticks, rejected, percent,
                                                          backfilled_minutes)) FROM market.condition),
        'bars', (SELECT jsonb_agg(jsonb_build_array(pg_temp.micros(time), source)) FROM market.bars_1m)) INTO answer;
    RETURN answer;
END
$$;
