"""Bars made from ticks have the same relations and values in every edition."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from ingestor.admin import retention
from ingestor.clock import from_datetime, to_datetime
from ingestor.model import SECOND
from ingestor.store.connect import connect
from ingestor.store.gaps import GapStore
from ingestor.store.ticks import TickStore
from tests.bars import assert_bars, insert, maintained, some_ticks
from tests.clocks import SkewedClock
from tests.integration.test_store import batcher, filled, tick
from tests.servers import TestServer, query

pytestmark = pytest.mark.usefixtures("bundled_calendar")

SUMMER = datetime(2026, 9, 26, 2, 30, tzinfo=UTC)
"""The day before New Zealand's clocks go forward: the next day has 23 hours."""

STALE = "SELECT symbol, time FROM ingest.stale_bars ORDER BY symbol"


async def test_bars_of_every_width(database: str) -> None:
    """Each value of each bar is right over days of 23 and 24 hours; arrival orders the ticks of one second."""
    await insert(database, some_ticks(SUMMER, 3, 2000))
    counts = await assert_bars(database)
    assert counts["1m"] > counts["5m"] > counts["1h"] > counts["1d"] == 3 * 4


async def test_order_within_a_second(database: str) -> None:
    """Ticks are ordered by time, arrival, occurrence: a late tick of the second before is not the last one."""
    second = timedelta(seconds=1)
    await insert(
        database,
        [
            (SUMMER, SUMMER + 5 * second, 2.0, 1, 1, "A.NZ"),
            (SUMMER, SUMMER + 4 * second, 1.0, 1, 1, "A.NZ"),
            (SUMMER + second, SUMMER + 2 * second, 3.0, 1, 1, "A.NZ"),
            (SUMMER + second, SUMMER + 2 * second, 3.0, 1, 2, "A.NZ"),
            (SUMMER + second, SUMMER + 1 * second, 4.0, 1, 1, "A.NZ"),
        ],
    )
    for view in ("ohlcv_1m", "ohlcv_5m", "ohlcv_1h", "ohlcv_1d"):
        assert await query(database, f"SELECT open, close FROM market.{view}") == [(1.0, 3.0)]


async def test_ticks_with_extreme_prices(database: str) -> None:
    """Prices and volumes at the ends of their types break no sum and no other bar."""
    hostile = [(1e308, 2**63 - 1), (-1e308, 2**63 - 1), (1e308, 2**63 - 1), (5e-324, 2**63 - 1), (0.0, 1)]
    rows = [(SUMMER, SUMMER, price, volume, 1, "A.NZ") for price, volume in hostile[:2]]
    rows += [(SUMMER, SUMMER, price, volume, 1, f"{n}.NZ") for n, (price, volume) in enumerate(hostile)]
    await insert(database, [*rows, (SUMMER, SUMMER, 1.5, 10, 1, "B.NZ")])
    for view in ("ohlcv_1m", "ohlcv_5m", "ohlcv_1h", "ohlcv_1d"):
        found = await query(database, f"SELECT volume, high, turnover FROM market.{view} WHERE symbol = 'A.NZ'")
        assert found == [(2**63 - 1, 1e308, 0.0)]
        assert await query(database, f"SELECT vwap FROM market.{view} WHERE symbol = 'B.NZ'") == [(1.5,)]
        assert len(await query(database, f"SELECT * FROM market.{view}")) == 7


async def test_bounds_use_an_index(database: str, server: TestServer) -> None:
    """A query for a span of time reads only that span, not all ticks of a symbol."""
    if server.is_community:
        return  # aggregates are stored by symbol and time
    await insert(database, some_ticks(SUMMER, 1, 50))
    connection = await connect(database)
    for way in ("seqscan", "indexscan", "indexonlyscan"):
        await connection.execute(f"SET enable_{way} = off")
    for view in ("ohlcv_1m", "ohlcv_5m", "ohlcv_1h", "ohlcv_1d", "bars_1m"):
        sql = f"EXPLAIN SELECT * FROM market.{view} WHERE symbol <> 'X' AND time >= $1 AND time < $2"
        plan = [row[0] for row in await connection.fetch(sql, SUMMER, SUMMER + timedelta(days=2))]
        assert any("Bitmap Index Scan on" in line and "_key" not in line for line in plan), "\n".join(plan)
    await connection.close()


async def test_ticks_as_of_a_moment(database: str) -> None:
    """`market.ticks_as_of` has exactly the ticks that had arrived, and the planner reads the table in its place."""
    rows = some_ticks(SUMMER, 1, 300)
    await insert(database, rows)
    arrivals = sorted(row[1] for row in rows)
    connection = await connect(database)
    for moment in (arrivals[0] - timedelta(microseconds=1), arrivals[0], arrivals[150], arrivals[-1]):
        found = await connection.fetch("SELECT * FROM market.ticks_as_of($1)", moment)
        assert sorted(map(tuple, found)) == sorted(row for row in rows if row[1] <= moment)
    explain = "EXPLAIN SELECT * FROM market.ticks_as_of(now()) WHERE symbol = 'A.NZ' AND time > now()"
    assert not any("Function Scan" in row[0] for row in await connection.fetch(explain))
    await connection.close()


async def test_the_last_ticks(database: str) -> None:
    """`market.latest` has the last tick of each symbol by time, arrival and occurrence."""
    rows = some_ticks(SUMMER, 2, 300)
    await insert(database, rows)
    expected = {}
    for row in sorted(rows, key=lambda row: (row[0], row[1], row[4])):
        expected[row[5]] = (row[5], *row[:4])
    sql = "SELECT symbol, time, received_at, price, volume FROM market.latest ORDER BY symbol"
    assert await query(database, sql) == [expected[symbol] for symbol in sorted(expected)]


async def test_late_ticks_make_bars_stale(writer_url: str, database: str, server: TestServer) -> None:
    """The batch's transaction marks the minutes of late ticks as stale; the bars are right before and after repair."""
    store = TickStore(writer_url, write_timeout=10, clock=SkewedClock(-7 * 3600))
    instance = batcher()
    now = from_datetime(datetime.now(UTC).replace(second=0, microsecond=0))
    old = now - 5 * 3600 * SECOND
    await store.write([filled(instance, tick(time=now), tick("B", old)), filled(instance)])
    if not server.is_community:
        assert await query(database, STALE) == []  # no bar is stored yet
    await maintained(database)
    half = old + 1800 * SECOND
    late = filled(instance, tick(time=now), tick("B", old + 59 * SECOND), tick("C", half), tick("D", now))
    await store.write([late])
    expected = [("B", to_datetime(old)), ("C", to_datetime(half))]
    assert await query(database, STALE) == expected
    counts = await assert_bars(database)
    noted = await query(database, "SELECT min(noted_at) FROM ingest.stale_bars")
    await store.write([filled(instance, tick("B", old), tick("C", half + 1), tick("E", now))])
    assert await query(database, STALE) == expected
    assert await query(database, "SELECT min(noted_at) FROM ingest.stale_bars") > noted
    await store.write([late])  # committed before, so nothing changes
    await store.close()
    assert await query(database, "SELECT count(*) FROM market.ticks") == [(9,)]
    await maintained(database)
    assert await query(database, STALE) == []
    assert (await assert_bars(database))["1m"] == counts["1m"] + 1


async def test_retention_keeps_the_bars(writer_url: str, database: str, server: TestServer) -> None:
    """Bars outlive their ticks, and a late tick of dropped time is merged into them, once."""
    if server.is_community:
        return  # tests/integration/test_community.py
    now = datetime.now(UTC).replace(second=30, microsecond=0)
    old = now - timedelta(days=100)
    prices = [(old + timedelta(seconds=number), price) for number, price in enumerate((2.0, 3.0, 1.5))]
    await insert(database, [(time, now, price, 10, 1, "A.NZ") for time, price in [*prices, (now, 9.0)]])
    assert any("dropped" in line for line in await maintained(database, retention="60d"))
    assert await query(database, "SELECT price FROM market.ticks") == [(9.0,)]
    bar = "SELECT open, high, low, close, volume, ticks FROM market.ohlcv_{} WHERE time < now() - interval '50 days'"
    for width in ("1m", "5m", "1h", "1d"):
        assert await query(database, bar.format(width)) == [(2.0, 3.0, 1.5, 1.5, 30, 3)]
    instance, time = batcher(), from_datetime(old)
    for seconds, price, expected in (
        (1, 4.0, (2.0, 4.0, 1.5, 1.5, 40, 4)),
        (-1, 2.5, (2.5, 4.0, 1.5, 1.5, 50, 5)),
        (2, 1.0, (2.5, 4.0, 1.0, 1.0, 60, 6)),
    ):
        store = TickStore(writer_url, write_timeout=10)  # a new one: the partition was dropped with its ticks
        await store.write([filled(instance, tick("A.NZ", time + seconds * SECOND, price))])
        await store.close()
        for _ in range(2):
            for width in ("1m", "5m", "1h", "1d"):
                assert await query(database, bar.format(width)) == [expected]
            await maintained(database, retention="60d")
    assert await query(database, "SELECT price FROM market.ticks") == [(9.0,)]


async def test_retention_drops_old_ticks(database: str, server: TestServer) -> None:
    """Retention drops whole old partitions or chunks and records how far it went; late ticks still have a partition."""
    name = database.rpartition("/")[2]
    await server.run(f"ALTER DATABASE {name} SET standard_conforming_strings = off")  # an older program may need it
    now = datetime.now(UTC).replace(microsecond=0)
    ages = [1, 20, 100, 130, 400]
    await insert(database, [(now - timedelta(days=age), now, 1.5, 10, 1, f"{age}.NZ") for age in ages])
    await maintained(database)
    assert await query(database, "SELECT count(*) FROM market.ticks") == [(5,)]
    (line,) = [line for line in await maintained(database, retention="60d") if "dropped" in line]
    assert "3 chunks or partitions" in line
    assert await query(database, "SELECT symbol FROM market.ticks ORDER BY 1") == [("1.NZ",), ("20.NZ",)]
    ((since,),) = await query(database, "SELECT ticks_since FROM ingest.settings")
    assert now - timedelta(days=100) < since <= now - timedelta(days=60)
    await insert(database, [(now - timedelta(days=100), now, 1.5, 10, 1, "late.NZ")])
    assert not [line for line in await maintained(database) if "dropped" in line]
    assert await query(database, "SELECT ticks_since FROM ingest.settings") == [(since,)]


async def test_concurrent_maintenance(database: str) -> None:
    """Two maintenance runs wait for each other and neither fails; each partition is dropped once."""
    now = datetime.now(UTC).replace(microsecond=0)
    await insert(database, [(now - timedelta(days=age), now, 1.5, 10, 1, "A.NZ") for age in (100, 200, 300)])
    reports = await asyncio.gather(*(maintained(database, retention="60d") for _ in range(3)))
    dropped = [line for lines in reports for line in lines if "dropped" in line]
    assert sum(int(re.findall(r"(\d+) chunks or partitions", line)[0]) for line in dropped) == 3
    assert await query(database, "SELECT count(*) FROM market.ticks") == [(0,)]


async def test_retention_that_has_to_wait(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long query keeps its ticks until the next run; the first tick of each symbol stays recorded."""
    monkeypatch.setattr(retention, "MAINTENANCE_LOCK_TIMEOUT", "100ms")
    now = datetime.now(UTC).replace(microsecond=0)
    old = now - timedelta(days=100)
    await insert(database, [(moment, now, 1.5, 10, 1, "A.NZ") for moment in (old, now)])
    async with GapStore(database) as gap_store:
        await gap_store.store_instruments("nzx", [])
    reader = await connect(database)
    async with reader.transaction():
        await reader.fetch("SELECT * FROM market.ticks")
        assert [line for line in await maintained(database, retention="60d") if "next run tries again" in line]
    await reader.close()
    assert [line for line in await maintained(database, retention="60d") if "dropped" in line]
    async with GapStore(database) as gap_store:
        await gap_store.store_instruments("nzx", [])
    assert await query(database, "SELECT first_seen, last_seen FROM market.instruments") == [(old, now)]
    async with GapStore(database) as gap_store:
        assert gap_store.ticks_since is not None
        assert old < gap_store.ticks_since < now


async def test_analysts_read_only_the_market(database: str, server: TestServer) -> None:
    """Analysts read every relation of `market`, also later ones, no other schema, and write nothing."""
    name = server.new_name()
    await server.run(f"CREATE ROLE {name} LOGIN IN ROLE market_read")
    connection = await connect(database)
    try:
        await connection.execute("CREATE TABLE market.later (x integer)")
        relations = await connection.fetch(
            "SELECT c.oid::regclass::text AS name FROM pg_class c WHERE relnamespace = 'market'::regnamespace "
            "AND relkind IN ('r', 'p', 'v', 'm') AND NOT relispartition"
        )
        await connection.execute(f"SET SESSION AUTHORIZATION {name}")
        assert len(relations) == 14
        for (relation,) in relations:
            await connection.fetch(f"SELECT * FROM {relation} LIMIT 1")
        for forbidden in ("SELECT * FROM ingest.settings", "DELETE FROM market.ticks", "CREATE TABLE market.mine ()"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(forbidden)
    finally:
        await connection.close()
        await server.run(f"DROP ROLE {name}")
