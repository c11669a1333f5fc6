"""Queries today's coverage once a minute, and checks schema and calendar once a day."""

from __future__ import annotations

import asyncio
import contextlib
import math
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from zoneinfo import ZoneInfo

from ingestor.clock import Clock
from ingestor.coverage.calendar import DAYS_AHEAD, RENEW
from ingestor.coverage.report import Day, Gap
from ingestor.redaction import outside_text
from ingestor.settings import Settings
from ingestor.store.gaps import Bounds, GapStore, OpenGaps
from ingestor.store.inspect import SchemaFacts, inspect, settings_drift
from ingestor.telemetry.events import Telemetry
from ingestor.telemetry.log import tell_left_out

LONGEST_BREAK = timedelta(days=8)
"""From one trading day to the next, at most: Easter and Christmas take less."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """What the database says of the last trading day that has begun, and of the gaps of all days."""

    as_of: datetime
    day: Day | None
    gaps: tuple[Gap, ...]
    open: OpenGaps


class CoverageMonitor:
    """Queries the database on its own connections, so that the writer never waits for it.

    It queries coverage every `coverage_interval` seconds, schema and calendar every `schema_interval` seconds.
    `coverage` is the last result: None before the first one, and when it is `max_age` seconds old.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Clock,
        telemetry: Telemetry,
        coverage_interval: float = 60.0,
        schema_interval: float = 86_400.0,
        max_age: float = 600.0,
    ) -> None:
        self._settings = settings
        self._url = settings.read_database_url()  # once: a file that is missing for a moment must not end a recorder
        self._clock = clock
        self._telemetry = telemetry
        self._coverage_interval = coverage_interval
        self._schema_interval = schema_interval
        self._max_age = max_age
        self._looked_at = self._judged_at = -math.inf
        self.coverage: Coverage | None = None

    async def run(self, writes: asyncio.Event) -> None:
        """Look now and then, from when the database has answered the writer (`writes`); ends by being cancelled."""
        while not writes.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._coverage_interval):
                    await writes.wait()
            tell_left_out()
        while True:
            await self._look()
            tell_left_out()
            await self._pause()

    async def _pause(self) -> None:
        """Wait for a minute, or until the database has recovered: after an outage the last answer is out of date."""
        recovered = self._telemetry.database_recovered
        waiting = [
            asyncio.create_task(self._clock.sleep(self._coverage_interval)),
            asyncio.create_task(recovered.wait()),
        ]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        recovered.clear()

    async def _look(self) -> None:
        """Look once. What was found long ago is forgotten: it would be shown as if it were so now."""
        now = self._clock.monotonic()
        try:
            await self._look_at_coverage()
            self._looked_at = now
            if now - self._judged_at >= self._schema_interval and await self._look_at_schema():
                self._judged_at = now
        except Exception as error:  # noqa: BLE001 - what is only shown must never end a recorder
            self._telemetry.coverage_query_failed(outside_text(error))
            if now - self._looked_at >= self._max_age:
                self.coverage = None

    async def _look_at_schema(self) -> bool:
        facts = await inspect(self._url, timeout=self._settings.write_timeout)
        if facts.schema is None:
            return False
        self._judge(facts.schema, facts.now.date())
        return True

    def _judge(self, facts: SchemaFacts, today: date) -> None:
        """Say where the database's views were told something else than the environment says, and what runs out."""
        for difference in settings_drift(self._settings, facts):
            self._telemetry.warned("settings_mismatch", detail=difference)
        self._telemetry.calendar_known(days=facts.days_left(today), warn_below=DAYS_AHEAD, remedy=RENEW)

    async def _look_at_coverage(self) -> None:
        seconds = self._settings.write_timeout
        async with GapStore(self._url, timeout=seconds, patience=seconds) as gap_store:
            today = (await gap_store.now()).astimezone(ZoneInfo(self._settings.exchange_timezone)).date()
            report = await gap_store.report(Bounds(since=today - LONGEST_BREAK))
            found = await gap_store.open_gaps()
        day = report.days[-1] if report.days else None  # the report has none that is still to come
        gaps = tuple(gap for gap in report.gaps if day is not None and gap.trading_day == day.trading_day)
        self.coverage = Coverage(report.made_at, day, gaps, found)
