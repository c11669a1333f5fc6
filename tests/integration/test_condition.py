"""`market.condition` changes with every change of a day's data, and bars are known as of any moment."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from datetime import UTC, date, datetime, timedelta
from random import Random
from typing import Any

import pytest

from ingestor.model import SECOND
from ingestor.store.connect import connect
from ingestor.store.ticks import TickStore
from tests.bars import TickRow, insert, maintained, some_ticks
from tests.clocks import ManualClock
from tests.integration.test_store import T0, batcher, filled, tick
from tests.servers import TestServer, query
from tests.sessions import BEGINS, ENDS, MINUTE, OPENS, at, execute, record_session

pytestmark = pytest.mark.usefixtures("bundled_calendar")

CHANGES = "SELECT trading_day, changed_at FROM ingest.day_changes"
FRIDAY, MONDAY = date(2026, 11, 20), date(2026, 11, 23)
COLUMNS = "condition, ticks, first_tick_at, last_tick_at, percent, backfilled_minutes, rejected"


async def condition(url: str, day: date = FRIDAY) -> tuple[Any, ...]:
    """Return the row of a day."""
    (row,) = await query(url, f"SELECT {COLUMNS} FROM market.condition WHERE trading_day = '{day}'")
    return tuple(row)


async def last_modified(url: str) -> dict[date, datetime]:
    """Return when each day's data last changed."""
    return dict(await query(url, "SELECT trading_day, last_modified FROM market.condition"))


async def changed_by(url: str, sql: str, *arguments: object) -> set[date]:
    """Run a statement; return the days whose data it has changed. All of them changed after it began."""
    before, began = await last_modified(url), (await query(url, "SELECT clock_timestamp()"))[0][0]
    await execute(url, sql, *arguments)
    after = await last_modified(url)
    changed = {day for day, moment in after.items() if moment != before.get(day)}
    assert all(after[day] > began for day in changed)
    return changed


async def test_a_day_from_nothing_to_available(database: str) -> None:
    """A day is missing, then degraded, pending while its gap is asked for, and at last available."""
    await execute(database, "UPDATE ingest.settings SET coverage_since = $1", BEGINS)
    assert await condition(database) == ("missing", 0, None, None, 0, 0, 0)
    rows = [(at(61), at(61), 1.5, 10, 1, "A.NZ"), (at(62), at(63), 1.6, 10, 1, "B.NZ")]
    await insert(database, rows)
    assert await condition(database) == ("degraded", 2, at(61), at(62), 0, 0, 0)
    assert (await last_modified(database))[FRIDAY] == at(63)
    await record_session(database, BEGINS, at(99))
    await record_session(database, at(198), ENDS)
    assert await condition(database) == ("degraded", 2, at(61), at(62), 80, 0, 0)
    asked = "INSERT INTO ingest.backfills (gap_from, gap_until, symbol, status) VALUES ($1, $2, '*', 'pending')"
    await execute(database, asked, at(99), at(198))
    assert (await condition(database))[0] == "pending"
    await execute(database, "UPDATE ingest.backfills SET status = 'backfilled'")
    assert await condition(database) == ("available", 2, at(61), at(62), 100, 99, 0)
    await maintained(database)
    assert await condition(database) == ("available", 2, at(61), at(62), 100, 99, 0)


async def test_a_rejected_message_degrades_its_day(database: str) -> None:
    """A message of the trading time that is no tick makes the day degraded; one of a replay does not."""
    identity = await record_session(database, BEGINS, ENDS)
    replay = await record_session(database, BEGINS, ENDS, kind="replay")
    assert await condition(database) == ("available", 0, None, None, 100, 0, 0)
    reject = "INSERT INTO ingest.rejected_messages VALUES ($1, 1, 1, $2, 'not_json', '', 0)"
    await execute(database, reject, replay, at(5))
    assert (await condition(database))[0] == "available"
    await execute(database, reject, identity, at(30))
    assert await condition(database) == ("degraded", 0, None, None, 100, 0, 1)
    assert (await last_modified(database))[FRIDAY] == at(30)


async def test_an_excluded_day_is_available(database: str) -> None:
    """Of a day on which the exchange did not trade, nothing is missing."""
    await execute(database, "UPDATE ingest.settings SET coverage_since = $1", BEGINS)
    exclude = "INSERT INTO ingest.exclusions (excluded_from, excluded_until, reason) VALUES ($1, $2, 'halt')"
    await execute(database, exclude, BEGINS, ENDS)
    assert await condition(database) == ("available", 0, None, None, None, 0, 0)


async def test_changes_of_exclusions_and_backfills(database: str) -> None:
    """Each statement changes the days that its rows touch, an update those before and after it, and no others."""
    await execute(database, "UPDATE ingest.settings SET coverage_since = $1", BEGINS)
    exclude = "INSERT INTO ingest.exclusions (excluded_from, excluded_until, reason) VALUES ($1, $2, 'halt')"
    three = timedelta(days=3)
    assert await changed_by(database, exclude, at(1), at(2)) == {FRIDAY}
    move = "UPDATE ingest.exclusions SET excluded_from = excluded_from + $1, excluded_until = excluded_until + $1"
    assert await changed_by(database, move, three) == {FRIDAY, MONDAY}
    assert await changed_by(database, "DELETE FROM ingest.exclusions") == {MONDAY}
    endless = "INSERT INTO ingest.exclusions VALUES ('-infinity', 'infinity', 'closed')"
    assert {FRIDAY, MONDAY} <= await changed_by(database, endless)
    ask = "INSERT INTO ingest.backfills (gap_from, gap_until, symbol, status) VALUES ($1, $2, $3, 'pending')"
    assert await changed_by(database, ask, at(1), at(2), "A.NZ") == {FRIDAY}
    assert await changed_by(database, "UPDATE ingest.backfills SET bars = 1") == {FRIDAY}
    midnight = BEGINS + timedelta(hours=15)
    assert await changed_by(database, ask, at(1), midnight, "B.NZ") == {FRIDAY}  # it ends as the next day begins
    assert await changed_by(database, "DELETE FROM ingest.backfills WHERE false") == set()
    assert await changed_by(database, "DELETE FROM ingest.backfills") == {FRIDAY}


async def test_late_ticks_change_their_days(writer_url: str, database: str) -> None:
    """A batch that is committed long after its arrival is a change at its commit, as are minutes marked by hand."""
    clock = ManualClock(T0)
    store, instance = TickStore(writer_url, write_timeout=10, clock=clock), batcher()
    day = 86400 * SECOND
    await store.write([filled(instance, tick())])
    assert await query(database, CHANGES) == []  # by its arrival
    clock.advance(6)
    began = (await query(database, "SELECT clock_timestamp()"))[0][0]
    await store.write(
        [filled(instance, tick("B"), rejected=1), filled(instance, tick("C", T0 + 3 * day), tick("D", T0))]
    )
    noted = dict(await query(database, CHANGES))
    assert set(noted) == {date(2026, 3, 2), date(2026, 3, 5)}
    assert min(noted.values()) > began
    await maintained(database)
    assert dict(await query(database, CHANGES)) == noted  # to store bars changes nothing
    mark = "SELECT ingest.mark_stale($1, $2)"
    moment = datetime(2026, 3, 2, tzinfo=UTC)
    assert await changed_by(database, mark, moment, moment + timedelta(hours=1)) == {date(2026, 3, 2)}
    await maintained(database)
    clock.advance(-6)
    assert len(await query(database, "SELECT * FROM ingest.stale_bars")) == 0
    await store.write([filled(instance, tick("E"))])  # its minute is stored already
    after = dict(await query(database, CHANGES))
    assert after[date(2026, 3, 2)] > noted[date(2026, 3, 2)]
    await store.close()


async def test_changes_grow_whatever_the_clock_does(database: str) -> None:
    """Two changes never have the same moment, also where the clock was set back between them."""
    note = "SELECT ingest.note_changes(ARRAY[$1::timestamptz], ARRAY[$1::timestamptz])"
    await execute(database, note, OPENS)
    future = datetime(2100, 1, 1, tzinfo=UTC)
    await execute(database, "UPDATE ingest.day_changes SET changed_at = $1", future)
    await execute(database, note, OPENS)
    assert await query(database, CHANGES) == [
        (FRIDAY, future + timedelta(microseconds=1)),
    ]


Bars = dict[tuple[str, datetime], tuple[float, float, float, float, int, str]]


def bars_as_of(moment: datetime, ticks: list[TickRow], fetched: list[Any], covered: list[tuple[Any, Any]]) -> Bars:
    """Return the bars that were known at a moment, computed slowly."""
    margin = timedelta(seconds=5)

    def is_covered(minute: datetime) -> bool:
        end = minute + MINUTE + margin
        return end <= moment and any(since <= minute - margin and end <= until for since, until in covered)

    groups: dict[tuple[str, datetime], list[TickRow]] = defaultdict(list)
    for row in sorted(ticks, key=lambda row: (row[0], row[1], row[4])):
        if row[1] <= moment:
            groups[row[5], row[0].replace(second=0)].append(row)
    found: Bars = {}
    for key, rows in groups.items():
        prices = [row[2] for row in rows]
        if is_covered(key[1]):
            volume = sum(row[3] for row in rows)
            found[key] = (prices[0], max(prices), min(prices), prices[-1], volume, "stream")
    for symbol, minute, price, at_ in fetched:
        if at_ <= moment and not is_covered(minute):
            found[symbol, minute] = (price, price, price, price, 7, "backfill")
    return found


async def test_bars_as_of_a_moment(database: str, server: TestServer) -> None:
    """At each moment the bars are those of the ticks and fetched bars that were there; at the end, `market.bars_1m`."""
    random = Random(7)
    start = BEGINS - timedelta(days=30)
    ticks = [
        (row[0], row[1] + timedelta(minutes=random.choice((0, 0, 0, 1, 90))), *row[2:])
        for row in some_ticks(start, 0.1, 700)
    ]
    fetched = [
        (
            symbol,
            start + number * MINUTE,
            3.0 + number,
            start + number * MINUTE + timedelta(hours=random.choice((1, 4))),
        )
        for number in range(0, 150, 3)
        for symbol in ("A.NZ", "X.NZ")
    ]
    covered = [(start - MINUTE, start + 40 * MINUTE), (start + 60.5 * MINUTE, start + 150 * MINUTE)]
    await insert(database, ticks)
    for since, until in covered:
        await record_session(database, since, until)
    connection = await connect(database)
    add = """
    INSERT INTO market.bars (symbol, time, resolution, open, high, low, close, volume, source, fetched_at)
    SELECT symbol, time, '1 minute', price, price, price, price, 7, 'financefeast', fetched_at
    FROM unnest($1::text[], $2::timestamptz[], $3::float8[], $4::timestamptz[]) AS b (symbol, time, price, fetched_at)
    """
    await connection.execute(add, *map(list, zip(*fetched, strict=True)))
    await maintained(database)
    moments = [start + random.random() * timedelta(hours=5) for _ in range(12)]
    moments += [random.choice(ticks)[1], start + 3 * MINUTE + timedelta(seconds=5)]
    for moment in moments:
        rows = await connection.fetch("SELECT * FROM market.bars_1m_as_of($1)", moment)
        found = {(row["symbol"], row["time"]): tuple(row)[2:] for row in rows}
        assert len(rows) == len(found)
        assert found == bars_as_of(moment, ticks, fetched, covered), moment
    both = [
        sorted(map(tuple, await connection.fetch(f"SELECT * FROM {name}")))
        for name in ("market.bars_1m", "market.bars_1m_as_of(now())")
    ]
    assert both[0] == both[1]
    explain = (
        "EXPLAIN SELECT * FROM market.bars_1m_as_of(now()) WHERE symbol = 'A.NZ' AND time >= now() - interval '1 day'"
    )
    plan = [row[0] for row in await connection.fetch(explain)]
    assert not any("Function Scan on bars_1m_as_of" in line for line in plan), "\n".join(plan)
    await connection.close()


async def test_an_analyst_reads_what_was_known(database: str, server: TestServer) -> None:
    """The functions run with the analyst's rights, and need no more than the schema `market`."""
    name = server.new_name()
    await server.run(f"CREATE ROLE {name} LOGIN IN ROLE market_read")
    connection = await connect(database)
    try:
        await connection.execute(f"SET SESSION AUTHORIZATION {name}")
        for call in ("market.bars_1m_as_of(now())", "market.ticks_as_of(now())", "market.condition"):
            await connection.fetch(f"SELECT * FROM {call}")
    finally:
        await connection.close()
        await server.run(f"DROP ROLE {name}")


async def test_an_open_transaction_stops_no_writer(writer_url: str, database: str) -> None:
    """While a person's transaction has changed a day, late ticks of that day are written, and both changes count."""
    other = await connect(database)
    transaction = other.transaction()
    await transaction.start()
    moment = datetime(2026, 3, 2, tzinfo=UTC)
    await other.execute("INSERT INTO ingest.exclusions VALUES ($1, $2, 'halt')", moment, moment + MINUTE)
    store, instance = TickStore(writer_url, write_timeout=60), batcher()
    await store.write([filled(instance, tick())])
    await store.write([filled(instance, tick("B"))])
    await store.close()
    days = "SELECT trading_day, count(*), count(DISTINCT changed_at) FROM ingest.day_changes GROUP BY 1"
    assert await query(database, days) == [(date(2026, 3, 2), 1, 1)]
    await transaction.commit()
    await other.close()
    assert await query(database, days) == [(date(2026, 3, 2), 2, 2)]
    note = "SELECT ingest.note_changes(ARRAY[$1::timestamptz], ARRAY[$1::timestamptz])"
    await execute(database, note, moment)
    assert await query(database, days) == [(date(2026, 3, 2), 1, 1)]


async def test_processes_note_the_same_days(database: str) -> None:
    """Processes that note the same days at once neither block each other nor lose a day, and the rows stay few."""
    note = "SELECT ingest.note_changes($1::timestamptz[], $1::timestamptz[])"
    days = [BEGINS + timedelta(days=number) for number in range(40)]
    first, second = [await connect(database) for _ in range(2)]
    work = [each.executemany(note, [(order,)] * 50) for each, order in ((first, days), (second, days[::-1]))]
    await asyncio.gather(*work)
    rows = "SELECT count(DISTINCT trading_day), count(*) <= 2 * count(DISTINCT trading_day) FROM ingest.day_changes"
    assert await query(database, rows) == [(40, True)]
    for each in (first, second):
        await each.close()
