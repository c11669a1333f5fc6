"""The relay's metrics for Prometheus, collected at each scrape."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ingestor import __version__
from ingestor.model import SECOND
from ingestor.telemetry.relay_events import REFUSALS, RelayTelemetry


def new_relay_registry(
    telemetry: RelayTelemetry, clients: Callable[[], tuple[int, int]], max_clients: int
) -> CollectorRegistry:
    """Return a registry with the metrics of one relay. `clients` returns the number of streams, and of live ones."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(_Relay(telemetry, clients, max_clients))
    return registry


class _Relay(Collector):
    def __init__(self, telemetry: RelayTelemetry, clients: Callable[[], tuple[int, int]], max_clients: int) -> None:
        self._telemetry = telemetry
        self._clients = clients
        self._max_clients = max_clients

    def collect(self) -> Iterator[Metric]:
        """Yield each metric."""
        counts = self._telemetry.counts
        for name, text, value in (
            ("ticks_sent", "Ticks sent, once for each client.", counts.ticks_sent),
            ("commits", "Commits that were handed to the live clients.", counts.commits),
            ("streams", "Streams that were authenticated.", counts.streams),
            ("fallbacks", "Times that a live client became too slow and was served from the log.", counts.fallen_back),
            ("stuck_clients", "Clients that were closed because they accepted nothing.", counts.stuck),
            ("failed_streams", "Streams that a defect of the relay ended.", counts.failed),
            ("follow_failures", "Failed attempts to follow the log of commits.", counts.follow_failures),
            ("read_failures", "Failed reads of the record, or of a token, for a client.", counts.read_failures),
        ):
            yield CounterMetricFamily(f"ingestor_relay_{name}", text, value)
        refused = CounterMetricFamily("ingestor_relay_refused", "Refused clients, by reason.", labels=["reason"])
        for reason in REFUSALS:
            refused.add_metric([reason], counts.refused[reason])
        yield refused
        clients, live = self._clients()
        last = self._telemetry.last_commit_at
        for name, text, gauge in (
            ("clients", "Streams now.", clients),
            ("live_clients", "Streams that get each commit at once; the others read the record or the log.", live),
            ("max_clients", "Streams at once that the relay serves at most.", self._max_clients),
            ("ready", "Whether the log of commits is followed.", not self._telemetry.problem),
            (
                "lag_seconds",
                "Age of the newest commit when it was handed out; 0 if none waits.",
                self._telemetry.lag_seconds,
            ),
            ("last_commit_timestamp_seconds", "When the last commit was handed out.", last and last / SECOND),
        ):
            if gauge is not None:
                yield GaugeMetricFamily(f"ingestor_relay_{name}", text, float(gauge))
        build = GaugeMetricFamily("ingestor_build_info", "The running version; always 1.", labels=["version", "python"])
        build.add_metric([__version__, platform.python_version()], 1)
        yield build
