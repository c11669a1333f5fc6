"""The metrics of the replicated buffer for Prometheus, in the recorder and in the writer."""

from __future__ import annotations

import platform
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ingestor import __version__
from ingestor.model import SECOND
from ingestor.telemetry.buffer_events import BufferEvents
from ingestor.telemetry.events import Telemetry


def new_write_registry(telemetry: Telemetry, events: BufferEvents) -> CollectorRegistry:
    """Return a registry with all metrics of one `ingestor write` and of its process."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(_Writer(telemetry, events))
    return registry


class PublisherMetrics(Collector):
    """Collects the metrics of a recorder's side of the buffer."""

    def __init__(self, events: BufferEvents) -> None:
        self._events = events

    def collect(self) -> Iterator[Metric]:
        """Yield each metric."""
        counts = self._events.counts
        for name, text, value in (
            ("published", "Messages that the stream acknowledged.", counts.published),
            ("republished", "Times that batches were published again, lost by the stream.", counts.republished),
            ("failures", "Failed attempts to reach the stream.", counts.failures),
        ):
            yield CounterMetricFamily(f"ingestor_buffer_{name}", text, value)
        for histogram in self._events.histograms():
            for distribution in histogram.collect():
                distribution.samples = [each for each in distribution.samples if not each.name.endswith("_created")]
                yield distribution
        yield from _state(self._events)


class _Writer(Collector):
    """Collects the metrics of `ingestor write`."""

    def __init__(self, telemetry: Telemetry, events: BufferEvents) -> None:
        self._telemetry = telemetry
        self._events = events

    def collect(self) -> Iterator[Metric]:
        """Yield each metric."""
        written, counts = self._telemetry.counts, self._events.counts
        for name, text, value in (
            ("ticks_written", "Ticks committed, duplicates included.", written.ticks_recovered),
            ("batches_written", "Batches committed.", written.batches_written),
            ("write_failures", "Attempts to write that failed.", written.write_failures),
            ("buffer_failures", "Failed attempts to read the stream.", counts.failures),
            ("redeliveries", "Batches read again that the database had.", counts.redelivered),
            ("reads_restarted", "Times that the stream was read again from its beginning.", counts.reads_restarted),
            ("holes", "Holes in sessions: messages that the stream had lost.", counts.holes),
            ("holes_declared", "Holes that no recorder could fill, and are gaps.", counts.holes_declared),
            ("messages_damaged", "Messages of the stream that could not be read.", counts.damaged),
            ("turns", "Times that this writer became the active one.", counts.turns),
            ("bars_stored", "One-minute bars stored by this process.", written.bars_stored),
            ("rollup_failures", "Failed attempts to store bars.", written.rollup_failures),
        ):
            yield CounterMetricFamily(f"ingestor_writer_{name}", text, value)
        for histogram in (self._telemetry.histograms.commit, self._telemetry.histograms.wire_to_commit):
            for distribution in histogram.collect():
                distribution.samples = [each for each in distribution.samples if not each.name.endswith("_created")]
                yield distribution
        failing = {problem.check for problem in self._telemetry.readiness.problems}
        ready = GaugeMetricFamily(
            "ingestor_writer_ready", "Whether a check of the writer's /readyz passes.", labels=["check"]
        )
        for check in ("stream", "database"):
            ready.add_metric([check], check not in failing)
        yield ready
        yield GaugeMetricFamily(
            "ingestor_writer_active", "Whether this is the active writer.", float(bool(self._events.is_active))
        )
        if written.last_commit_at is not None:
            yield GaugeMetricFamily(
                "ingestor_writer_last_commit_timestamp_seconds",
                "When the last transaction was committed.",
                written.last_commit_at / SECOND,
            )
        yield from _state(self._events)
        build = GaugeMetricFamily("ingestor_build_info", "The running version; always 1.", labels=["version", "python"])
        build.add_metric([__version__, platform.python_version()], 1)
        yield build


def _state(events: BufferEvents) -> Iterator[Metric]:
    state = events.state
    if state is None:
        return
    for name, text, value in (
        (
            "stream_messages",
            "Messages in the stream, those included that are committed and kept a while.",
            state.messages,
        ),
        ("stream_bytes", "Bytes of the stream.", state.size),
        ("stream_lag_messages", "Messages of the stream that are not committed.", state.lag),
        ("replicas", "Servers that keep a copy of the stream.", state.replicas),
        ("replicas_in_step", "Servers whose copy is complete.", state.replicas - state.lagging),
    ):
        if value is not None:
            yield GaugeMetricFamily(f"ingestor_buffer_{name}", text, float(value))
