"""The last hour in steps: the ticks that arrived, and the delay of their commits."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median

HISTORY_STEP_SECONDS = 10.0

HISTORY_STEPS = 360
"""An hour of `HISTORY_STEP_SECONDS`."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step. Delays are seconds from a message's arrival to its commit: the median and the maximum."""

    ticks: int
    delay: float | None
    delay_max: float | None


class History:
    """Counts by steps of `step` seconds. Every `now` is in seconds and no earlier than the one before it."""

    def __init__(self, now: float, step: float = HISTORY_STEP_SECONDS) -> None:
        self.step = step
        self._steps: deque[Step] = deque(maxlen=HISTORY_STEPS)
        self._number = math.floor(now / self.step)
        self._ticks = 0
        self._delays: list[float] = []

    def add_ticks(self, count: int, now: float) -> None:
        """Count ticks that arrived."""
        self._advance(now)
        self._ticks += count

    def add_delay(self, seconds: float, now: float) -> None:
        """Record the seconds from the arrival of a commit's newest message to the commit."""
        self._advance(now)
        self._delays.append(seconds)

    def steps(self, now: float) -> list[Step]:
        """Return the completed steps, oldest first, `HISTORY_STEPS` at most."""
        self._advance(now)
        return list(self._steps)

    def _advance(self, now: float) -> None:
        number = math.floor(now / self.step)
        if number - self._number > HISTORY_STEPS:  # the current step is older than an hour
            self._ticks = 0
            self._delays.clear()
        for _ in range(min(number - self._number, HISTORY_STEPS)):
            self._steps.append(
                Step(self._ticks, median(self._delays), max(self._delays))
                if self._delays
                else Step(self._ticks, None, None)
            )
            self._ticks = 0
            self._delays.clear()
        self._number = max(number, self._number)
