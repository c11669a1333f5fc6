"""The SQL of gaps and coverage is right for sessions that are recorded by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from itertools import product
from typing import Any

import asyncpg
import pytest

from ingestor.model import EndReason
from ingestor.store.connect import connect
from tests.servers import query
from tests.sessions import BEGINS, ENDS, MINUTE, at, execute, record_session

GAPS = "SELECT started_at, ended_at, cause, status FROM market.gaps ORDER BY started_at"
DAYS = (
    "SELECT trading_day, trading_minutes::float, covered_minutes::float, missing_minutes::float, "
    "backfilled_minutes::float, percent::float FROM market.coverage ORDER BY trading_day"
)
FRIDAY = date(2026, 11, 20)


async def gaps(url: str, until: datetime = ENDS) -> list[tuple[Any, ...]]:
    """Return the gaps of that Friday alone: the days up to today are gaps, too."""
    return [row for row in await query(url, GAPS) if row[0] < until]


async def friday(url: str) -> tuple[float, ...]:
    (row,) = [row for row in await query(url, DAYS) if row[0] == FRIDAY]
    return row[1:]


async def test_no_session(database: str) -> None:
    """Without a session there are neither gaps nor trading time."""
    assert await query(database, GAPS) == []
    assert await query(database, DAYS) == []


async def test_a_fully_covered_day(database: str) -> None:
    """A session around the trading time, across midnight in both time zones, leaves no gap."""
    await record_session(database, BEGINS - timedelta(hours=3), ENDS + timedelta(hours=20))
    assert await gaps(database) == []
    assert await friday(database) == (495, 495, 0, 0, 100)


async def test_a_cut_is_a_gap_with_its_cause(database: str) -> None:
    """The time between two sessions is a gap with the end reason of the first."""
    await record_session(database, BEGINS, at(100), "closed")
    await record_session(database, at(103), at(200), "keepalive")
    await record_session(database, at(201.5), ENDS, "stopped")
    assert await gaps(database) == [
        (at(100), at(103), "the connection was closed or cut", "open"),
        (at(200), at(201.5), "the server did not answer a ping", "open"),
    ]
    assert await friday(database) == (495, 490.5, 4.5, 0, 99.09)


async def test_overlapping_instances(database: str) -> None:
    """Time that one of two instances covers is covered; a common gap has the cause of the later session."""
    await record_session(database, BEGINS, at(100), "closed", instance="one")
    await record_session(database, at(50), at(110), "frozen", instance="two")
    await record_session(database, at(120), ENDS, instance="one")
    await record_session(database, at(300), at(310), instance="two")
    assert await gaps(database) == [(at(110), at(120), "the process was frozen", "open")]


async def test_no_gap_outside_of_trading_time(database: str) -> None:
    """Nights and the weekend are no gaps."""
    await record_session(database, BEGINS - timedelta(days=1), ENDS - timedelta(days=1), "stopped")
    await record_session(database, BEGINS, ENDS, "stopped")
    assert await gaps(database) == []


async def test_a_late_start(database: str) -> None:
    """If the daemon starts late, the gap begins with the trading time."""
    await record_session(database, BEGINS - timedelta(days=1), ENDS - timedelta(days=1), "stopped")
    await record_session(database, at(45), ENDS)
    assert await gaps(database) == [(BEGINS, at(45), "the daemon was stopped", "open")]


async def test_coverage_begins_with_the_first_session(database: str) -> None:
    """Coverage begins with the first session, unless a setting puts its beginning earlier."""
    await record_session(database, at(60), ENDS)
    assert await gaps(database) == []
    await execute(database, "UPDATE ingest.settings SET coverage_since = $1", BEGINS + 10 * MINUTE)
    assert await gaps(database) == [(at(10), at(60), "nothing was recording yet", "open")]


async def test_a_killed_process(database: str) -> None:
    """A dead session without an end covers until its last proof."""
    await record_session(database, BEGINS, at(200), None)
    await record_session(database, at(210), ENDS)
    assert await gaps(database) == [(at(200), at(210), "the process died without a word", "open")]


async def test_a_spool_that_is_written_later(database: str) -> None:
    """A gap closes when a late spool covers it."""
    first = await record_session(database, BEGINS, at(200), None)
    await record_session(database, at(210), ENDS)
    assert len(await gaps(database)) == 1
    proof = "UPDATE ingest.stream_sessions SET covered_until = $2, last_tick_at = $2 WHERE id = $1"
    await execute(database, proof, first, at(210))
    assert await gaps(database) == []


async def test_a_stall_covers_until_the_last_tick(database: str) -> None:
    """After a stall, coverage ends with the last tick: pongs and other messages do not count."""
    await record_session(database, BEGINS, at(200), "stall", last=at(194))
    await record_session(database, at(201), ENDS)
    assert await gaps(database) == [(at(194), at(201), "connected, but mute in trading hours", "open")]


@pytest.mark.parametrize("reason", ["stall", "crashed", None])
async def test_other_messages_cover_nothing(database: str, reason: str | None) -> None:
    """A session without a readable message covers nothing, however long its pings were answered."""
    session = await record_session(database, at(100), at(200), reason)
    await execute(database, "UPDATE ingest.stream_sessions SET last_tick_at = NULL WHERE id = $1", session)
    await record_session(database, BEGINS, at(100))
    await record_session(database, at(200), ENDS)
    assert [gap[:2] for gap in await gaps(database)] == [(at(100), at(200))]


@pytest.mark.parametrize(("reason", "missed"), [(None, 16), ("crashed", 16), ("closed", 10)])
async def test_a_crash_during_a_stall(database: str, reason: str | None, missed: float) -> None:
    """If a process died before it could report a stall, the view finds the stall."""
    await record_session(database, BEGINS, at(200), reason, last=at(194))
    await record_session(database, at(210), ENDS)
    assert (await friday(database))[:3] == (495, 495 - missed, missed)


async def test_silence_before_the_opening_is_no_stall(database: str) -> None:
    """Silence in the lead is no stall: only open hours count."""
    await record_session(database, BEGINS, at(62), "crashed", last=BEGINS + MINUTE)
    await record_session(database, at(65), ENDS)
    assert await gaps(database) == [(at(62), at(65), "the process died without a word", "open")]


async def test_a_live_session(database: str) -> None:
    """Unproved time of a live session is no gap; a minute after the last write of its process, it is."""
    now = datetime.now(UTC)
    proved = now - timedelta(seconds=70)
    await execute(database, "UPDATE ingest.settings SET calendar = 'always'")
    session = await record_session(database, now - timedelta(hours=1), proved, None, seen=now - timedelta(seconds=20))
    assert await query(database, GAPS) == []
    assert [row[5] for row in await query(database, DAYS)][-1] == 100
    see = "UPDATE ingest.stream_sessions SET last_seen_at = $2 WHERE id = $1"
    for seen in (now - timedelta(seconds=61), None, now + timedelta(minutes=10)):  # its clock was set back
        await execute(database, see, session, seen)
        ((start, end, cause, status),) = await query(database, GAPS)
        assert (start, cause, status) == (proved, "the process died without a word", "open")
        assert timedelta(seconds=35) < end - start < timedelta(seconds=60)


async def test_a_live_session_with_a_clock_behind(database: str) -> None:
    """Only the database's clock decides whether a session is alive; the time of its last proof does not matter."""
    now = datetime.now(UTC)
    await execute(database, "UPDATE ingest.settings SET calendar = 'always'")
    await record_session(database, now - timedelta(hours=1), now - timedelta(minutes=30), None, seen=now)
    assert await query(database, GAPS) == []


async def test_the_future_is_not_covered(database: str) -> None:
    """A session with a clock ahead covers until now at most, covers nothing before its begin, and causes no error."""
    now = datetime.now(UTC)
    await execute(database, "UPDATE ingest.settings SET calendar = 'always', coverage_since = $1", now - 10 * MINUTE)
    await record_session(database, now - 5 * MINUTE, now + 5 * MINUTE, "closed")
    await record_session(database, now + 3 * MINUTE, now + 5 * MINUTE, None, seen=now)
    spans = "SELECT upper(span), upper(span) <= now(), upper(expected) <= now() FROM ingest.covered ORDER BY span"
    empty, covered = await query(database, spans)
    assert empty == (None, None, None)
    assert covered[1:] == (True, True)
    assert [row[:2] for row in await query(database, GAPS)] == [(now - 10 * MINUTE, now - 5 * MINUTE)]


async def test_null_covers_nothing(database: str) -> None:
    """A session that lost committed messages covers nothing, whether it ended or is alive."""
    await record_session(database, BEGINS, at(100))
    session = await record_session(database, at(100), at(200), None, seen=datetime.now(UTC))
    await record_session(database, at(200), ENDS)
    await execute(database, TICK, at(150), 1.5, "A.NZ")
    for reason in [None, *EndReason]:
        await execute(
            database,
            "UPDATE ingest.stream_sessions SET covered_until = NULL, end_reason = $2, ended_at = $3 WHERE id = $1",
            session, reason, at(200) if reason else None,
        )  # fmt: skip
        assert [row[:2] for row in await gaps(database)] == [(at(100), at(200))]
        assert await query(database, SERIES) == []


async def test_odd_sessions_do_not_break_the_views(database: str) -> None:
    """The views answer for any row of a session, also with infinite times or times out of order."""
    await record_session(database, BEGINS, at(100))
    session = await record_session(database, at(110), at(120), "crashed", last=at(111))
    instants = ["NULL", "'infinity'", "'-infinity'", f"'{at(1)}'"]
    columns = ["authenticated_at", "covered_until", "last_message_at", "last_tick_at", "last_seen_at", "ended_at"]
    connection = await connect(database)
    for column, value in [("end_reason", "NULL"), ("end_reason", "''"), *product(columns, instants)]:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(f"UPDATE ingest.stream_sessions SET {column} = {value} WHERE id = $1", session)
        for view in ("market.gaps", "market.coverage", "ingest.fully_covered"):
            assert await connection.fetch(f"SELECT * FROM {view}"), (column, value)
        await transaction.rollback()
    await connection.close()


async def test_invalid_rows_of_operators_are_refused(database: str) -> None:
    """Ranges that are endless or out of order are refused, since they would break the views."""
    backfill = "INSERT INTO ingest.backfills (gap_from, gap_until, symbol, status) VALUES ($1, $2, '*', 'backfilled')"
    for statement, *arguments in (
        ("UPDATE ingest.settings SET coverage_lead = '-1 s'",),
        ("UPDATE ingest.settings SET coverage_tail = '25 hours'",),
        ("UPDATE ingest.settings SET coverage_margin = '-1 s'",),
        ("UPDATE ingest.settings SET stall_timeout = '-1 s'",),
        ("UPDATE ingest.settings SET coverage_since = 'infinity'",),
        ("UPDATE ingest.trading_sessions SET closes_at = opens_at + interval '3 days'",),
        ("UPDATE ingest.trading_sessions SET closes_at = 'infinity'",),
        ("UPDATE ingest.trading_sessions SET opens_at = '-infinity'",),
        ("UPDATE ingest.trading_sessions SET trading_day = trading_day - 9000",),
        ("INSERT INTO ingest.exclusions VALUES ($1, $2, 'halt')", at(2), at(1)),
        (backfill, at(2), at(1)),
    ):
        with pytest.raises(asyncpg.CheckViolationError):
            await execute(database, statement, *arguments)


async def test_refused_connections_are_part_of_the_cause(database: str) -> None:
    """The cause of a gap includes the failures of later attempts."""
    await record_session(database, BEGINS, at(100), "closed")
    await record_session(database, at(101), at(101), "stream_limit", accepted=False)
    await record_session(database, at(105), at(105), "not_authorised", accepted=False)
    await record_session(database, at(110), at(300), "closed")
    await record_session(database, at(301), ENDS)
    assert [row[2] for row in await gaps(database)] == [
        "the connection was closed or cut; then the server refused the token",
        "the connection was closed or cut",
    ]


async def test_a_replay_covers_nothing(database: str) -> None:
    """A replayed file covers nothing."""
    await record_session(database, BEGINS, at(100))
    await record_session(database, at(100), at(200), kind="replay")
    await record_session(database, at(200), ENDS)
    assert [row[:2] for row in await gaps(database)] == [(at(100), at(200))]


async def test_an_exclusion(database: str) -> None:
    """A recorded halt is excluded from gaps and from trading time."""
    await record_session(database, BEGINS, at(100))
    await record_session(database, at(200), ENDS)
    await execute(database, "INSERT INTO ingest.exclusions VALUES ($1, $2, 'outage of the exchange')", at(150), at(400))
    assert await gaps(database) == [
        (at(100), at(150), "the connection was closed or cut", "open"),
        (at(150), at(200), "the connection was closed or cut; excluded: outage of the exchange", "excluded"),
    ]
    assert await friday(database) == (445, 395, 50, 0, 88.76)


async def test_outcomes_of_a_gap(database: str) -> None:
    """Each part of a gap has the outcome of its own backfill; a pending part is open."""
    await record_session(database, BEGINS, at(100))
    await record_session(database, at(200), ENDS)
    for begin, end, status in ((100, 120, "backfilled"), (120, 130, "partial"), (130, 140, "unfillable"),
                               (140, 150, "pending"), (160, 180, "backfilled")):  # fmt: skip
        await execute(
            database,
            "INSERT INTO ingest.backfills (gap_from, gap_until, symbol, status) VALUES ($1, $2, '*', $3)",
            at(begin), at(end), status,
        )  # fmt: skip
    assert [(row[0], row[1], row[3]) for row in await gaps(database)] == [
        (at(100), at(120), "backfilled"),
        (at(120), at(130), "partial"),
        (at(130), at(140), "unfillable"),
        (at(140), at(160), "open"),
        (at(160), at(180), "backfilled"),
        (at(180), at(200), "open"),
    ]
    assert await friday(database) == (495, 395, 100, 40, 87.87)


async def test_the_change_of_summer_time(database: str) -> None:
    """Trading days are as long before and after the change of the clocks, and move by an hour in UTC."""
    await record_session(database, datetime(2026, 9, 1, tzinfo=UTC), datetime(2026, 10, 1, tzinfo=UTC))
    sql = "SELECT trading_day, lower(span) FROM ingest.trading_time WHERE trading_day IN ('2026-09-25', '2026-09-28')"
    assert sorted(await query(database, sql)) == [
        (date(2026, 9, 25), datetime(2026, 9, 24, 21, tzinfo=UTC)),
        (date(2026, 9, 28), datetime(2026, 9, 27, 20, tzinfo=UTC)),
    ]
    days = {row[0]: row[1] for row in await query(database, DAYS)}
    assert days[date(2026, 9, 25)] == days[date(2026, 9, 28)] == 495
    assert date(2026, 9, 26) not in days
    await execute(database, "UPDATE ingest.settings SET calendar = 'always', coverage_since = '2026-04-01+00'")
    days = {row[0]: row[1] for row in await query(database, DAYS)}
    assert (days[date(2026, 4, 5)], days[date(2026, 9, 27)], days[date(2026, 9, 28)]) == (1500, 1380, 1440)


async def test_early_closes_and_holidays(database: str) -> None:
    """Christmas Eve is shorter, and Christmas Day is no trading day."""
    await execute(database, "UPDATE ingest.settings SET coverage_since = '2025-12-23+00'")
    await record_session(database, BEGINS, ENDS)
    days = {row[0]: row[1] for row in await query(database, DAYS)}
    assert days[date(2025, 12, 24)] == 255
    assert date(2025, 12, 25) not in days
    assert date(2025, 12, 26) not in days


async def test_a_gap_over_midnight_belongs_to_both_days(database: str) -> None:
    """If trading days adjoin, a gap over midnight is divided by day."""
    await execute(database, "UPDATE ingest.settings SET calendar = 'always'")
    midnight = datetime(2026, 11, 18, 11, tzinfo=UTC)
    await record_session(database, midnight - timedelta(hours=5), midnight - timedelta(hours=1))
    await record_session(database, midnight + timedelta(hours=2), datetime.now(UTC))
    rows = await query(database, "SELECT trading_day, started_at, ended_at FROM market.gaps ORDER BY started_at")
    assert rows == [
        (date(2026, 11, 18), midnight - timedelta(hours=1), midnight),
        (date(2026, 11, 19), midnight, midnight + timedelta(hours=2)),
    ]


async def test_every_end_reason_has_a_text(database: str) -> None:
    """Every end reason has a text, not an internal name."""
    for reason in EndReason:
        ((words,),) = await query(database, f"SELECT ingest.cause('{reason}')")
        assert " " in words


@pytest.mark.parametrize("view", ["market.gaps", "market.coverage"])
async def test_the_work_grows_with_the_days(view: str, database: str) -> None:
    """With a restart every trading day, two more years cost about twice the rows of one more year."""
    one, two, four = [await rows_handled(database, view, years) for years in (1, 2, 4)]
    assert (four - two) / (two - one) < 3, (one, two, four)


async def rows_handled(database: str, view: str, years: int) -> int:
    """Return the number of rows that the steps of a query read, over so many years with a session a day.

    Unlike the time, this does not depend on the machine; a join of every gap with every day would square it.
    """
    connection = await connect(database)
    await connection.execute("TRUNCATE ingest.stream_sessions CASCADE")
    await connection.execute(
        "INSERT INTO ingest.stream_sessions (id, instance, endpoint, connected_at, authenticated_at, covered_until, "
        "last_tick_at, ended_at, end_reason) SELECT gen_random_uuid(), 'one', 'ws://x', at, at, "
        "at + interval '23:59:50', at + interval '23:59:49', at + interval '23:59:51', "
        "(array['stopped', 'closed', 'crashed', 'stall'])[1 + extract(day FROM at)::int % 4] "
        "FROM generate_series(date_trunc('day', now()) - $1 * interval '1 year' + interval '23 hours', "
        "now() - interval '1 day', interval '1 day') AS at",
        years,
    )
    await connection.execute("ANALYZE ingest.stream_sessions, ingest.trading_sessions")
    plan = await connection.fetchval(f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) SELECT * FROM {view}")
    await connection.close()
    total: int = sum(map(_rows, _steps(json.loads(plan)[0]["Plan"])))
    return total


def _steps(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield step
    for below in step.get("Plans", ()):
        yield from _steps(below)


def _rows(step: dict[str, Any]) -> int:
    kinds = ("Actual Rows", "Rows Removed by Filter", "Rows Removed by Join Filter")
    rows: float = sum(step.get(kind, 0) for kind in kinds)
    loops: int = step["Actual Loops"]
    return round(rows * loops)


TICK = "INSERT INTO market.ticks (time, received_at, price, volume, occurrence, symbol) VALUES ($1, $1, $2, 10, 1, $3)"
BAR = (
    "INSERT INTO market.bars (symbol, time, resolution, open, high, low, close, volume, source) "
    "VALUES ($2, $1, '1 minute', 9, 9, 9, 9, 9, 'financefeast')"
)
SERIES = "SELECT time, open, source FROM market.bars_1m WHERE symbol = 'A.NZ' ORDER BY time"


async def test_one_bar_for_each_minute(database: str) -> None:
    """A bar is ours if its minute was fully covered, else the provider's; each minute has one bar."""
    await record_session(database, BEGINS, at(100))
    await record_session(database, at(102.5), ENDS)
    for minute in (98, 99, 102, 103, 105):
        await execute(database, TICK, at(minute) + timedelta(seconds=40), 1.5, "A.NZ")
    for minute in (98, 99, 100, 102, 104):
        await execute(database, BAR, at(minute), "A.NZ")
    assert await query(database, SERIES) == [
        (at(98), 1.5, "stream"),  # covered, and fetched without need
        (at(99), 9, "backfill"),  # within the margin of the gap: a tick may be on the other side
        (at(100), 9, "backfill"),
        (at(102), 9, "backfill"),  # half covered
        (at(103), 1.5, "stream"),
        (at(105), 1.5, "stream"),  # 104 was fully covered, so the provider's bar is wrong: there was no trade
    ]


async def test_a_minute_with_a_rejection_is_incomplete(database: str) -> None:
    """A minute with a rejection is not fully covered: the message may have been a trade."""
    session = await record_session(database, BEGINS, ENDS)
    await execute(
        database, "INSERT INTO ingest.rejected_messages VALUES ($1, 1, 1, $2, 'not_json', 'x', 1)", session, at(50.5)
    )
    for minute in (49, 50, 51):
        await execute(database, TICK, at(minute), 1.5, "A.NZ")
    await execute(database, BAR, at(50), "A.NZ")
    assert await query(database, SERIES) == [(at(49), 1.5, "stream"), (at(50), 9, "backfill"), (at(51), 1.5, "stream")]


async def test_sessions_that_touch_make_one_range(database: str) -> None:
    """No margin is taken off where one session follows another at once."""
    await record_session(database, BEGINS, at(100.5), instance="one")
    await record_session(database, at(100.4), ENDS, instance="two")
    await execute(database, TICK, at(100), 1.5, "A.NZ")
    assert await query(database, SERIES) == [(at(100), 1.5, "stream")]
