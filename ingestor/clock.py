"""Time: the clocks that the process reads, and the conversion between `Micros` and `datetime`.

All other code is given a `Clock`, so that tests need not wait.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

from ingestor.model import SECOND, Duration, Micros

STEP_THRESHOLD: Duration = SECOND
"""If the wall clock and the monotonic clock diverge by more than this, the wall clock was set."""

DIFFERENCE_TOLERANCE: Duration = SECOND
"""If the clocks of two machines differ by more than this, one of them is wrong."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_datetime(instant: Micros) -> datetime:
    """Return an instant as an exact UTC `datetime`. Raises OverflowError beyond the years 1 to 9999."""
    return _EPOCH + timedelta(microseconds=instant)


def from_datetime(moment: datetime) -> Micros:
    """Return the exact instant of a `datetime` that has a time zone."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class ClockDifference:
    """By how much this machine's clock is ahead of the database's (negative: behind), give or take `error`."""

    ahead: Duration
    error: Duration

    @property
    def is_large(self) -> bool:
        """Whether one of the two clocks is wrong for sure."""
        return abs(self.ahead) - self.error > DIFFERENCE_TOLERANCE

    @property
    def most_ahead(self) -> Duration:
        """By how much this clock may be ahead, where it is so for sure; else 0."""
        return self.ahead + self.error if self.is_large and self.ahead > 0 else 0

    @property
    def most_behind(self) -> Duration:
        """By how much this clock may be behind, where it is so for sure; else 0."""
        return self.error - self.ahead if self.is_large and self.ahead < 0 else 0

    @property
    def shift(self) -> Duration:
        """What to add to an instant of this clock to have it by the database's, where that matters; else 0."""
        return -self.ahead if self.is_large else 0

    def __str__(self) -> str:
        seconds, error = abs(self.ahead) / SECOND, self.error / SECOND
        way = "ahead of" if self.ahead > 0 else "behind"
        return f"this machine's clock is {seconds:.3f} s {way} the database's (give or take {error:.3f} s)"


UNCOMPARED = ClockDifference(0, 0)
"""What is assumed before two clocks were compared."""


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
        return abs(self._clock.wall() - self.now()) > STEP_THRESHOLD
