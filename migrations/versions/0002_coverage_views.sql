-- The views of revision 0002. They lead from the coverage of the sessions to the gaps and the coverage of each day.
-- Each side of a subtraction is one multirange before it is subtracted: that keeps five years within milliseconds.
-- LIMIT 1 tells the planner what it can't know of a table that is never analysed: that the settings are one row.
--
-- Null covers nothing. `least` and `greatest` leave nulls out, and a range with a null bound has no end: each of them here
-- has operands that can't be null, or says why a null may be left out. A range whose bounds are in the wrong order is an
-- error, which would hide every gap: sessions, which a daemon writes, are read so that it can't occur; in the tables that
-- people write too, constraints refuse it.
-- Of the clocks only the database's, now(), is asked what has come and who is alive.

CREATE FUNCTION ingest.cause(end_reason text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE end_reason
        WHEN 'stopped' THEN 'the daemon was stopped'
        WHEN 'finished' THEN 'the daemon was stopped'
        WHEN 'closed' THEN 'the connection was closed or cut'
        WHEN 'keepalive' THEN 'the server did not answer a ping'
        WHEN 'stall' THEN 'connected, but mute in trading hours'
        WHEN 'clock_step' THEN 'the clock of the machine was set'
        WHEN 'message_too_big' THEN 'the server sent a message that was too big'
        WHEN 'protocol_error' THEN 'the server broke the protocol'
        WHEN 'buffer_full' THEN 'the buffer was full, since the database was unavailable'
        WHEN 'disk_full' THEN 'the disk of the buffer was full'
        WHEN 'spool_damaged' THEN 'the buffer on disk was damaged'
        WHEN 'commits_lost' THEN 'the database lost what it had acknowledged'
        WHEN 'frozen' THEN 'the process was frozen'
        WHEN 'authentication_timeout' THEN 'the server did not answer the token'
        WHEN 'stream_limit' THEN 'the plan''s limit of streams was reached'
        WHEN 'not_authorised' THEN 'the server refused the token'
        WHEN 'no_access' THEN 'the plan has no access to the stream'
        WHEN 'server_error' THEN 'the server answered with an error'
        WHEN 'internal_error' THEN 'ingestor failed by itself'
        WHEN 'crashed' THEN 'the process died without a word'
        ELSE end_reason
    END
$$;

COMMENT ON FUNCTION ingest.cause IS 'What an end_reason of ingest.stream_sessions means, in words.';

CREATE FUNCTION ingest.is_alive(ended_at timestamptz, last_seen_at timestamptz) RETURNS boolean
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    -- Not in the future either: a clock that was set back would let the dead live until it has caught up.
    SELECT ended_at IS NULL AND coalesce(
        last_seen_at BETWEEN now() - interval '60 seconds' AND now() + interval '60 seconds', false)
$$;

COMMENT ON FUNCTION ingest.is_alive IS 'Whether a session of ingest.stream_sessions goes on: it has not ended, and its process wrote to it within the last minute.';

CREATE VIEW ingest.trading_time AS
WITH ends AS (
    -- Widened, but never into the next session: what lies between two of them belongs to the earlier one's tail. The
    -- last one has no next, and the first none before: then `least` and `greatest` leave the null out.
    SELECT t.trading_day, t.opens_at, s.coverage_lead,
           least(t.closes_at + s.coverage_tail, lead(t.opens_at) OVER calendar) AS until
    FROM (SELECT * FROM ingest.settings LIMIT 1) AS s JOIN ingest.trading_sessions t ON t.calendar = s.calendar
    WINDOW calendar AS (ORDER BY t.opens_at, t.trading_day)
), spans AS (
    SELECT trading_day, tstzrange(
               greatest(opens_at - coverage_lead, lag(until) OVER (ORDER BY opens_at, trading_day)), until) AS span
    FROM ends
), limits AS (
    -- Before the first session there is no coverage: then `since` is null, and no row is joined.
    SELECT coalesce(coverage_since, (SELECT min(authenticated_at) FROM ingest.stream_sessions WHERE kind = 'stream'))
               AS since,
           now() - interval '30 seconds' AS until
    FROM (SELECT * FROM ingest.settings LIMIT 1) AS s
)
SELECT trading_day, span * tstzrange(since, until) AS span
FROM spans JOIN limits ON since < until AND span && tstzrange(since, until);

COMMENT ON VIEW ingest.trading_time IS 'The time in which ticks are expected, by trading day: the session with lead and tail, from the start of coverage to half a minute ago. Never overlaps.';
COMMENT ON COLUMN ingest.trading_time.trading_day IS 'The exchange''s day.';
COMMENT ON COLUMN ingest.trading_time.span IS 'From when until when.';

CREATE VIEW ingest.covered AS
WITH sessions AS (
    SELECT id, authenticated_at, least(covered_until, now()) AS proved_until,
           greatest(authenticated_at, last_tick_at) AS received_until,  -- without a tick, until it began
           coalesce(end_reason, 'crashed') AS end_reason, ingest.is_alive(ended_at, last_seen_at) AS is_alive,
           s.calendar, s.stall_timeout
    FROM ingest.stream_sessions, (SELECT * FROM ingest.settings LIMIT 1) AS s
    WHERE kind = 'stream' AND authenticated_at IS NOT NULL AND covered_until IS NOT NULL
), mute AS (
    -- No process reported it, but the stream was silent for too long while the market was open. (By the key of the calendar,
    -- within the days that its constraints allow.)
    SELECT sessions.id
    FROM sessions JOIN ingest.trading_sessions t
        ON t.calendar = sessions.calendar
       AND t.trading_day BETWEEN (received_until AT TIME ZONE 'UTC')::date - 9 AND (proved_until AT TIME ZONE 'UTC')::date + 7
       AND least(proved_until, closes_at) - stall_timeout > greatest(received_until, opens_at)
    WHERE end_reason = 'crashed' AND proved_until - stall_timeout > received_until
), checked AS (
    SELECT *, NOT is_alive AND (end_reason = 'stall' OR id IN (SELECT id FROM mute)) AS was_mute FROM sessions
), proved AS (
    SELECT *, greatest(authenticated_at, CASE WHEN was_mute THEN least(proved_until, received_until) ELSE proved_until END)
        AS until
    FROM checked
)
SELECT id, tstzrange(authenticated_at, until) AS span,
       tstzrange(authenticated_at, greatest(until, CASE WHEN is_alive THEN now() ELSE '-infinity' END)) AS expected,
       CASE WHEN NOT is_alive THEN end_reason END AS end_reason
FROM proved;

COMMENT ON VIEW ingest.covered IS 'The time that each session covers.';
COMMENT ON COLUMN ingest.covered.id IS 'The session.';
COMMENT ON COLUMN ingest.covered.span IS 'From its authentication to its last proof, and never beyond now; of one that fell mute in trading hours, to its last tick.';
COMMENT ON COLUMN ingest.covered.expected IS 'The same; of one that lives, until now: what is not proved yet is no gap yet.';
COMMENT ON COLUMN ingest.covered.end_reason IS 'Why it ended; crashed, too, where it fell silent without an end; null while it lives.';

CREATE VIEW ingest.gap_parts AS
WITH missed AS MATERIALIZED (
    -- Null where there is no trading time: then there are no parts.
    SELECT (SELECT range_agg(span) FROM ingest.trading_time)
           - coalesce((SELECT range_agg(expected) FROM ingest.covered), '{}') AS gaps
), outcomes AS MATERIALIZED (
    SELECT coalesce((SELECT range_agg(tstzrange(excluded_from, excluded_until)) FROM ingest.exclusions), '{}') AS excluded,
           coalesce(range_agg(span) FILTER (WHERE status = 'backfilled'), '{}') AS backfilled,
           coalesce(range_agg(span) FILTER (WHERE status = 'partial'), '{}') AS partial,
           coalesce(range_agg(span) FILTER (WHERE status = 'unfillable'), '{}') AS unfillable
    FROM (SELECT tstzrange(gap_from, gap_until) AS span, status FROM ingest.backfills WHERE symbol = '*') AS wholes
), parts AS (
    SELECT part.status, unnest(part.spans) AS span
    FROM missed, outcomes, LATERAL (VALUES
        ('excluded', gaps * excluded),
        ('backfilled', (gaps - excluded) * backfilled),
        ('partial', (gaps - excluded - backfilled) * partial),
        ('unfillable', (gaps - excluded - backfilled - partial) * unfillable),
        ('open', gaps - excluded - backfilled - partial - unfillable)) AS part (status, spans)
), days AS MATERIALIZED (
    -- A part may reach over midnight, where every day adjoins the next. Joined by the dates (in UTC) that both touch, not
    -- by overlap: that would be every part with every day. Of these dates the one counts on which both have begun.
    SELECT status, span, date FROM parts, LATERAL generate_series(
        date_trunc('day', lower(span) AT TIME ZONE 'UTC'), upper(span) AT TIME ZONE 'UTC', interval '1 day') AS date
), trading AS MATERIALIZED (
    -- Two days long at most, and widened by one at either end. (The planner takes a series for a thousand rows.)
    SELECT trading_day, span, date_trunc('day', lower(span) AT TIME ZONE 'UTC') + number * interval '1 day' AS date
    FROM ingest.trading_time, (VALUES (0), (1), (2), (3), (4)) AS following (number)
    WHERE date_trunc('day', lower(span) AT TIME ZONE 'UTC') + number * interval '1 day' <= upper(span) AT TIME ZONE 'UTC'
)
SELECT trading_day, days.span * trading.span AS span, status
FROM days JOIN trading USING (date)
WHERE days.span && trading.span
  AND date_trunc('day', greatest(lower(days.span), lower(trading.span)) AT TIME ZONE 'UTC') = date;

COMMENT ON VIEW ingest.gap_parts IS 'Trading time that is not covered, by trading day and status.';
COMMENT ON COLUMN ingest.gap_parts.trading_day IS 'The exchange''s day.';
COMMENT ON COLUMN ingest.gap_parts.span IS 'From when until when.';
COMMENT ON COLUMN ingest.gap_parts.status IS 'open, backfilled, partial, unfillable or excluded.';

CREATE VIEW market.gaps AS
WITH parts AS MATERIALIZED (
    SELECT row_number() OVER () AS number, trading_day, span, status FROM ingest.gap_parts
), ends AS (
    -- The last session that covered anything before each gap, by one pass over both.
    SELECT upper(expected) AS at, 0 AS kind, id, NULL::bigint AS number, ingest.cause(end_reason) AS cause
    FROM ingest.covered WHERE end_reason IS NOT NULL AND NOT isempty(expected)
    UNION ALL SELECT lower(span), 1, NULL, number, NULL FROM parts
), ended AS (
    SELECT number, cause, count(cause) OVER (ORDER BY at, kind, id, number) AS place, at, kind FROM ends
), before AS (
    SELECT number, first_value(cause) OVER (PARTITION BY place ORDER BY at, kind, number) AS cause FROM ended
), tries AS (
    -- In the same way, the last connection within each gap that was not accepted.
    SELECT connected_at AS at, 0 AS kind, id, NULL::bigint AS number,
           ingest.cause(coalesce(end_reason, 'crashed')) AS cause
    FROM ingest.stream_sessions
    WHERE kind = 'stream' AND authenticated_at IS NULL AND NOT ingest.is_alive(ended_at, last_seen_at)
    UNION ALL SELECT upper(span), 1, NULL, number, NULL FROM parts
), tried AS (
    SELECT number, cause, at, kind, count(cause) OVER (ORDER BY at, kind, id, number) AS place FROM tries
), attempts AS (
    SELECT number, first_value(cause) OVER again AS cause, first_value(at) OVER again AS at FROM tried
    WINDOW again AS (PARTITION BY place ORDER BY at, kind, number)
)
SELECT trading_day, lower(span) AS started_at, upper(span) AS ended_at, upper(span) - lower(span) AS duration,
       extract(epoch FROM upper(span) - lower(span))::double precision AS seconds,
       coalesce(before.cause, 'nothing was recording yet')
           || CASE WHEN attempts.at > lower(span) AND attempts.cause IS NOT NULL
                   THEN '; then ' || attempts.cause ELSE '' END
           || CASE WHEN status = 'excluded' THEN coalesce(
                   (SELECT '; excluded: ' || string_agg(reason, ', ' ORDER BY excluded_from, excluded_until) FROM ingest.exclusions
                    WHERE tstzrange(excluded_from, excluded_until) && span), '') ELSE '' END AS cause,
       status
FROM parts LEFT JOIN before USING (number) LEFT JOIN attempts USING (number);

COMMENT ON VIEW market.gaps IS 'Every span of trading time that is not covered, with its cause and status.';
COMMENT ON COLUMN market.gaps.trading_day IS 'The exchange''s day.';
COMMENT ON COLUMN market.gaps.started_at IS 'Start of the time without coverage.';
COMMENT ON COLUMN market.gaps.ended_at IS 'Start of coverage again, or end of the trading time; half a minute ago for a gap that goes on.';
COMMENT ON COLUMN market.gaps.duration IS 'Its length.';
COMMENT ON COLUMN market.gaps.seconds IS 'Its length in seconds, for clients that read no intervals.';
COMMENT ON COLUMN market.gaps.cause IS 'How the session before it ended, and what later tries met, in words.';
COMMENT ON COLUMN market.gaps.status IS 'open; backfilled (market.bars has every symbol''s minutes); partial (of some symbols); unfillable; excluded (the exchange did not trade).';

CREATE VIEW market.coverage AS
WITH missed AS (
    SELECT trading_day,
           sum(upper(span) - lower(span)) FILTER (WHERE status = 'excluded') AS excluded,
           sum(upper(span) - lower(span)) FILTER (WHERE status <> 'excluded') AS missed,
           sum(upper(span) - lower(span)) FILTER (WHERE status = 'backfilled') AS backfilled
    FROM ingest.gap_parts GROUP BY trading_day
), minutes AS (
    SELECT trading_day,
           extract(epoch FROM upper(span) - lower(span) - coalesce(excluded, '0')) / 60 AS trading,
           extract(epoch FROM coalesce(missed, '0')) / 60 AS missed,
           extract(epoch FROM coalesce(backfilled, '0')) / 60 AS backfilled
    FROM ingest.trading_time LEFT JOIN missed USING (trading_day)
)
-- Computed as numeric, and shown as double precision: several clients read a numeric as text, or not at all.
SELECT trading_day, round(trading, 6)::double precision AS trading_minutes,
       round(trading - missed, 6)::double precision AS covered_minutes, round(missed, 6)::double precision AS missing_minutes,
       round(backfilled, 6)::double precision AS backfilled_minutes,
       trunc(100 * (trading - missed + backfilled) / nullif(trading, 0), 2)::double precision AS percent
FROM minutes;

COMMENT ON VIEW market.coverage IS 'The coverage of each trading day, and the backfilled part of the rest.';
COMMENT ON COLUMN market.coverage.trading_day IS 'The exchange''s day.';
COMMENT ON COLUMN market.coverage.trading_minutes IS 'Minutes of trading time, with lead and tail, without what is excluded; of today, so far.';
COMMENT ON COLUMN market.coverage.covered_minutes IS 'Minutes that a session covers.';
COMMENT ON COLUMN market.coverage.missing_minutes IS 'Minutes that no session covers: trading_minutes - covered_minutes.';
COMMENT ON COLUMN market.coverage.backfilled_minutes IS 'Those of the missed minutes whose bars were fetched, for every symbol.';
COMMENT ON COLUMN market.coverage.percent IS 'Share of trading_minutes that is covered or backfilled, rounded down.';

CREATE VIEW ingest.uncertain_spans AS
-- Also those of a session that is not on record any more.
SELECT tstzrange(received_at - coverage_margin, received_at + coverage_margin + interval '1 microsecond') AS span
FROM ingest.rejected_messages AS r LEFT JOIN ingest.stream_sessions AS session ON session.id = r.session_id,
    (SELECT * FROM ingest.settings LIMIT 1) AS s
WHERE session.kind IS DISTINCT FROM 'replay';

COMMENT ON VIEW ingest.uncertain_spans IS 'When a message came that could not be stored as a tick: a minute with one in it is not wholly covered.';
COMMENT ON COLUMN ingest.uncertain_spans.span IS 'Its arrival, with the margin on both sides.';

CREATE VIEW ingest.fully_covered AS
WITH covered AS (
    SELECT unnest(range_agg(span)) AS span FROM ingest.covered
)
SELECT coalesce((
    SELECT range_agg(tstzrange(lower(span) + coverage_margin, upper(span) - coverage_margin))
    FROM covered, (SELECT * FROM ingest.settings LIMIT 1) AS s WHERE lower(span) + coverage_margin < upper(span) - coverage_margin
), '{}') - coalesce((SELECT range_agg(span) FROM ingest.uncertain_spans), '{}') AS spans;

COMMENT ON VIEW ingest.fully_covered IS 'The time, by the exchange''s clock, of which every tick was received: coverage less the margin at both ends and the uncertain spans.';
COMMENT ON COLUMN ingest.fully_covered.spans IS 'All of it, as one multirange.';
