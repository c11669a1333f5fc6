"""Estimates the database's clock."""

from __future__ import annotations

from collections.abc import Callable

import asyncpg

from ingestor.clock import UNCOMPARED, Clock, ClockDifference, SessionClock, from_datetime
from ingestor.model import SECOND, Micros

COMPARE_AGAIN = 3600.0
"""Seconds after which the clocks are compared once more on a connection that stands."""


async def compare_clocks(connection: asyncpg.Connection, clock: Clock) -> ClockDifference:
    """Return how far the clocks are apart.

    The server looked at its clock at some moment of the round trip: half of that is what the answer may be wrong by.
    """
    ours, began = clock.wall(), clock.monotonic()
    theirs = from_datetime(await connection.fetchval("SELECT clock_timestamp()"))
    half = round((clock.monotonic() - began) * SECOND / 2)
    return ClockDifference(ours + half - theirs, half)


class DatabaseClock:
    """Remembers how far the clocks were apart when they were compared last; `on_comparison` hears of each time."""

    def __init__(self, clock: Clock, on_comparison: Callable[[ClockDifference], None] | None = None) -> None:
        self._clock = clock
        self._on_comparison = on_comparison
        self._compared = SessionClock(clock)
        self._compare_at = clock.monotonic()
        self.difference = UNCOMPARED

    @property
    def is_due(self) -> bool:
        """Whether they should be compared: this machine's was set since, or it is long ago."""
        return self._compared.has_stepped() or self._clock.monotonic() >= self._compare_at

    async def compare(self, connection: asyncpg.Connection) -> None:
        """Compare them."""
        self.difference = await compare_clocks(connection, self._clock)
        self._compared = SessionClock(self._clock)
        self._compare_at = self._clock.monotonic() + COMPARE_AGAIN
        if self._on_comparison is not None:
            self._on_comparison(self.difference)

    def now(self) -> Micros:
        """Return what the database's clock shows."""
        return self._clock.wall() - self.difference.ahead
