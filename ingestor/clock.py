"""Time, where it enters the process: everything else is given a `Clock`, so that tests need not wait."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from ingestor.model import SECOND, Micros

STEP: Micros = SECOND
"""When the wall clock and the monotonic clock part by more, somebody has set the wall clock."""


class Clock(Protocol):
    """Two clocks and a way to wait."""

    def wall(self) -> Micros:
        """Return the time of day, UTC. It can be set, so it can jump."""
        ...

    def monotonic(self) -> float:
        """Return seconds since some instant. It never jumps, and stands still while the machine sleeps."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def wall(self) -> Micros:
        """Return the time of day, UTC."""
        return time.time_ns() // 1000

    def monotonic(self) -> float:
        """Return seconds since the machine started."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)


class SessionClock:
    """The time of one session: anchored once to the wall clock, then carried by the monotonic one.

    So the instants of a session are in order whatever happens to the wall clock, and a step is noticed.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last = self._anchor = clock.wall() - round(clock.monotonic() * SECOND)

    def now(self) -> Micros:
        """Return the current instant."""
        return self._anchor + round(self._clock.monotonic() * SECOND)

    def stamp(self, count: int = 1) -> Micros:
        """Return the current instant for a message: later than every stamp before it.

        Of `count` messages that were read at once it is that of the first; each of the others is a microsecond later.
        """
        first = max(self.now(), self._last + 1)
        self._last = first + count - 1
        return first

    def has_stepped(self) -> bool:
        """Whether the wall clock was set since the session began (or the machine slept)."""
        return abs(self._clock.wall() - self.now()) > STEP
