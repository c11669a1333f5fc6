"""A clock that moves when it is told to."""

from __future__ import annotations

from ingestor.model import SECOND, Micros


class ManualClock:
    """A `Clock` for tests: `sleep` moves it, and so does `advance`."""

    def __init__(self, wall: Micros = 1_790_000_000 * SECOND) -> None:
        self._wall = wall
        self._monotonic = 1000.0

    def wall(self) -> Micros:
        return self._wall

    def monotonic(self) -> float:
        return self._monotonic

    async def sleep(self, seconds: float) -> None:
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._monotonic += seconds
        self._wall += round(seconds * SECOND)

    def step(self, seconds: float) -> None:
        """Set the wall clock."""
        self._wall += round(seconds * SECOND)
