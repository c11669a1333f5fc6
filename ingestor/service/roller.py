"""Stores the bars of closed minutes while the daemon records."""

from __future__ import annotations

import asyncio
from typing import Protocol

from ingestor.clock import Clock
from ingestor.redaction import outside_text
from ingestor.settings import Settings
from ingestor.store.rollup import Rollup, RollupSize
from ingestor.telemetry.events import Telemetry

STEP_SECONDS = 10.0
"""Time limit of one transaction. A slower one is cancelled, and the next one stores less."""


class Backlog(Protocol):
    """A place in which batches wait for the database."""

    @property
    def spooled_batches(self) -> int:
        """How many wait because the database did not keep up."""


class Roller:
    """Runs the rollup every `interval` seconds on connections of its own, so that the writer never waits for it.

    It pauses while batches wait in the spool: their ticks would make stored bars stale.
    """

    def __init__(
        self, settings: Settings, *, buffer: Backlog, clock: Clock, telemetry: Telemetry, interval: float = 60.0
    ) -> None:
        self._url = settings.read_database_url()
        self._buffer = buffer
        self._clock = clock
        self._telemetry = telemetry
        self._interval = interval
        self._rollup: Rollup | None = None
        self._size = RollupSize()
        self._is_closing = False

    async def run(self, writes: asyncio.Event) -> None:
        """Store bars once the database has answered the writer (`writes`), then at each interval, until cancelled."""
        await writes.wait()
        while True:
            try:
                await self._roll_up()
            except Exception as error:  # noqa: BLE001 - bars can be stored later, and must never end the daemon
                if not self._is_closing:
                    self._telemetry.rollup_failed(outside_text(error))
            await self._clock.sleep(self._interval)

    async def give_up(self) -> None:
        """End the work at once. To be cancelled it would wait for a server that may hang."""
        self._is_closing = True
        if self._rollup is not None:
            await self._rollup.give_up()

    def _is_behind(self) -> bool:
        """Whether ticks wait in the spool."""
        return self._buffer.spooled_batches > 0

    async def _roll_up(self) -> None:
        if self._is_behind():
            return
        self._rollup = Rollup(self._url, timeout=STEP_SECONDS, size=self._size)
        async with self._rollup as rollup:
            async for step in rollup.steps():
                self._telemetry.rolled_up(bars=step.bars, repaired=step.repaired)
                if self._is_behind() or self._is_closing:
                    return
