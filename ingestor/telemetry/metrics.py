"""The metrics for Prometheus, collected at each scrape.

No label names a symbol. A value that is not known yet is absent instead of zero.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ingestor import __version__
from ingestor.model import SECOND, EndReason, Reason
from ingestor.telemetry.events import STREAM_STATES, Telemetry
from ingestor.telemetry.readiness import CHECKS
from ingestor.telemetry.standard_streams import lines_dropped

_SECONDS_PER_DAY = 86_400

_CAUSES = set(EndReason) - {EndReason.STOPPED, EndReason.FINISHED, EndReason.CRASHED}
"""Ends of a session after which the same process reconnects."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Current values that `Telemetry` does not have. None means not known yet."""

    exchange_open: bool
    buffer_bytes: int
    spool_bytes: int
    spool_max_bytes: int
    spool_batches: int
    open_gaps: int | None
    oldest_open_gap_seconds: float | None
    coverage_ratio: float | None


def new_registry(telemetry: Telemetry, facts: Callable[[], Facts]) -> CollectorRegistry:
    """Return a registry with all metrics of one daemon and of its process."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(_Counters(telemetry))
    registry.register(_Gauges(telemetry, facts))
    return registry


class _Counters(Collector):
    """Collects the counters and histograms."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    def collect(self) -> Iterator[Metric]:
        counts = self._telemetry.counts
        for name, text, value in (
            ("bars_stored", "One-minute bars stored by this process.", counts.bars_stored),
            ("bars_repaired", "Stale minutes whose bars this process stored again.", counts.bars_repaired),
            ("rollup_failures", "Failed attempts to store bars.", counts.rollup_failures),
            ("messages", "Messages received; each became a tick or a rejection.", counts.messages),
            (
                "ticks_written",
                "Ticks of this process's sessions that are committed, duplicates included.",
                counts.ticks_written,
            ),
            (
                "ticks_recovered",
                "Ticks committed from a spool that an earlier process left.",
                counts.ticks_recovered,
            ),
            ("duplicates", "Ticks committed that were in the database already.", counts.duplicates),
            ("sessions", "Connections that were opened.", counts.sessions),
            ("batches_written", "Batches committed.", counts.batches_written),
            ("write_failures", "Attempts to write that failed.", counts.write_failures),
            ("spools_damaged", "Spool files that could not be read and were set aside.", counts.spools_damaged),
            (
                "log_lines_dropped",
                "Log lines dropped because their reader was too slow or a write failed.",
                lines_dropped(),
            ),
        ):
            yield CounterMetricFamily(f"ingestor_{name}", text, value)
        rejections, reconnects = counts.rejected, counts.reconnects
        for name, label, text, known, by_label in (
            ("rejections", "reason", "Messages that were not stored as ticks, by reason.", Reason, rejections),
            ("reconnects", "cause", "Reconnections of the stream, by cause.", _CAUSES, reconnects),
        ):
            family = CounterMetricFamily(f"ingestor_{name}", text, labels=[label])
            # Known labels begin with 0, because Prometheus does not count the appearance of a 1 as an increase.
            for key, value in sorted((dict.fromkeys(known, 0) | by_label).items()):
                family.add_metric([key], value)
            yield family
        for histogram in self._telemetry.histograms:
            for distribution in histogram.collect():
                # The library adds the time of creation as a series, which is the process's start.
                distribution.samples = [each for each in distribution.samples if not each.name.endswith("_created")]
                yield distribution


class _Gauges(Collector):
    """Collects the gauges."""

    def __init__(self, telemetry: Telemetry, facts: Callable[[], Facts]) -> None:
        self._telemetry = telemetry
        self._facts = facts

    def collect(self) -> Iterator[Metric]:
        facts = self._facts()
        counts, difference = self._telemetry.counts, self._telemetry.clock_difference
        for name, text, value in (
            (
                "exchange_open",
                "Whether the exchange is open: 1 from a session's opening to its close.",
                facts.exchange_open,
            ),
            ("buffer_bytes", "Bytes waiting to be committed, in memory and on disk.", facts.buffer_bytes),
            ("spool_bytes", "Bytes waiting on disk to be committed.", facts.spool_bytes),
            ("spool_max_bytes", "Bytes on disk at which the stream is closed.", facts.spool_max_bytes),
            ("spool_batches", "Batches waiting on disk to be committed.", facts.spool_batches),
            (
                "transaction_max_bytes",
                "The most bytes of one transaction; halved after a transaction that was too large.",
                counts.transaction_max_bytes,
            ),
            (
                "calendar_remaining_seconds",
                "How far ahead the trading calendar is known, in whole days of 86,400 seconds.",
                None if counts.calendar_days_left is None else counts.calendar_days_left * _SECONDS_PER_DAY,
            ),
            ("open_gaps", "Open gaps of all days.", facts.open_gaps),
            (
                "oldest_open_gap_seconds",
                "Age of the oldest open gap; 0 if none is open.",
                facts.oldest_open_gap_seconds,
            ),
            (
                "coverage_ratio",
                "Share of the last trading day, as far as it has passed, that is covered or backfilled.",
                facts.coverage_ratio,
            ),
            (
                "clock_difference_seconds",
                "This machine's clock minus the database's, at the last comparison.",
                _seconds(difference.ahead if difference else None),
            ),
            ("start_timestamp_seconds", "When this process started.", self._telemetry.started_at / SECOND),
            ("last_message_timestamp_seconds", "When the last message arrived.", _seconds(counts.last_message_at)),
            ("last_tick_timestamp_seconds", "When the last tick arrived.", _seconds(counts.last_tick_at)),
            (
                "last_commit_timestamp_seconds",
                "When the last transaction was committed.",
                _seconds(counts.last_commit_at),
            ),
        ):
            if value is not None:
                yield GaugeMetricFamily(f"ingestor_{name}", text, float(value))
        yield self._state()
        yield self._ready()
        build = GaugeMetricFamily("ingestor_build_info", "The running version; always 1.", labels=["version", "python"])
        build.add_metric([__version__, platform.python_version()], 1)
        yield build

    def _state(self) -> Metric:
        family = GaugeMetricFamily(
            "ingestor_session_state", "The state of the connection: 1 for the current state.", labels=["state"]
        )
        for state in STREAM_STATES:
            family.add_metric([state], state == self._telemetry.stream.state)
        return family

    def _ready(self) -> Metric:
        family = GaugeMetricFamily("ingestor_ready", "Whether a check of /readyz passes.", labels=["check"])
        failing = {problem.check for problem in self._telemetry.readiness.problems}
        for check in CHECKS:
            family.add_metric([check], check not in failing)
        return family


def _seconds(at: int | None) -> float | None:
    return None if at is None else at / SECOND
