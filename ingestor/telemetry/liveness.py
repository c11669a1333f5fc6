"""Liveness: each loop sets a deadline for its next step; a loop that misses it is stuck."""

from __future__ import annotations

import math

from ingestor.clock import Clock

GRACE = 30.0
"""Seconds past the deadline before a loop counts as stuck: the machine may be busy."""

PATIENCE = 60.0
"""Seconds that a step of work takes at most, unless something says otherwise. Beyond it, it hangs."""


class LivenessDeadline:
    """The deadline of one loop. A loop that waits for others, for as long as it takes, has none.

    `patience` is the time in seconds that a step of its work may take.
    """

    def __init__(self, clock: Clock, patience: float = PATIENCE) -> None:
        self._clock = clock
        self._patience = patience
        self._due = math.inf

    def expect_within(self, seconds: float) -> None:
        """Set the deadline to so many seconds from now."""
        self._due = self._clock.monotonic() + seconds

    def extend(self) -> None:
        """Set the deadline for one more step of work."""
        self.expect_within(self._patience)

    def clear(self) -> None:
        """Remove the deadline, before a wait for others."""
        self._due = math.inf

    @property
    def is_stuck(self) -> bool:
        """Whether the deadline has passed, with some grace."""
        return self._clock.monotonic() > self._due + GRACE
