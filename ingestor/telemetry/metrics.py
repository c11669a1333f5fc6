"""The metrics for Prometheus: read from what the events have moved, at the moment of a scrape.

No label names a symbol. A value that is not known yet is absent, rather than zero.
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
"""Ends of a session after which the stream is opened again by the same process."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the metrics say of the moment, beside what `Telemetry` knows. None: not known yet."""

    exchange_open: bool
    buffer_bytes: int
    spool_bytes: int
    spool_max_bytes: int
    spool_batches: int
    open_gaps: int | None
    oldest_open_gap_seconds: float | None
    coverage_ratio: float | None


def new_registry(telemetry: Telemetry, facts: Callable[[], Facts]) -> CollectorRegistry:
    """Return a registry with all metrics of one daemon, and of its process."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(_Events(telemetry))
    registry.register(_Moment(telemetry, facts))
    return registry


class _Events(Collector):
    """What has happened so far."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    def collect(self) -> Iterator[Metric]:
        counts = self._telemetry.counts
        for name, text, value in (
            ("messages", "Messages received, of which each became a tick or a rejection.", counts.messages),
            (
                "ticks_written",
                "Ticks of this process's sessions that are committed, duplicates included.",
                counts.ticks_written,
            ),
            (
                "ticks_recovered",
                "Ticks committed out of a spool that an earlier process left.",
                counts.ticks_recovered,
            ),
            ("duplicates", "Ticks committed that were in the database already.", counts.duplicates),
            ("sessions", "Connections that were opened.", counts.sessions),
            ("batches_written", "Batches committed.", counts.batches_written),
            ("write_failures", "Tries to write that the database did not take.", counts.write_failures),
            ("spools_damaged", "Spool files that could not be read and were set aside.", counts.spools_damaged),
            (
                "log_lines_dropped",
                "Lines of the log that nobody read in time, or that could not be written.",
                lines_dropped(),
            ),
        ):
            yield CounterMetricFamily(f"ingestor_{name}", text, value)
        rejections, reconnects = counts.rejected, counts.reconnects
        for name, label, text, known, by_label in (
            ("rejections", "reason", "Messages that were not stored as ticks, by reason.", Reason, rejections),
            ("reconnects", "cause", "How often the stream had to be opened again, by cause.", _CAUSES, reconnects),
        ):
            family = CounterMetricFamily(f"ingestor_{name}", text, labels=[label])
            # What can be known beforehand begins with 0: an increase from nothing to 1 is none to Prometheus.
            for key, value in sorted((dict.fromkeys(known, 0) | by_label).items()):
                family.add_metric([key], value)
            yield family
        for histogram in self._telemetry.histograms:
            for distribution in histogram.collect():
                # Without the moment of its making, which the library adds as a series: that is the process's start.
                distribution.samples = [each for each in distribution.samples if not each.name.endswith("_created")]
                yield distribution


class _Moment(Collector):
    """How it is now."""

    def __init__(self, telemetry: Telemetry, facts: Callable[[], Facts]) -> None:
        self._telemetry = telemetry
        self._facts = facts

    def collect(self) -> Iterator[Metric]:
        facts = self._facts()
        counts, difference = self._telemetry.counts, self._telemetry.clock_difference
        for name, text, value in (
            (
                "exchange_open",
                "Whether the exchange trades now: 1 from a session's opening to its close.",
                facts.exchange_open,
            ),
            ("buffer_bytes", "Bytes that wait to be committed, in memory and on disk.", facts.buffer_bytes),
            ("spool_bytes", "Bytes that wait on disk to be committed.", facts.spool_bytes),
            ("spool_max_bytes", "Bytes on disk at which the stream is closed.", facts.spool_max_bytes),
            ("spool_batches", "Batches that wait on disk to be committed.", facts.spool_batches),
            (
                "transaction_max_bytes",
                "How much one transaction may hold now: it is halved after one that was too much.",
                counts.transaction_max_bytes,
            ),
            (
                "calendar_remaining_seconds",
                "For how long the trading calendar is known, in whole days of 86,400 seconds.",
                None if counts.calendar_days_left is None else counts.calendar_days_left * _SECONDS_PER_DAY,
            ),
            ("open_gaps", "Gaps that nothing has settled yet, of all days.", facts.open_gaps),
            (
                "oldest_open_gap_seconds",
                "Age of the oldest open gap; 0 where none is open.",
                facts.oldest_open_gap_seconds,
            ),
            (
                "coverage_ratio",
                "Share of the last trading day, as far as it has passed, that was heard or backfilled.",
                facts.coverage_ratio,
            ),
            (
                "clock_difference_seconds",
                "This machine's clock less the database's, when they were compared last.",
                _seconds(difference.ahead if difference else None),
            ),
            ("start_timestamp_seconds", "When this process began.", self._telemetry.started_at / SECOND),
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
        build = GaugeMetricFamily(
            "ingestor_build_info", "The version that runs; always 1.", labels=["version", "python"]
        )
        build.add_metric([__version__, platform.python_version()], 1)
        yield build

    def _state(self) -> Metric:
        family = GaugeMetricFamily(
            "ingestor_session_state", "How it is with the connection: 1 for the state of now.", labels=["state"]
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
