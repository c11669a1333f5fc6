"""Compares the simulator's ticks with the database's rows and the coverage that it claims."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from pathlib import Path
from uuid import UUID

from ingestor.clock import from_datetime
from ingestor.model import SECOND, Micros, Tick
from ingestor.simulator.server import Account
from tests.servers import query

Key = tuple[str, Micros, float, int]

_SESSIONS = """
SELECT id, instance, lower(span), upper(span) FROM ingest.covered JOIN ingest.stream_sessions USING (id)
WHERE NOT isempty(span) ORDER BY authenticated_at
"""
_COUNTS = """
SELECT sum(ticks - duplicates)::bigint, (SELECT count(*) FROM market.ticks),
       sum(rejected)::bigint, (SELECT count(*) FROM ingest.rejected_messages) FROM ingest.stream_sessions
"""
_ROWS = """
SELECT symbol, (extract(epoch FROM time) * 1000000)::bigint, price, volume, count(*), max(occurrence)
FROM market.ticks GROUP BY 1, 2, 3, 4
"""


@dataclass(frozen=True)
class Skew:
    """The sessions of a daemon whose clock was `seconds` ahead, or behind."""

    sessions: frozenset[UUID]
    seconds: float

    @classmethod
    def of(cls, log: Path, seconds: float) -> Skew:
        """Read from the daemon's log (JSON) which sessions it began."""
        lines = (json.loads(line) for line in log.read_bytes().splitlines() if line.startswith(b"{"))
        return cls(frozenset(UUID(line["session"]) for line in lines if line.get("event") == "connected"), seconds)


@dataclass(frozen=True)
class Verdict:
    """Ticks are counted by identity: of equal ticks, the most that were sent on any one connection."""

    sent: int
    stored: int
    lost_in_gaps: int
    lost_outside: int
    twice: int
    covered: float
    """Share of the ticks that were sent while a session claims full coverage."""
    claims: tuple[str, ...]
    """Claims of ticks that were never sent to that session, or without a connection; wrong counts."""

    @property
    def holds(self) -> bool:
        """Whether the promise was kept."""
        return not (self.lost_outside or self.twice or self.claims)

    def __add__(self, other: Verdict) -> Verdict:
        sent = self.sent + other.sent
        return Verdict(
            sent,
            self.stored + other.stored,
            self.lost_in_gaps + other.lost_in_gaps,
            self.lost_outside + other.lost_outside,
            self.twice + other.twice,
            (self.covered * self.sent + other.covered * other.sent) / sent if sent else 0.0,
            self.claims + other.claims,
        )


def key(tick: Tick) -> Key:
    return tick.symbol, tick.time, tick.price, tick.volume


async def audit(
    url: str,
    accounts: dict[str, list[Account]],
    made_at: Sequence[Micros],
    *,
    margin: float,
    skews: Sequence[Skew] = (),
) -> Verdict:
    """Compare a database with the simulator's accounts of each instance's connections.

    `made_at` are the moments of all ticks, with or without a connection. `margin` (seconds) is the uncertain end of the
    coverage: latency, and pauses too short to be noticed. Claims of sessions in `skews` come from a wrong clock, and
    are shifted to the right time.
    """
    skewed = {session: round(skew.seconds * SECOND) for skew in skews for session in skew.sessions}
    sessions = await query(url, _SESSIONS)
    rows = {row[:4]: (row[4], row[5]) for row in await query(url, _ROWS)}
    sent: Counter[Key] = Counter()
    for each in chain.from_iterable(accounts.values()):
        sent |= Counter(map(key, [*each.ticks, *each.replayed]))
    required: Counter[Key] = Counter()
    claims: list[str] = []
    covered: list[tuple[Micros, Micros]] = []
    for session, instance, authenticated_at, covered_until in sessions:
        skew = skewed.get(session, 0)
        begin, end = _micros(authenticated_at) - skew, _micros(covered_until) - skew - round(margin * SECOND)
        account = _account_of(accounts[instance], begin)
        if account is None:
            claims.append(f"{instance} covers {authenticated_at} without a connection")
            continue
        required |= Counter(map(key, account.ticks[: bisect_right(account.sent_at, end)]))
        made = bisect_right(made_at, end) - bisect_left(made_at, begin)
        received = bisect_right(account.sent_at, end) - bisect_left(account.sent_at, begin)
        if not account.muted and received < made:
            claims.append(
                f"{instance} covers {authenticated_at} to {covered_until}: {made} ticks sent, {received} of them to it"
            )
        covered.append((begin, end))
    claims += await _miscounts(url)
    outside = sum((required - Counter({name: count for name, (count, _) in rows.items()})).values())
    lost = sum(max(0, count - rows.get(name, (0, 0))[0]) for name, count in sent.items())
    # A number below the highest may be missing if the database has lost its row; none may exceed the number sent.
    twice = sum(max(0, count - sent[name], highest - sent[name]) for name, (count, highest) in rows.items())
    return Verdict(
        sent=sent.total(),
        stored=sum(count for count, _ in rows.values()),
        lost_in_gaps=lost - outside,
        lost_outside=outside,
        twice=twice,
        covered=_share(made_at, covered),
        claims=tuple(claims),
    )


async def _miscounts(url: str) -> list[str]:
    """Return where the sessions' counts differ from the rows: a batch must also be counted once."""
    ((ticks, rows, rejected, kept),) = await query(url, _COUNTS)
    found = []
    if ticks != rows:
        found.append(f"the sessions count {ticks} new ticks, but {rows} are stored")
    if rejected != kept:
        found.append(f"the sessions count {rejected} rejections, but {kept} are stored")
    return found


def _account_of(accounts: Sequence[Account], authenticated_at: Micros) -> Account | None:
    """Return the last connection whose token the server accepted before the session's claim."""
    index = bisect_right([account.authenticated_at for account in accounts], authenticated_at)
    return accounts[index - 1] if index else None


def _share(moments: Sequence[Micros], ranges: Sequence[tuple[Micros, Micros]]) -> float:
    if not moments:
        return 0.0
    inside: set[int] = set()
    for begin, end in ranges:
        inside.update(range(bisect_left(moments, begin), bisect_right(moments, end)))
    return len(inside) / len(moments)


def _micros(moment: datetime) -> Micros:
    return from_datetime(moment)
