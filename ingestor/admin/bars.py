"""Stores the bars that are missing or stale, with a report of the progress. For a database without aggregates."""

from __future__ import annotations

import time
from collections.abc import Callable

from ingestor.store.rollup import Rollup, RollupStep

STEP_TIMEOUT = 60.0
"""Seconds for one transaction."""

REPORT_INTERVAL = 10.0
"""Seconds between two reports of progress."""


async def store_bars(
    url: str, report: Callable[[str], None], *, monotonic: Callable[[], float] = time.monotonic
) -> None:
    """Store bars until none is missing or stale; report what is done every `REPORT_INTERVAL` and at the end.

    Each step is a transaction, so an interrupted run goes on where it was. Raises StoreError.
    """
    bars = repaired = 0
    last = monotonic()
    async with Rollup(url, timeout=STEP_TIMEOUT, waits=True) as rollup:
        async for step in rollup.steps():
            bars += step.bars
            repaired += step.repaired
            if monotonic() - last >= REPORT_INTERVAL:
                last = monotonic()
                report(_progress(step, bars, repaired))
    if bars or repaired:
        report(f"Bars: {bars:,} one-minute bars stored, {repaired:,} stale minutes repaired.")


def _progress(step: RollupStep, bars: int, repaired: int) -> str:
    if step.until is None:
        return f"Bars: {repaired:,} stale minutes repaired so far."
    return f"Bars: stored until {step.until:%Y-%m-%d %H:%M} UTC, {bars:,} one-minute bars so far."
