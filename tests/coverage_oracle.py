"""The expected rows of the views of coverage, computed slowly: each moment between two events is examined by itself.

Written from the definitions in docs/explanation/coverage.md, without a range or a subtraction. Instants and lengths are
microseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date
from fractions import Fraction
from itertools import pairwise
from uuid import UUID
from zoneinfo import ZoneInfo

from ingestor.clock import to_datetime
from ingestor.model import SECOND, Micros

ZONE = ZoneInfo("Pacific/Auckland")
MINUTE: Micros = 60 * SECOND
INFINITY: Micros = 10**18
"""Stands for `infinity`."""

CAUSES = {
    "stopped": "the daemon was stopped",
    "closed": "the connection was closed or cut",
    "keepalive": "the server did not answer a ping",
    "stall": "connected, but mute in trading hours",
    "commits_lost": "the database lost what it had acknowledged",
    "not_authorised": "the server refused the token",
    "crashed": "the process died without a word",
}


@dataclass(frozen=True)
class Recorded:
    """A row of `ingest.stream_sessions`."""

    id: UUID
    kind: str
    connected_at: Micros
    authenticated_at: Micros | None
    covered_until: Micros | None
    last_tick_at: Micros | None
    last_seen_at: Micros | None
    ended_at: Micros | None
    end_reason: str | None


@dataclass(frozen=True)
class World:
    """The input of the views. Trading sessions (day, opening, close) are in order and do not overlap."""

    now: Micros
    since: Micros | None
    lead: Micros
    tail: Micros
    margin: Micros
    stall: Micros
    calendar: list[tuple[date, Micros, Micros]]
    sessions: list[Recorded]
    exclusions: list[tuple[Micros, Micros, str]]
    backfills: list[tuple[Micros, Micros, str, str]]
    """From, until, symbol, status."""
    rejections: list[tuple[UUID, Micros]]
    probes: list[Micros]
    """Starts of minutes that have both a tick and a fetched bar."""


@dataclass(frozen=True, order=True)
class Gap:
    """A row of `market.gaps`."""

    started_at: Micros
    ended_at: Micros
    day: date
    cause: str
    status: str


@dataclass
class Minutes:
    """A row of `market.coverage`, in microseconds."""

    trading: Micros = 0
    covered: Micros = 0
    missing: Micros = 0
    backfilled: Micros = 0

    @property
    def percent(self) -> Fraction | None:
        """The exact percentage, not rounded."""
        return Fraction(100 * (self.covered + self.backfilled), self.trading) if self.trading else None


@dataclass(frozen=True)
class Condition:
    """A row of `market.condition`."""

    condition: str
    ticks: int
    rejected: int


@dataclass
class Answer:
    """The expected rows. `sources` are those of the bars of the minutes in `probes`."""

    gaps: list[Gap] = field(default_factory=list)
    days: dict[date, Minutes] = field(default_factory=dict)
    ends: dict[date, Micros] = field(default_factory=dict)
    """When the trading time of each day ends, so far."""
    conditions: dict[date, Condition] = field(default_factory=dict)
    sources: dict[Micros, str] = field(default_factory=dict)


def answer(world: World) -> Answer:
    """Examine each moment in turn."""
    found = Answer()
    moments = sorted(_events(world))
    pieces: list[tuple[Micros, Micros, date, str]] = []
    for start, end in pairwise(moments):
        day = _trading_day(world, start)
        if day is None:
            continue
        minutes = found.days.setdefault(day, Minutes())
        found.ends[day] = end
        if any(start < _expected_until(world, each) and start >= _begin(each) for each in _covering(world)):
            minutes.trading += end - start
            minutes.covered += end - start
            continue
        status = _status(world, start)
        if status != "excluded":
            minutes.trading += end - start
            minutes.missing += end - start
            minutes.backfilled += (end - start) * (status == "backfilled")
        if pieces and pieces[-1][1:] == (start, day, status):
            pieces[-1] = (pieces[-1][0], end, day, status)
        else:
            pieces.append((start, end, day, status))
    found.gaps = sorted(Gap(start, end, day, _cause(world, start, end, status), status)
                        for start, end, day, status in pieces)  # fmt: skip
    found.conditions = {day: _condition(world, found, day) for day in {*found.days, *map(_date, world.probes)}}
    found.sources = {minute: "stream" if _is_fully_covered(world, minute) else "backfill" for minute in world.probes}
    return found


def _events(world: World) -> set[Micros]:
    found = {world.now, _record_ends(world)}
    if (since := _record_begins(world)) is not None:
        found.add(since)
    for _, opens, closes in world.calendar:
        found |= {opens - world.lead, opens, closes, closes + world.tail}
    for each in _covering(world):
        found |= {_begin(each), _expected_until(world, each)}
    found |= {at for span in world.exclusions for at in span[:2]}
    found |= {at for span in world.backfills for at in span[:2]}
    return found


def _record_begins(world: World) -> Micros | None:
    accepted = [each.authenticated_at for each in world.sessions if each.kind == "stream"]
    known = [at for at in accepted if at is not None]
    return world.since if world.since is not None else min(known, default=None)


def _record_ends(world: World) -> Micros:
    return world.now - 30 * SECOND


def _trading_day(world: World, at: Micros) -> date | None:
    """Return the day whose trading time contains a moment: the tail of one session precedes the lead of the next."""
    begins = _record_begins(world)
    if begins is None or not begins <= at < _record_ends(world):
        return None
    for number, (day, opens, closes) in enumerate(world.calendar):
        following = world.calendar[number + 1][1] if number + 1 < len(world.calendar) else INFINITY
        if opens - world.lead <= at < closes + world.tail and at < following:
            return day
    return None


def _is_alive(world: World, each: Recorded) -> bool:
    return each.ended_at is None and each.last_seen_at is not None and abs(each.last_seen_at - world.now) <= 60 * SECOND


def _covering(world: World) -> list[Recorded]:
    """Return the sessions that cover something, or may yet."""
    return [
        each
        for each in world.sessions
        if each.kind == "stream" and each.authenticated_at is not None and each.covered_until is not None
    ]


def _begin(each: Recorded) -> Micros:
    assert each.authenticated_at is not None
    return each.authenticated_at


def _last_tick(each: Recorded) -> Micros:
    return _begin(each) if each.last_tick_at is None else max(_begin(each), each.last_tick_at)


def _covered_until(world: World, each: Recorded) -> Micros:
    """Return the end of a session's coverage; if that is not after its beginning, it covers nothing."""
    assert each.covered_until is not None
    until = min(each.covered_until, world.now)
    if _is_alive(world, each):
        return until
    if each.end_reason == "stall" or (each.end_reason in {None, "crashed"} and _has_stalled(world, each, until)):
        until = min(until, _last_tick(each))
    return until


def _has_stalled(world: World, each: Recorded, until: Micros) -> bool:
    """Return whether a session that did not report it received nothing for too long while the market was open."""
    return any(min(until, closes) - max(_last_tick(each), opens) > world.stall for _, opens, closes in world.calendar)


def _expected_until(world: World, each: Recorded) -> Micros:
    until = _covered_until(world, each)
    return max(until, world.now) if _is_alive(world, each) else until


def _status(world: World, at: Micros) -> str:
    if any(begin <= at < end for begin, end, _ in world.exclusions):
        return "excluded"
    settled = {status for begin, end, symbol, status in world.backfills if symbol == "*" and begin <= at < end}
    return next((status for status in ("backfilled", "partial", "unfillable") if status in settled), "open")


def _cause(world: World, start: Micros, end: Micros, status: str) -> str:
    over = [
        each for each in _covering(world) if not _is_alive(world, each) and _covered_until(world, each) > _begin(each)
    ]
    ended = [(_covered_until(world, each), each.id, each) for each in over if _covered_until(world, each) <= start]
    cause = CAUSES[max(ended)[2].end_reason or "crashed"] if ended else "nothing was recording yet"
    refused = [
        (each.connected_at, each.id, each)
        for each in world.sessions
        if each.kind == "stream" and each.authenticated_at is None and not _is_alive(world, each)
        and each.connected_at <= end
    ]  # fmt: skip
    if refused and max(refused)[0] > start:
        cause += f"; then {CAUSES[max(refused)[2].end_reason or 'crashed']}"
    if status == "excluded":
        reasons = [why for begin, until, why in sorted(world.exclusions) if begin < end and until > start]
        cause += f"; excluded: {', '.join(reasons)}"
    return cause


def _date(at: Micros) -> date:
    return to_datetime(at).astimezone(ZONE).date()


def _condition(world: World, found: Answer, day: date) -> Condition:
    """Decide a day's condition; each minute in `probes` has one tick."""
    ticks = sum(_date(minute) == day for minute in world.probes)
    replays = {each.id for each in world.sessions if each.kind == "replay"}
    rejected = sum(_trading_day(world, at) == day for session, at in world.rejections if session not in replays)
    minutes = found.days.get(day)
    if minutes is None:
        return Condition("pending" if day >= _date(world.now) else "degraded", ticks, rejected)
    if _is_pending(world, found, day):
        return Condition("pending", ticks, rejected)
    if minutes.trading and minutes.missing == minutes.trading and not minutes.backfilled and not ticks:
        return Condition("missing", ticks, rejected)
    is_whole = minutes.missing == minutes.backfilled and not rejected
    return Condition("available" if is_whole else "degraded", ticks, rejected)


def _is_pending(world: World, found: Answer, day: date) -> bool:
    end = found.ends[day]
    proofs = [max(_begin(each), _covered_until(world, each)) for each in _covering(world) if _is_alive(world, each)]
    asked = [(begin, until) for begin, until, symbol, status in world.backfills if (symbol, status) == ("*", "pending")]
    return (
        end >= _record_ends(world)
        or any(until < end for until in proofs)
        or any(
            gap.day == day and gap.status == "open" and begin < gap.ended_at and until > gap.started_at
            for gap in found.gaps
            for begin, until in asked
        )
    )


def _is_fully_covered(world: World, minute: Micros) -> bool:
    """Return whether a minute is covered with the margin on both sides, and has no rejection."""
    replays = {each.id for each in world.sessions if each.kind == "replay"}
    first, last = minute - world.margin, minute + MINUTE + world.margin
    if any(first <= at < last and session not in replays for session, at in world.rejections):
        return False
    at = first
    while at < last:
        reached = [_covered_until(world, each) for each in _covering(world) if _begin(each) <= at]
        if max(reached, default=at) <= at:
            return False
        at = max(reached)
    return True
