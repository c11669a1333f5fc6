"""Stored bars against an independent computation, at random moments of roll-up, repair and retention."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
from hypothesis import given, settings
from hypothesis import strategies as st

from ingestor.batch import Batcher
from ingestor.clock import from_datetime, to_datetime
from ingestor.model import SECOND, Micros, Tick
from ingestor.store.connect import connect
from ingestor.store.ticks import TickStore
from tests.bars import BUCKETS
from tests.integration.test_store import session
from tests.servers import TestServer

START = datetime(2026, 3, 30, 20, 0, tzinfo=UTC)
"""Four days about the end of a month, and about the end of New Zealand's summer time."""

DAYS = 8
SLOTS = DAYS * 24 * 60
TABLES = ("rollup_1m", "rollup_5m", "rollup_1h", "rollup_1d", "stale_bars")
STATE = ("announced_until", "until_1m", "until_5m", "until_1h", "until_1d")
RESET = (
    f"TRUNCATE market.ticks, ingest.stream_sessions, {', '.join(f'ingest.{name}' for name in TABLES)}",
    f"UPDATE ingest.rollup_state SET {', '.join(map('{} = DEFAULT'.format, STATE))}",
    "UPDATE ingest.settings SET ticks_since = NULL",
)

moments = st.integers(0, SLOTS - 1)
# Few symbols and minutes, so that ticks meet in buckets; whole seconds, so that they meet in a second.
ticks = st.tuples(
    st.sampled_from(["A", "B"]),
    st.one_of(moments, st.integers(0, 12), st.integers(2 * 1440 - 15, 2 * 1440 + 15)),
    st.integers(0, 2),
    st.sampled_from([1.5, 1.51, 0.0, -2.25]),
    st.sampled_from([0, 1, 100]),
)
actions = st.one_of(
    st.tuples(st.just("write"), st.lists(ticks, min_size=1, max_size=12)),
    st.tuples(st.just("announce"), moments),
    st.tuples(st.just("roll_up"), moments),
    st.tuples(st.just("repair"), st.integers(1, 4)),
    st.tuples(st.just("drop"), st.integers(0, 1)),
)


@dataclass
class World:
    """A database, and every tick that it was ever given."""

    connection: asyncpg.Connection
    store: TickStore
    batcher: Batcher = field(default_factory=lambda: Batcher(session(), max_rows=5000, occurrence_keys=1000))
    arrived: Micros = 0
    known: list[tuple[Tick, Micros]] = field(default_factory=list)

    async def do(self, name: str, argument: Any) -> None:
        """Take one action."""
        await getattr(self, f"_{name}")(argument)

    async def _write(self, rows: list[tuple[str, int, int, float, int]]) -> None:
        for symbol, minute, second, price, volume in rows:
            self.arrived += SECOND
            time = from_datetime(START + timedelta(minutes=minute, seconds=second))
            tick = Tick(symbol, time, price, volume)
            self.batcher.add(tick, from_datetime(START) + self.arrived)
            self.known.append((tick, self.arrived))
        await self.store.write([self.batcher.close()])

    async def _announce(self, minute: int) -> None:
        """As a process that is killed before it stores a bar."""
        await self.connection.execute("SELECT ingest.announce_rollup($1)", START + timedelta(minutes=minute))

    async def _roll_up(self, minute: int) -> None:
        await self._announce(minute)
        await self.connection.execute("SELECT ingest.roll_up($1, false)", START + timedelta(minutes=minute))

    async def _repair(self, most: int) -> None:
        await self.connection.execute("SELECT ingest.repair_bars($1, true)", most)

    async def _drop(self, _: int) -> None:
        """As retention does: what is stored and not stale, month by month."""
        until = datetime(2026, 4, 1, tzinfo=UTC)
        async with self.connection.transaction():
            ready = await self.connection.fetchval(
                "SELECT (SELECT until_1m FROM ingest.rollup_state) >= $1 "
                "AND NOT EXISTS (SELECT FROM ingest.stale_bars WHERE time < $1)",
                until,
            )
            if ready:
                await self.connection.execute("DELETE FROM market.ticks WHERE time < $1", until)
                await self.connection.execute("UPDATE ingest.settings SET ticks_since = $1", until)

    async def check(self) -> None:
        """Compare every bar of every width."""
        for width, bucket in BUCKETS.items():
            groups: dict[tuple[str, datetime], list[tuple[Tick, Micros]]] = defaultdict(list)
            for tick, arrived in self.known:
                groups[tick.symbol, bucket(to_datetime(tick.time))].append((tick, arrived))
            expected = {key: bar(group) for key, group in groups.items()}
            rows = await self.connection.fetch(f"SELECT * FROM market.ohlcv_{width}")
            found = {(row["symbol"], row["time"]): tuple(row)[2:] for row in rows}
            assert len(rows) == len(found), width
            assert {key: rounded(values) for key, values in found.items()} == expected, width


def bar(group: list[tuple[Tick, Micros]]) -> tuple[Any, ...]:
    """Return a bar of ticks, computed slowly."""
    prices = [tick.price for tick, _ in sorted(group, key=lambda entry: (entry[0].time, entry[1]))]
    volume = sum(tick.volume for tick, _ in group)
    turnover = sum(tick.price * tick.volume for tick, _ in group)
    vwap = turnover / volume if volume else None
    return rounded((prices[0], max(prices), min(prices), prices[-1], volume, turnover, vwap, len(group)))


def rounded(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the values with sums of floats rounded: their order is not fixed."""
    return tuple(round(value, 6) + 0.0 if isinstance(value, float) else value for value in values)


def test_stored_bars_are_the_bars_of_all_ticks(server: TestServer) -> None:
    """At every step, in every width: late, equal and scattered ticks, killed steps, partial repairs, dropped ticks."""
    with asyncio.Runner() as runner:
        name = server.new_name()
        url = runner.run(server.create(name, server.template))
        connection = runner.run(connect(url))
        store = TickStore(server.writer_url(url), write_timeout=30)

        async def run(steps: list[tuple[str, Any]]) -> None:
            for statement in RESET:
                await connection.execute(statement)
            world = World(connection, store)
            for step in steps:
                await world.do(*step)
                await world.check()

        @settings(max_examples=60, deadline=None)
        @given(st.lists(actions, min_size=2, max_size=12))
        def holds(steps: list[tuple[str, Any]]) -> None:
            runner.run(run(steps))

        try:
            holds()
        finally:
            runner.run(store.close())
            runner.run(connection.close())
            runner.run(server.drop(name))
