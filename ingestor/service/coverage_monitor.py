"""Queries today's coverage and the relays once a minute, the schema's settings and calendar once a day."""

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
from ingestor.store.registry import RegisteredRelay
from ingestor.telemetry.events import Telemetry
from ingestor.telemetry.log import log_suppressed_lines

LONGEST_BREAK = timedelta(days=8)
"""The most time between two trading days; Easter and Christmas take less."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """The coverage and gaps of the last trading day that has begun, the open gaps of all days, and the relays."""

    as_of: datetime
    day: Day | None
    gaps: tuple[Gap, ...]
    open: OpenGaps
    relays: tuple[RegisteredRelay, ...]


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
        self._url = settings.read_database_url()  # once: a file that is missing for a moment must not end the daemon
        self._clock = clock
        self._telemetry = telemetry
        self._coverage_interval = coverage_interval
        self._schema_interval = schema_interval
        self._max_age = max_age
        self._queried_at = self._checked_at = -math.inf
        self.coverage: Coverage | None = None

    async def run(self, writes: asyncio.Event) -> None:
        """Query once the database has answered the writer (`writes`), then at each interval; runs until cancelled."""
        while not writes.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._coverage_interval):
                    await writes.wait()
            log_suppressed_lines()
        while True:
            await self._query()
            log_suppressed_lines()
            await self._pause()

    async def _pause(self) -> None:
        """Wait for the interval, or until the database recovers: after an outage the last result is out of date."""
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

    async def _query(self) -> None:
        """Query coverage, and the schema if due. On failures, drop a result that is too old to be shown."""
        now = self._clock.monotonic()
        try:
            await self._query_coverage()
            self._queried_at = now
            if now - self._checked_at >= self._schema_interval and await self._check_schema():
                self._checked_at = now
        except Exception as error:  # noqa: BLE001 - no failure of a display may end the daemon
            self._telemetry.coverage_query_failed(outside_text(error))
            if now - self._queried_at >= self._max_age:
                self.coverage = None

    async def _check_schema(self) -> bool:
        facts = await inspect(self._url, timeout=self._settings.write_timeout)
        if facts.schema is None:
            return False
        self._report_schema(facts.schema, facts.now.date())
        return True

    def _report_schema(self, facts: SchemaFacts, today: date) -> None:
        """Log settings that differ between environment and database, and the days left in the calendar."""
        for difference in settings_drift(self._settings, facts):
            self._telemetry.warned("settings_mismatch", detail=difference)
        self._telemetry.calendar_known(days=facts.days_left(today), warn_below=DAYS_AHEAD, remedy=RENEW)

    async def _query_coverage(self) -> None:
        seconds = self._settings.write_timeout
        async with GapStore(self._url, timeout=seconds, patience=seconds) as gap_store:
            today = (await gap_store.now()).astimezone(ZoneInfo(self._settings.exchange_timezone)).date()
            report = await gap_store.report(Bounds(since=today - LONGEST_BREAK))
            found = await gap_store.open_gaps()
            relays = await gap_store.relays()
        day = report.days[-1] if report.days else None  # the report has no future day
        gaps = tuple(gap for gap in report.gaps if day is not None and gap.trading_day == day.trading_day)
        self.coverage = Coverage(report.made_at, day, gaps, found, relays)
