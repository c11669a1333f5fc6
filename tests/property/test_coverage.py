"""For any sessions and calendar, gaps and covered time tile the trading time exactly."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

from hypothesis import given, settings
from hypothesis import strategies as st

from ingestor.store.connect import connect
from tests.servers import TestServer

BASE = datetime(2026, 4, 3, tzinfo=UTC)
"""Two days before Auckland's clocks go back."""

LENGTH = 5 * 1440
"""Minutes: the world of these tests is five days long, and all its times are whole minutes."""

MINUTE = timedelta(minutes=1)
STATUSES = ("backfilled", "partial", "unfillable", "pending")


@dataclass(frozen=True)
class World:
    """Intervals in minutes from the base: trading days, sessions, exclusions, and backfills with their status."""

    days: list[tuple[int, int]]
    lead: int
    tail: int
    sessions: list[tuple[int, int]]
    exclusions: list[tuple[int, int]]
    backfills: list[tuple[int, int, str]]


def intervals(longest: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, LENGTH - 1), st.integers(1, longest)).map(
        lambda pair: (pair[0], min(sum(pair), LENGTH))
    )


@st.composite
def worlds(draw: st.DrawFn) -> World:
    days = []
    for day in range(5):
        if draw(st.booleans()):
            opens = day * 1440 + draw(st.integers(0, 700))
            days.append((opens, opens + draw(st.integers(1, 1440 - opens % 1440))))
    pieces = draw(st.lists(st.tuples(intervals(2000), st.sampled_from(STATUSES)), max_size=4))
    return World(
        days,
        draw(st.sampled_from((0, 60, 720))),
        draw(st.sampled_from((0, 30, 720))),
        draw(st.lists(intervals(2000), max_size=8)),
        draw(st.lists(intervals(500), max_size=2, unique=True)),
        [(*span, status) for span, status in {span: (span, status) for span, status in pieces}.values()],
    )


def minutes(spans: list[tuple[int, int]]) -> set[int]:
    return {minute for start, end in spans for minute in range(start, end)}


def trading_time(world: World) -> dict[int, set[int]]:
    """Return the trading minutes of each day: widened, never into another day's session, each counted once."""
    found: dict[int, set[int]] = {}
    taken: set[int] = set()
    for number, (opens, closes) in enumerate(world.days):
        following = world.days[number + 1][0] if number + 1 < len(world.days) else 10**9
        mine = set(range(max(opens - world.lead, 0), min(closes + world.tail, following))) - taken
        taken |= mine
        found[opens // 1440] = mine
    return found


def at(minute: int) -> datetime:
    return BASE + minute * MINUTE


def minute_of(moment: datetime) -> int:
    assert (moment - BASE) % MINUTE == timedelta()
    return (moment - BASE) // MINUTE


async def look(connection: Any, world: World) -> tuple[list[Any], list[Any]]:
    """Record a world, return the rows of the views, and remove it."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        await connection.execute("DELETE FROM ingest.trading_sessions")
        await connection.execute(
            "UPDATE ingest.settings SET coverage_since = $1, coverage_lead = $2, coverage_tail = $3, "
            "exchange_timezone = 'UTC'",
            BASE, world.lead * MINUTE, world.tail * MINUTE,
        )  # fmt: skip
        await connection.executemany(
            "INSERT INTO ingest.trading_sessions VALUES ('XNZE', $1, $2, $3)",
            [(at(opens).date(), at(opens), at(closes)) for opens, closes in world.days],
        )
        await connection.executemany(
            "INSERT INTO ingest.stream_sessions (id, instance, endpoint, connected_at, authenticated_at, "
            "covered_until, last_message_at, ended_at, end_reason) "
            "VALUES ($1, 'one', 'x', $2, $2, $3, $3, $3, 'closed')",
            [(uuid4(), at(start), at(end)) for start, end in world.sessions],
        )
        await connection.executemany(
            "INSERT INTO ingest.exclusions VALUES ($1, $2, 'halt')",
            [(at(start), at(end)) for start, end in world.exclusions],
        )
        await connection.executemany(
            "INSERT INTO ingest.backfills (gap_from, gap_until, symbol, status) VALUES ($1, $2, '*', $3)",
            [(at(start), at(end), status) for start, end, status in world.backfills],
        )
        gaps = await connection.fetch("SELECT * FROM market.gaps")
        return gaps, await connection.fetch("SELECT * FROM market.coverage")
    finally:
        await transaction.rollback()


def expected_status(world: World, minute: int) -> str:
    if any(start <= minute < end for start, end in world.exclusions):
        return "excluded"
    for status in STATUSES[:3]:
        if any(start <= minute < end for start, end, its in world.backfills if its == status):
            return status
    return "open"


def check(world: World, gaps: list[Any], days: list[Any]) -> None:
    trading, covered = trading_time(world), minutes(world.sessions)
    found: Counter[int] = Counter()
    missed: Counter[int] = Counter()
    for gap in gaps:
        its = range(minute_of(gap["started_at"]), minute_of(gap["ended_at"]))
        assert its
        found.update(its)
        day = (gap["trading_day"] - BASE.date()).days
        assert set(its) <= trading[day] - covered
        assert {expected_status(world, minute) for minute in its} == {gap["status"]}
        missed[day] += len(its) * (gap["status"] != "excluded")
    assert set(found.values()) <= {1}
    assert set(found) == set().union(*trading.values()) - covered
    rows = {(row["trading_day"] - BASE.date()).days: row for row in days}
    assert set(rows) == {day for day, its in trading.items() if its}
    for day, row in rows.items():
        excluded = sum(expected_status(world, minute) == "excluded" for minute in trading[day] - covered)
        assert row["trading_minutes"] == len(trading[day]) - excluded
        assert row["missing_minutes"] == missed[day]
        assert row["covered_minutes"] == row["trading_minutes"] - missed[day] == len(trading[day] & covered)


def test_gaps_and_coverage_tile_the_trading_time(server: TestServer) -> None:
    """No minute is counted twice or left out, whatever is covered, excluded and backfilled."""
    with asyncio.Runner() as runner:
        name = server.new_name()
        connection = runner.run(connect(runner.run(server.create(name, server.template))))

        @settings(max_examples=60, deadline=None)
        @given(worlds())
        def holds(world: World) -> None:
            check(world, *runner.run(look(connection, world)))

        try:
            holds()
        finally:
            runner.run(connection.close())
            runner.run(server.drop(name))
