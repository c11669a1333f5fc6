"""Recording from a relay: where to begin, and what its messages say of coverage. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto
from urllib.parse import urlencode

from ingestor.clock import from_datetime, to_datetime
from ingestor.model import SECOND, Duration, Micros, ResumePoint
from ingestor.settings import RELAY_QUERY

OVERLAP: Duration = 10 * SECOND
"""The record is asked for from so long before the time that is to be covered: clocks of two machines differ."""

FIRST_SPAN: Duration = 60 * SECOND
"""The first recording begins so long before now, so that it also begins in the past by the relay's clock."""


@dataclass(frozen=True, slots=True)
class UpstreamStart:
    """A request to a relay: all behind a cursor, the record since an arrival, or both. Coverage begins at `base`."""

    base: Micros
    cursor: str | None
    since: Micros | None

    def url(self, url: str) -> str:
        """Return a relay's address with this start as its query."""
        return f"{url.partition('?')[0]}?{self.query()}"

    def query(self) -> str:
        """Return the query of the relay's address."""
        options = {"meta": "1", "coverage": _text(self.base)}
        if self.cursor is not None:
            options["resume"] = self.cursor
        if self.since is not None:
            options["from"] = _text(self.since)
        return urlencode(options)

    @property
    def point(self) -> ResumePoint:
        """The place to continue at if nothing comes. A cursor would skip the gap that was asked for."""
        return ResumePoint(self.cursor if self.since is None else None, self.base)


def _text(instant: Micros) -> str:
    return to_datetime(instant).isoformat(timespec="microseconds").replace("+00:00", "Z")


def relay_address(url: str) -> tuple[str, Micros | None] | None:
    """Return a relay's address without its query, and from when on its record is wanted; None for another server."""
    address, _, query = url.partition("?")
    match = RELAY_QUERY.fullmatch(query)
    if match is None:
        return None
    return address, None if match[1] is None else from_datetime(datetime.fromisoformat(match[1]))


def choose_start(
    point: ResumePoint | None, gaps: Sequence[Micros], refused: Collection[str], first: Micros
) -> UpstreamStart:
    """Return where to begin: at the last point, or at the earliest of `gaps` if that is earlier.

    `gaps` are the starts of those that were not asked for yet, `refused` the cursors that the relay refused. Without a
    point the record is wanted from `first` on.
    """
    known = first if point is None else point.covered_until
    base = min([known, *gaps])
    cursor = None if point is None or point.cursor in refused else point.cursor
    since = base - OVERLAP if cursor is None or base < known else None
    return UpstreamStart(base, cursor, since)


class CoverageChange(Enum):
    """The change of a session by a message on coverage."""

    NOTHING = auto()
    BEGINS = auto()  # it covered nothing, and covers from `since` on
    EXTENDED = auto()
    NEXT = auto()  # it is over; the next one covers from `since` on: there is a hole, or an earlier one is closed
    WITHDRAWN = auto()  # it is over: its end was not covered after all


class UpstreamCoverage:
    """The time that the current session covers: from `since` (None: nothing) to `until`.

    `until` is also the place behind which coverage may begin again, without a hole.
    """

    def __init__(self, base: Micros) -> None:
        self.since: Micros | None = base
        self.until = base

    def stop(self) -> None:
        """Cover nothing until the relay reports more."""
        self.since = None

    def report(self, since: Micros, until: Micros) -> CoverageChange:
        """Apply the relay's report that its record is complete between two instants."""
        if self.since is None:
            if until <= self.until:
                return CoverageChange.NOTHING
            self.since, self.until = since, until
            return CoverageChange.BEGINS
        if since > self.until:
            self.since, self.until = since, until
            return CoverageChange.NEXT
        if since < self.since <= until:
            self.since, self.until = since, max(until, self.until)
            return CoverageChange.NEXT
        if until <= self.until:
            return CoverageChange.NOTHING
        self.until = until
        return CoverageChange.EXTENDED

    def withdraw(self, since: Micros, until: Micros) -> CoverageChange:
        """Apply the relay's report that its record is not complete between two instants, although it said so."""
        if self.since is None or not since < self.until <= until:
            return CoverageChange.NOTHING
        self.since, self.until = None, since
        return CoverageChange.WITHDRAWN
