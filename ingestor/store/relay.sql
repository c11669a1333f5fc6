-- The SQL of the log of commits, which the daemon writes and relays read, and of the relays themselves.

-- name: log_rows
-- In the transaction of the ticks: $4 are the packed rows. Relays wake up at its commit.
WITH logged AS (
    INSERT INTO ingest.tick_log (session_id, batch, ticks, rows) VALUES ($1, $2, $3, $4)
)
SELECT pg_notify('ingestor_ticks', '')

-- name: insert_staged_and_log
-- As insert_staged; the log gets the rows that are new, packed as COPY sends them. Returns their number.
WITH inserted AS (
    INSERT INTO market.ticks (time, received_at, price, volume, occurrence, symbol)
    SELECT time, received_at, price, volume, occurrence, symbol FROM pg_temp.ticks_staged
    ORDER BY symbol, time, price, volume, occurrence
    ON CONFLICT (symbol, time, price, volume, occurrence) DO NOTHING
    RETURNING time, received_at, price, volume, occurrence, symbol
), logged AS (
    INSERT INTO ingest.tick_log (session_id, batch, ticks, rows)
    SELECT $1, $2, count(*), string_agg(
        int2send(6::smallint)
        || int4send(8) || timestamptz_send(time) || int4send(8) || timestamptz_send(received_at)
        || int4send(8) || float8send(price) || int4send(8) || int8send(volume) || int4send(4) || int4send(occurrence)
        || int4send(octet_length(textsend(symbol))) || textsend(symbol),
        ''::bytea ORDER BY received_at, occurrence)
    FROM inserted HAVING count(*) > 0
    RETURNING 1
)
SELECT count(*), (SELECT pg_notify('ingestor_ticks', '') FROM logged) FROM inserted

-- name: log_is_followed
-- Whether writers write the log now. Asked while holding their lock, so it stays so until the transaction ends.
SELECT EXISTS (SELECT FROM ingest.relays WHERE seen_at > clock_timestamp() - interval '1 hour')

-- name: begin_log
-- Writers may have left the log out for a while: it begins again, and cursors from before are refused.
WITH old AS (DELETE FROM ingest.tick_log RETURNING id)
UPDATE ingest.tick_log_state SET identity = gen_random_uuid(),
    complete_after = greatest(complete_after, (SELECT max(id) FROM old))

-- name: register_relay
INSERT INTO ingest.relays (id, instance) VALUES ($1, $2)
ON CONFLICT (id) DO UPDATE SET seen_at = clock_timestamp()

-- name: renew_relay
-- Ten minutes before writers stop to write the log: a transaction that began with the old time has ended by then.
UPDATE ingest.relays SET seen_at = clock_timestamp(), clients = $2
WHERE id = $1 AND seen_at > clock_timestamp() - interval '50 minutes'
RETURNING id

-- name: listed_relays
-- The relays for which the log is written. A process that was replaced is left out: another of its name is newer.
SELECT instance, clients, started_at, seen_at, extract(epoch FROM clock_timestamp() - seen_at)::float8 AS silent
FROM ingest.relays AS relay
WHERE seen_at > clock_timestamp() - interval '1 hour' AND NOT EXISTS (
    SELECT FROM ingest.relays AS newer WHERE newer.instance = relay.instance AND newer.started_at > relay.seen_at
)
ORDER BY instance, started_at

-- name: forget_relays
DELETE FROM ingest.relays WHERE seen_at < clock_timestamp() - interval '1 day'

-- name: prune_log
-- From its oldest entry on, some thousands at a time.
WITH oldest AS (
    SELECT id, logged_at FROM ingest.tick_log ORDER BY id LIMIT 10000
), old AS (
    DELETE FROM ingest.tick_log
    WHERE id <= (SELECT max(id) FROM oldest WHERE logged_at < clock_timestamp() - $1::interval)
    RETURNING id
)
UPDATE ingest.tick_log_state SET complete_after = greatest(complete_after, (SELECT max(id) FROM old))
WHERE EXISTS (SELECT FROM old)

-- name: log_state
-- The identity of the log, the last id that may be gone, the id that follows the newest entry, and the age of ticks.
SELECT identity, complete_after,
       greatest(complete_after, coalesce((SELECT max(id) FROM ingest.tick_log), 0)) + 1 AS following,
       (SELECT ticks_since FROM ingest.settings)
FROM ingest.tick_log_state

-- name: log_entries
-- The state of the log beside its entries from $1 on: at most $2, and no more after $3 bytes; one row without an entry.
-- The age of an entry is in seconds, by the clock that stamped it.
SELECT state.identity, state.complete_after, next.id, next.rows,
       extract(epoch FROM clock_timestamp() - next.logged_at)::float8 AS age
FROM ingest.tick_log_state AS state LEFT JOIN (
    SELECT id, rows, logged_at, sum(octet_length(rows)) OVER (ORDER BY id) - octet_length(rows) AS before
    FROM (SELECT id, rows, logged_at FROM ingest.tick_log WHERE id >= $1 ORDER BY id LIMIT $2) AS found
) AS next ON next.before < $3
ORDER BY next.id

-- name: recorded_ticks
-- Ticks by their arrival, from $1 on and before $2, at most $3. The last line of the condition is put in as text.
SELECT time, received_at, price, volume, occurrence, symbol FROM market.ticks
WHERE received_at >= $1::timestamptz AND received_at < $2::timestamptz {more}
ORDER BY received_at, symbol COLLATE "C", time, price, volume, occurrence LIMIT $3::bigint

-- name: recorded_gaps
SELECT started_at, ended_at, cause, status FROM market.gaps
WHERE ended_at > $1 AND started_at < $2 ORDER BY started_at

-- name: stated_coverage
-- The time that sessions cover, from $1 on: what they all cover together, but not where ticks were dropped by their age.
SELECT lower(span), upper(span) FROM (
    SELECT unnest(range_agg(span) * tstzmultirange(
               tstzrange(greatest($1::timestamptz, (SELECT ticks_since FROM ingest.settings)), NULL))) AS span
    FROM ingest.covered
) AS spans ORDER BY 1

-- name: relay_token
-- The client of a token by the token's hash, unless it is expired.
SELECT name, max_streams FROM ingest.relay_tokens
WHERE hash = $1 AND (expires_at IS NULL OR expires_at > clock_timestamp())

-- name: valid_relay_tokens
SELECT hash FROM ingest.relay_tokens WHERE expires_at IS NULL OR expires_at > clock_timestamp()

-- name: add_relay_token
INSERT INTO ingest.relay_tokens (name, hash, max_streams, expires_at)
VALUES ($1, $2, $3, clock_timestamp() + $4::interval)
ON CONFLICT (name) DO NOTHING RETURNING expires_at

-- name: list_relay_tokens
SELECT name, max_streams, created_at, expires_at,
       coalesce(expires_at <= clock_timestamp(), false) AS is_expired
FROM ingest.relay_tokens ORDER BY name

-- name: revoke_relay_token
DELETE FROM ingest.relay_tokens WHERE name = $1
