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
    """The lead of this machine's clock over the database's (negative: lag), plus or minus `error`."""

    ahead: Duration
    error: Duration

    @property
    def is_large(self) -> bool:
        """Whether one of the two clocks is certainly wrong."""
        return abs(self.ahead) - self.error > DIFFERENCE_TOLERANCE

    @property
    def most_ahead(self) -> Duration:
        """The largest possible lead of this clock if it is certainly ahead; else 0."""
        return self.ahead + self.error if self.is_large and self.ahead > 0 else 0

    @property
    def most_behind(self) -> Duration:
        """The largest possible lag of this clock if it is certainly behind; else 0."""
        return self.error - self.ahead if self.is_large and self.ahead < 0 else 0

    @property
    def shift(self) -> Duration:
        """The correction from this clock to the database's if the difference is large; else 0."""
        return -self.ahead if self.is_large else 0

    def __str__(self) -> str:
        seconds, error = abs(self.ahead) / SECOND, self.error / SECOND
        way = "ahead of" if self.ahead > 0 else "behind"
        return f"this machine's clock is {seconds:.3f} s {way} the database's (give or take {error:.3f} s)"


UNCOMPARED = ClockDifference(0, 0)
"""The difference assumed until the clocks are compared."""


class Clock(Protocol):
    """Two clocks and a way to wait."""

    def wall(self) -> Micros:
        """Return the time of day, UTC. It can be set, so it can jump."""
        ...

    def monotonic(self) -> float:
        """Return seconds since a fixed instant. It never jumps, and stops while the machine sleeps."""
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

    The instants of a session stay in order when the wall clock is set, and `has_stepped` detects the step.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last = self._anchor = clock.wall() - round(clock.monotonic() * SECOND)

    def now(self) -> Micros:
        """Return the current instant."""
        return self._anchor + round(self._clock.monotonic() * SECOND)

    def stamp(self, count: int = 1) -> Micros:
        """Return the current instant for a message: later than every stamp before it.

        Of `count` messages read at once, this is the first one's; each further message is a microsecond later.
        """
        first = max(self.now(), self._last + 1)
        self._last = first + count - 1
        return first

    def has_stepped(self) -> bool:
        """Whether the wall clock was set since the session began (or the machine slept)."""
        return abs(self._clock.wall() - self.now()) > STEP_THRESHOLD
