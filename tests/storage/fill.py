"""A year of generated ticks, the same for every server: 150 symbols, few of which trade most, in 250 sessions of NZX.

The most active symbols have the names that the documented queries use.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime

import asyncpg

from tests.examples import MARKET

DAYS = 250
SYMBOLS = 150

MAX_ROWS = 20_000
"""Rows in one statement: a server in a browser's engine has little memory."""

_SESSIONS = """
SELECT trading_day, opens_at, closes_at FROM ingest.trading_sessions
WHERE calendar = 'XNZE' AND trading_day < $1 ORDER BY trading_day DESC LIMIT $2
"""

_INSTRUMENT = """
INSERT INTO market.instruments (symbol, exchange, company_name, industry, active) VALUES ($1, 'nzx', $2, $3, true)
"""

# Prices walk in cents around a level of the symbol's own; sizes are mostly round lots. The seed makes random() repeat.
_TICKS = """
WITH raw AS MATERIALIZED (
    SELECT number, random() AS which, random() AS noise, random() AS size FROM generate_series(1, $3::integer) AS number
), placed AS (
    SELECT floor(150 * power(which, 3))::integer AS symbol, noise, size,
           $1::timestamptz + ($2::timestamptz - $1::timestamptz) * ((number - 1)::double precision / $3) AS at
    FROM raw
), priced AS (
    SELECT coalesce(($4::text[])[symbol + 1], 'S' || lpad(symbol::text, 3, '0') || '.NZ') AS symbol,
           date_trunc('second', at) AS time, at + interval '40 milliseconds' AS received_at,
           round((1 + symbol % 17 + 0.1 * sin(extract(epoch FROM at) / 40000 + symbol) + 0.05 * noise)::numeric, 2)
               ::double precision AS price,
           (CASE WHEN size < 0.6 THEN 100 ELSE 1 END * (1 + floor(30 * power(noise, 2))))::bigint AS volume
    FROM placed
)
INSERT INTO market.ticks (time, received_at, price, volume, occurrence, symbol)
SELECT time, received_at, price, volume,
       row_number() OVER (PARTITION BY symbol, time, price, volume ORDER BY received_at), symbol
FROM priced ORDER BY received_at
"""


async def fill(connection: asyncpg.Connection, rows: int, last: date, report: Callable[[int], None]) -> int:
    """Insert `rows` ticks in the sessions before the day `last`; `report` gets the number of rows so far."""
    for symbol, name, industry, *_ in MARKET:
        await connection.execute(_INSTRUMENT, symbol, name, industry)
    sessions = list(reversed(await connection.fetch(_SESSIONS, last, DAYS)))
    done = 0
    for number, (day, opens_at, closes_at) in enumerate(sessions):
        for moment in (opens_at, closes_at):
            await connection.execute("SELECT ingest.ensure_partition($1)", moment.date())
        await connection.execute("SELECT setseed($1)", number / DAYS)
        wanted = rows * (number + 1) // len(sessions) - done
        done += await _session(connection, opens_at, closes_at, wanted)
        await _cover(connection, day, opens_at, closes_at)
        report(done)
    return done


async def _session(connection: asyncpg.Connection, opens_at: datetime, closes_at: datetime, wanted: int) -> int:
    """Insert the ticks of one session, in parts of whole seconds, so that equal ticks are numbered together."""
    parts = -(-wanted // MAX_ROWS)
    length = (closes_at - opens_at).total_seconds()
    edges = [round(length * part / parts) for part in range(parts + 1)]
    done = 0
    for part in range(parts):
        count = wanted * (part + 1) // parts - done
        first, last = (opens_at.timestamp() + edge for edge in edges[part : part + 2])
        await connection.execute(
            _TICKS,
            datetime.fromtimestamp(first, opens_at.tzinfo),
            datetime.fromtimestamp(last, opens_at.tzinfo),
            count,
            [symbol for symbol, *_ in MARKET],
        )
        done += count
    return done


async def _cover(connection: asyncpg.Connection, day: date, opens_at: datetime, closes_at: datetime) -> None:
    """Record a session that covers the day, from before its lead until after its tail."""
    await connection.execute(
        """
        INSERT INTO ingest.stream_sessions (id, instance, endpoint, connected_at, authenticated_at, covered_until,
                                            last_message_at, last_tick_at, ended_at, end_reason)
        SELECT md5($1::date::text)::uuid, 'storage', 'made up', since, since, until, until, until, until, 'stopped'
        FROM (SELECT $2::timestamptz - interval '2 hours' AS since, $3::timestamptz + interval '2 hours' AS until) AS s
        """,
        day,
        opens_at,
        closes_at,
    )
