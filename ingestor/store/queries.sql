-- The SQL of the daemon, in named blocks. `ingestor.store.queries` reads them by name.

-- name: schema_revision
-- What `ingestor migrate` has done to this database.
SELECT version_num FROM ingest.alembic_version

-- name: minimum_version
-- The oldest ingestor that may write to this schema; null where any may.
SELECT minimum_version FROM ingest.settings

-- name: look_around
-- $1 is put in as text: the process id that the client was given. As many rows as these facts make: 1 for a
-- pooler, which has made that number up; 2 for a server that takes no writes; 4 for a standby. On a session of our
-- own, each statement must see what was committed while it waited for a lock.
SELECT set_config('default_transaction_isolation', 'read committed', false) WHERE pg_backend_pid() = $1;
SELECT FROM generate_series(1, CASE WHEN pg_backend_pid() <> $1 THEN 1 ELSE 0 END
    + CASE WHEN pg_is_in_recovery() OR current_setting('default_transaction_read_only') = 'on' THEN 2 ELSE 0 END
    + CASE WHEN pg_is_in_recovery() THEN 4 ELSE 0 END)

-- name: set_limits
-- $1 and $2 are put in as text: milliseconds, and SESSION on a session of our own, or LOCAL behind a pooler, which gives
-- the session to another client after each transaction. All of it takes one round trip.
-- A server that acknowledges before it has written would break the promise; anything stronger is left alone.
SELECT set_config('synchronous_commit', 'on', '$2' = 'LOCAL') WHERE current_setting('synchronous_commit') = 'off';
-- A connection whose other end is gone must not hold a session's row for hours, which is what TCP would do. Within a
-- minute the server notices; and no statement waits for a lock longer than the writer waits for an answer. On a Unix socket
-- the first four mean nothing.
SET $2 tcp_keepalives_idle = 30; SET $2 tcp_keepalives_interval = 10;
SET $2 tcp_keepalives_count = 3; SET $2 tcp_user_timeout = 60000;
SET $2 idle_in_transaction_session_timeout = 60000; SET $2 lock_timeout = $1;

-- name: lock_ticks
-- Writers take turns: each holds this lock until its transaction ends, and takes it before every other lock. So two
-- writers of the same ticks or sessions wait for each other and never in a circle. See docs/decisions/0019.
SELECT pg_advisory_xact_lock(hashtext('market.ticks'))

-- name: lock_session
-- The holder of this row may write the session's next batch. Batches up to last_batch were committed before,
-- but for the rest of last_batch where last_batch_messages is not null. The last column: whether a relay needs the log.
SELECT last_batch, last_batch_messages, ticks, duplicates, rejected,
       (SELECT noted_before FROM ingest.rolled WHERE noted_before > '0001-01-01 00:00:00+00'),
       EXISTS (SELECT FROM ingest.relays WHERE seen_at > clock_timestamp() - interval '1 hour')
FROM ingest.stream_sessions WHERE id = $1 FOR UPDATE

-- name: session_positions
-- What the database has of sessions $1: the last complete batch, all messages, and the counts.
SELECT id, last_batch - (last_batch_messages IS NOT NULL)::int AS last_batch, ticks + rejected AS messages,
       ticks, duplicates, ended_at IS NOT NULL AS is_ended
FROM ingest.stream_sessions WHERE id = ANY ($1::uuid[])

-- name: take_turn
-- The active one of several `ingestor write` holds this lock with its session. A frozen process says nothing, and a dead
-- machine answers no probe: within some six seconds the server ends either's session, and with it the lock.
SET SESSION idle_session_timeout = 6000; SET SESSION idle_in_transaction_session_timeout = 6000;
SET SESSION tcp_keepalives_idle = 2; SET SESSION tcp_keepalives_interval = 1;
SET SESSION tcp_keepalives_count = 3; SET SESSION tcp_user_timeout = 5000;
SELECT FROM generate_series(1, pg_try_advisory_lock(7306354016)::int)

-- name: begin_session
INSERT INTO ingest.stream_sessions (id, instance, endpoint, connected_at, kind)
VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (id) DO NOTHING

-- name: advance_session
-- Coverage is never taken back; null proves nothing; and nothing proves what, by the database's clock, has not come yet.
-- A session that was taken for crashed but goes on writing is open again. $13: whether its own process writes, and not
-- the one that found it in the spool.
UPDATE ingest.stream_sessions SET
    authenticated_at = coalesce(authenticated_at, $2),
    covered_until = CASE WHEN $3::timestamptz IS NULL THEN covered_until
                         ELSE greatest(covered_until, least($3, clock_timestamp())) END,
    last_message_at = greatest(last_message_at, $4),
    last_tick_at = greatest(last_tick_at, $5),
    last_seen_at = CASE WHEN $13 THEN clock_timestamp() ELSE last_seen_at END,
    last_batch = $6,
    last_batch_messages = $14,
    ended_at = $7,
    end_reason = $8,
    close_code = $9,
    ticks = ticks + $10,
    duplicates = duplicates + $11,
    rejected = rejected + $12,
    cursor = coalesce($15, cursor)
WHERE id = $1

-- name: reject
INSERT INTO ingest.rejected_messages (session_id, batch, position, received_at, reason, raw, raw_bytes)
VALUES ($1, $2, $3, $4, $5, $6, $7)
ON CONFLICT (session_id, batch, position) DO NOTHING

-- name: end_crashed_sessions
-- A process that died said nothing: its successor of the same name says it, with the last sign of life. $2 are the
-- successor's own. No clock is asked whose they are: it may have been set between the two.
UPDATE ingest.stream_sessions
SET ended_at = greatest(connected_at, authenticated_at, covered_until, last_message_at), end_reason = 'crashed'
WHERE instance = $1 AND kind = 'stream' AND ended_at IS NULL AND id <> ALL ($2::uuid[])

-- name: resume_point
-- Of the newest session of a relay's address $1, whatever else is in the query of the address.
SELECT cursor, covered_until FROM ingest.stream_sessions
WHERE split_part(endpoint, '?', 1) = $1 AND endpoint LIKE '%?meta=1%' AND kind = 'stream' AND covered_until IS NOT NULL
ORDER BY connected_at DESC, id DESC LIMIT 1

-- name: gaps_to_close
-- The starts of recent gaps. A relay may have their ticks.
SELECT started_at FROM market.gaps WHERE started_at > now() - interval '7 days' AND status <> 'excluded' ORDER BY 1

-- name: ensure_partition
-- Makes the month's partition where there is none; does nothing on a hypertable.
SELECT ingest.ensure_partition($1)

-- name: make_staging
-- One for each connection, emptied by each commit.
CREATE TEMPORARY TABLE IF NOT EXISTS ticks_staged (LIKE market.ticks) ON COMMIT DELETE ROWS

-- name: make_staging_for_now
-- Behind a pooler: one for each transaction, since the next one may have another session.
CREATE TEMPORARY TABLE ticks_staged (LIKE market.ticks) ON COMMIT DROP

-- name: empty_staging
-- Between the parts of a batch in quarantine: they share a transaction.
TRUNCATE pg_temp.ticks_staged

-- name: insert_staged
-- In the order of the key, which fills the pages of its index one after the other.
INSERT INTO market.ticks (time, received_at, price, volume, occurrence, symbol)
SELECT time, received_at, price, volume, occurrence, symbol FROM pg_temp.ticks_staged
ORDER BY symbol, time, price, volume, occurrence
ON CONFLICT (symbol, time, price, volume, occurrence) DO NOTHING

-- name: lock_waits
-- $1: processes of the server that work for this process of ours; $2: the names of its connections to a pooler. Others'
-- states and times are shown to members of pg_read_all_stats only, their names and users to everybody.
WITH waiting AS (
    SELECT l.pid, coalesce(extract(epoch FROM clock_timestamp() - l.waitstart), 0)::float8 AS seconds,
           pg_blocking_pids(l.pid) AS holders,
           CASE WHEN l.locktype = 'advisory' THEN coalesce(k.name, 'an advisory lock of another program')
                WHEN l.relation IS NOT NULL THEN 'the table ' || l.relation::regclass || ' (' || l.mode || ')'
                WHEN l.locktype = 'virtualxid' THEN 'an older transaction'
                ELSE 'a row that another transaction has changed (' || l.locktype || ')' END AS lock
    FROM pg_locks l JOIN pg_stat_activity a USING (pid)
    LEFT JOIN (VALUES ('the writers'' turn', hashtext('market.ticks')::bigint),
                      ('the turn of backfills and reconciliations', hashtext('ingest.backfills')::bigint),
                      ('the turn to make a partition', hashtext('ingest.ensure_partition')::bigint),
                      ('the turn to migrate', 7306354014), ('the turn to maintain', 7306354015)) AS k (name, key)
        ON l.objsubid = 1 AND k.key = (l.classid::bigint << 32) | l.objid::bigint
    WHERE NOT l.granted AND (l.pid = ANY ($1::int[]) OR (a.application_name = ANY ($2::text[])
        AND a.datname = current_database() AND a.usename = current_user))
)
SELECT pid, lock, seconds, coalesce(holders[1], 0) AS first,
       coalesce((SELECT string_agg(format('process %s (%s, user %s%s%s)', h.pid,
                                          coalesce(nullif(b.application_name, ''), 'without a name'),
                                          coalesce(b.usename, 'unknown'), ', ' || b.state,
                                          ', transaction since ' || to_char(b.xact_start, 'YYYY-MM-DD HH24:MI:SS TZ')),
                                   ' and ' ORDER BY h.number)
                 FROM unnest(holders) WITH ORDINALITY AS h (pid, number) LEFT JOIN pg_stat_activity b ON b.pid = h.pid),
                'no session any more') AS holders
FROM waiting ORDER BY seconds DESC

-- name: note_stale
-- In order, so that two transactions that note the same minutes do not wait for each other in a circle.
INSERT INTO ingest.stale_bars (symbol, time)
SELECT * FROM unnest($1::text[], $2::timestamptz[]) AS stale (symbol, time) ORDER BY symbol, time
ON CONFLICT (symbol, time) DO UPDATE SET noted_at = clock_timestamp()

-- name: note_changes
SELECT ingest.note_changes($1::timestamptz[], $1::timestamptz[])

-- name: limit_rollup
-- $1 is put in as text: milliseconds.
SET LOCAL statement_timeout = $1; SET LOCAL lock_timeout = $1

-- name: next_rollup
SELECT ingest.next_rollup($1, $2)

-- name: announce_rollup
SELECT ingest.announce_rollup($1)

-- name: roll_up
SELECT ingest.roll_up($1, $2)

-- name: repair_bars
SELECT ingest.repair_bars($1, $2)
