"""Clocks that the tests advance."""

from __future__ import annotations

import asyncio
from heapq import heappop, heappush
from itertools import count

from ingestor.clock import SystemClock
from ingestor.model import SECOND, Micros

HANG_SECONDS = 60.0
"""Seconds after which a test takes what it waits for to hang: far above any wait, also on a busy machine."""


class ManualClock:
    """A `Clock` for tests that `sleep` and `advance` move."""

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
        """Advance the time."""
        self._monotonic += seconds
        self._wall += round(seconds * SECOND)

    def step(self, seconds: float) -> None:
        """Set the wall clock."""
        self._wall += round(seconds * SECOND)


class SkewedClock(SystemClock):
    """The machine's clocks with a wrong wall clock: so many seconds ahead, or behind (negative)."""

    def __init__(self, seconds: float) -> None:
        self.skew = round(seconds * SECOND)

    def wall(self) -> Micros:
        return super().wall() + self.skew


class SteppedClock(ManualClock):
    """A clock for whole daemons: only `advance` moves it, and wakes sleepers in the order of their times."""

    def __init__(self, wall: Micros) -> None:
        super().__init__(wall)
        self._numbers = count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    async def sleep(self, seconds: float) -> None:
        woken = asyncio.get_running_loop().create_future()
        heappush(self._sleepers, (self.monotonic() + seconds, next(self._numbers), woken))
        if seconds <= 0:
            self.advance(0)
        await woken

    def advance(self, seconds: float) -> None:
        super().advance(seconds)
        while self._sleepers and self._sleepers[0][0] <= self.monotonic():
            _, _, woken = heappop(self._sleepers)
            if not woken.done():
                woken.set_result(None)
