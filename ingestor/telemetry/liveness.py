"""Liveness: each loop sets a deadline for its next step; a loop that misses it is stuck."""

from __future__ import annotations

import math

from ingestor.clock import Clock

LIVENESS_GRACE_SECONDS = 30.0
"""A loop counts as stuck so long after its deadline: the machine may be busy."""

LIVENESS_STEP_SECONDS = 60.0
"""The default time for one step of a loop's work."""


class LivenessDeadline:
    """The deadline of one loop, whose steps take at most `step_seconds`; it has none while it waits for others."""

    def __init__(self, clock: Clock, step_seconds: float = LIVENESS_STEP_SECONDS) -> None:
        self._clock = clock
        self._step_seconds = step_seconds
        self._due = math.inf

    def expect_within(self, seconds: float) -> None:
        """Set the deadline to `seconds` from now."""
        self._due = self._clock.monotonic() + seconds

    def extend(self) -> None:
        """Set the deadline for one more step of work."""
        self.expect_within(self._step_seconds)

    def clear(self) -> None:
        """Remove the deadline before a wait for others."""
        self._due = math.inf

    @property
    def is_stuck(self) -> bool:
        """Whether the deadline passed more than `LIVENESS_GRACE_SECONDS` ago."""
        return self._clock.monotonic() > self._due + LIVENESS_GRACE_SECONDS
