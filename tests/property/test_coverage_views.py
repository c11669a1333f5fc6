"""For random sessions, calendars and clocks, the views of coverage agree with a slow, independent computation."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from datetime import date, datetime, time, timedelta
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID

from ingestor.clock import from_datetime, to_datetime
from ingestor.model import SECOND, Micros
from ingestor.store.connect import connect
from tests.coverage_oracle import CAUSES, INFINITY, MINUTE, ZONE, Answer, Condition, Gap, Recorded, World, answer
from tests.servers import TestServer

SETS = int(os.environ.get("INGESTOR_TEST_SETS", "100"))
"""The number of compared sets of sessions. A set follows from its number and the time of day."""

AT_ONCE = 100
"""Sets in one query."""

DAY = 24 * 60 * MINUTE
DAYS = 4
"""The length of each calendar in days."""

EVALUATE = Path(__file__).with_name("evaluate.sql").read_text(encoding="utf-8")
FORGET = "DROP FUNCTION pg_temp.evaluate, pg_temp.instant, pg_temp.length, pg_temp.micros"


def random_world(seed: int, now: Micros) -> World:
    """Return a random set, around now or around a day on which Auckland's clocks change."""
    random = Random(seed)
    first = _first_day(random, now)
    adjoining = random.random() < 0.2
    calendar = [
        session
        for number in range(DAYS)
        if random.random() < 0.8 and (session := _trading(random, first + timedelta(days=number), adjoining=adjoining))
    ]
    start = _instant(first, time()) - 6 * 60 * MINUTE
    # Coinciding times cause most faults.
    instants = [start + random.randrange(DAYS * DAY // MINUTE) * MINUTE for _ in range(random.choice((4, 12, 40)))]
    instants += [at for _, opens, closes in calendar for at in (opens, closes)]
    instants += [now - random.choice((0, 29, 30, 31, 60, 61, 180)) * SECOND, now + random.randrange(300) * SECOND]

    def moment() -> Micros:
        at = random.choice(instants)
        return at if random.random() < 0.6 else at + random.randrange(-400 * SECOND, 400 * SECOND)

    def span() -> tuple[Micros, Micros]:
        begin = moment()
        return begin, max(moment(), begin + random.choice((1, SECOND, MINUTE, 300 * MINUTE)))

    sessions: list[Recorded] = []
    for _ in range(random.choice((0, 1, 2, 3, 5, 9))):
        sessions.append(each := _session(random, moment, now))
        if each.covered_until not in {None, INFINITY} and random.random() < 0.3:
            instants += [each.covered_until] * 4  # another session takes over at that moment
    identities = [each.id for each in sessions] + [_identity(random)]
    exclusions = {span(): random.choice(("halt", "outage")) for _ in range(random.choice((0, 0, 1, 2)))}
    statuses = ("backfilled", "partial", "unfillable", "pending", "backfilled")
    symbols = ("*", "*", "*", "A.NZ")
    settled = {(*span(), random.choice(symbols)): random.choice(statuses) for _ in range(random.choice((0, 0, 2, 5)))}
    world = World(
        now=now,
        since=random.choice((None, start, moment())),
        lead=random.choice((0, 60, 720)) * MINUTE,
        tail=random.choice((0, 30, 720)) * MINUTE,
        margin=random.choice((0, 5, 5, 40)) * SECOND,
        stall=random.choice((0, 60, 300)) * SECOND,
        calendar=calendar,
        sessions=sessions,
        exclusions=[(*key, why) for key, why in exclusions.items()],
        backfills=[(*key, status) for key, status in settled.items()],
        rejections=[(random.choice(identities), moment()) for _ in range(random.choice((0, 0, 1, 6)))],
        probes=[],
    )
    return replace(world, probes=_probes(random, world))


def _first_day(random: Random, now: Micros) -> date:
    today = to_datetime(now).astimezone(ZONE).date()
    if random.random() < 0.6:
        return today - timedelta(days=DAYS - 2)
    days = [today - timedelta(days=number) for number in range(DAYS, 400)]
    changes = [day for day in days if _instant(day + timedelta(days=1), time()) - _instant(day, time()) != DAY]
    return random.choice(changes) - timedelta(days=2)


def _trading(random: Random, day: date, *, adjoining: bool) -> tuple[date, Micros, Micros]:
    """Return trading sessions from midnight to midnight, or in the hours of the exchange, with early closes."""
    if adjoining:
        return day, _instant(day, time()), _instant(day + timedelta(days=1), time())
    closes = random.choice((time(16, 45), time(16, 45), time(12, 45), time(23, 59)))
    return day, _instant(day, random.choice((time(10), time(1, 30)))), _instant(day, closes)


def _session(random: Random, moment: Any, now: Micros) -> Recorded:
    """Return a session with its times mostly in order, and any of them null."""
    times = sorted(moment() for _ in range(5)) if random.random() < 0.8 else [moment() for _ in range(5)]
    connected, authenticated, message, covered, ended = times
    seen = now - random.choice((-61, -60, 0, 5, 60, 61, 61, 4000)) * SECOND

    def maybe(value: Any, chance: float = 0.15) -> Any:
        return None if random.random() < chance else value

    has_ended = random.random() < 0.5
    return Recorded(
        id=_identity(random),
        kind="replay" if random.random() < 0.1 else "stream",
        connected_at=connected,
        authenticated_at=maybe(-INFINITY if random.random() < 0.02 else random.choice((connected, authenticated)), 0.2),
        covered_until=maybe(INFINITY if random.random() < 0.03 else covered),
        last_tick_at=maybe(random.choice((message, covered, -INFINITY if random.random() < 0.1 else covered))),
        last_seen_at=maybe(seen),
        ended_at=ended if has_ended else None,
        end_reason=maybe(random.choice([*CAUSES, "stall", "crashed"])) if has_ended or random.random() < 0.1 else None,
    )


def _probes(random: Random, world: World) -> list[Micros]:
    """Return minutes in which something begins or ends, those beside them, and some others."""
    edges = [at for each in world.sessions for at in (each.authenticated_at, each.covered_until, each.last_tick_at)]
    edges += [at for _, at in world.rejections] + [opens for _, opens, _ in world.calendar] + [world.now]
    found = {
        (at // MINUTE + beside) * MINUTE
        for at in edges
        if at is not None and abs(at) < INFINITY
        for beside in (-1, 0, 1)
    }
    return sorted(random.sample(sorted(found), min(len(found), 40)))


def _instant(day: date, at: time) -> Micros:
    return from_datetime(datetime.combine(day, at, ZONE))


def _identity(random: Random) -> UUID:
    return UUID(int=random.getrandbits(128))


def as_json(world: World) -> str:
    """Return a set as `pg_temp.evaluate` reads it."""
    plain = {name: getattr(world, name) for name in World.__dataclass_fields__}
    plain["sessions"] = [[getattr(each, name) for name in Recorded.__dataclass_fields__] for each in world.sessions]
    return json.dumps(plain, default=str)


def check(expected: Answer, found: dict[str, Any]) -> None:
    """Compare one set; percentages to a hundredth, since the view rounds down."""
    gaps = sorted(Gap(start, end, date.fromisoformat(day), cause, status)
                  for start, end, day, cause, status in found["gaps"] or [])  # fmt: skip
    assert gaps == expected.gaps
    days = {date.fromisoformat(row[0]): row[1:] for row in found["days"] or []}
    assert set(days) == set(expected.days)
    for day, (*minutes, percent) in days.items():
        its = expected.days[day]
        for mine, theirs in zip((its.trading, its.covered, its.missing, its.backfilled), minutes, strict=True):
            assert math.isclose(mine / MINUTE, theirs, abs_tol=2e-6)
        assert (percent is None) == (its.percent is None)
        assert percent is None or -1e-9 <= float(its.percent or 0) - percent < 0.01 + 1e-9
    conditions = {date.fromisoformat(row[0]): row[1:] for row in found["conditions"] or []}
    assert {day: Condition(*row[:3]) for day, row in conditions.items()} == expected.conditions
    for day, (*_, percent, backfilled) in conditions.items():
        assert (percent, backfilled) == ((days[day][4], days[day][3]) if day in days else (None, 0))
    assert dict(found["bars"] or []) == expected.sources
    assert len(found["bars"] or []) == len(expected.sources)


async def test_the_views_agree_with_the_oracle(server: TestServer) -> None:
    """Gaps, coverage and bars agree for overlaps, stalls, crashes, live and lost sessions, nulls and wrong clocks."""
    name = server.new_name()
    connection = await connect(await server.create(name, server.template))
    await connection.execute("SET jit = off")  # as for analysts: compiling takes longer than these queries
    try:
        for first in range(0, SETS, AT_ONCE):
            seeds = range(first, min(first + AT_ONCE, SETS))
            async with connection.transaction():
                now = from_datetime(await connection.fetchval("SELECT now()"))
                worlds = [random_world(seed, now) for seed in seeds]
                await connection.execute(EVALUATE)
                rows = await connection.fetch(
                    "SELECT pg_temp.evaluate(world) FROM unnest($1::jsonb[]) AS world",
                    [as_json(each) for each in worlds],
                )
                await connection.execute(FORGET)
            for seed, world, row in zip(seeds, worlds, rows, strict=True):
                try:
                    check(answer(world), json.loads(row[0]))
                except AssertionError as difference:
                    raise AssertionError(f"set {seed}: {world}\n{difference}") from None
    finally:
        await connection.close()
        await server.drop(name)
