"""Signs of life: each loop says when it will be heard of next, and who does not keep that is stuck."""

from __future__ import annotations

import math

from ingestor.clock import Clock

GRACE = 30.0
"""Seconds over what was promised: a busy machine is no stuck loop."""

PATIENCE = 60.0
"""Seconds that a step of work takes at most, unless something says otherwise. Beyond it, it hangs."""


class LivenessDeadline:
    """One loop's promise to be heard of again. A loop that waits for others, by right and for ever, promises nothing.

    `patience` is the time in seconds that a step of its work may take.
    """

    def __init__(self, clock: Clock, patience: float = PATIENCE) -> None:
        self._clock = clock
        self._patience = patience
        self._due = math.inf

    def expect_within(self, seconds: float) -> None:
        """Promise to be back within so many seconds."""
        self._due = self._clock.monotonic() + seconds

    def extend(self) -> None:
        """Promise to be done with the next step of work in time."""
        self.expect_within(self._patience)

    def clear(self) -> None:
        """Promise nothing: others must act first."""
        self._due = math.inf

    @property
    def is_stuck(self) -> bool:
        """Whether the promise was not kept, with some grace."""
        return self._clock.monotonic() > self._due + GRACE
