from __future__ import annotations

import re
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ingestor.clock import ClockDifference
from ingestor.model import SECOND, Batch, Session
from ingestor.service.recorder import new_session_id
from ingestor.telemetry.buffer_events import BufferEvents, BufferState
from ingestor.telemetry.buffer_metrics import PublisherMetrics, new_write_registry
from ingestor.telemetry.events import Telemetry
from ingestor.telemetry.metrics import Facts, new_registry
from ingestor.telemetry.relay_events import RelayTelemetry
from ingestor.telemetry.relay_metrics import new_relay_registry
from tests.clocks import ManualClock
from tests.http import samples

REFERENCE = Path(__file__).parents[2] / "docs/reference/metrics.md"
UNKNOWN = Facts(False, 0, 0, 2**30, 0, None, None, None)
KNOWN = Facts(True, 300, 200, 2**30, 2, 4, 99.5, 0.875)


def full_telemetry() -> Telemetry:
    """Return telemetry that has seen every event."""
    telemetry = Telemetry(ManualClock())
    session = Session(new_session_id(0), "test", "ws://localhost/ws", 0)
    telemetry.rejected(session, "not_json", 3, 0)
    telemetry.reconnecting("refused", 1.0, cause="unreachable", alert=False)
    telemetry.clocks_compared(ClockDifference(-2 * SECOND, SECOND // 2))
    telemetry.transactions_sized(2**23, is_normal=True)
    telemetry.calendar_known(days=40, warn_below=30, remedy="")
    batch = Batch(session, 1, b"", 2, span=(8 * SECOND, 9 * SECOND), last_message_at=10 * SECOND)
    telemetry.batch_closed(batch, 0.04)
    telemetry.committed((batch,), written=1, ticks=2, tallies={}, seconds=0.003, lag=0.02)
    return telemetry


def scraped(facts: Facts) -> str:
    return generate_latest(new_registry(full_telemetry(), lambda: facts)).decode()


def relay_metrics() -> str:
    """Return the metrics of a relay, without those that every process has."""
    telemetry = RelayTelemetry(ManualClock())
    telemetry.published(1, lag=0.5)
    text = generate_latest(new_relay_registry(telemetry, lambda: (2, 1), 200)).decode()
    return "".join(f"{line}\n" for line in text.splitlines() if "ingestor_relay_" in line)


def buffer_metrics() -> str:
    """Return the metrics of the replicated buffer, in recorder and writer, without those that others have too."""
    telemetry = full_telemetry()
    events = BufferEvents(ManualClock(), telemetry.readiness, "stream")
    events.published(0.01)
    events.state = BufferState(0, 5, 500, 3, 1, 2)
    registry = new_write_registry(telemetry, events)
    recorder = CollectorRegistry()
    recorder.register(PublisherMetrics(events))
    published = generate_latest(recorder).decode().splitlines()
    lines = [line for line in generate_latest(registry).decode().splitlines() if "ingestor_writer_" in line]
    lines += [line for line in generate_latest(registry).decode().splitlines() if "stream_lag" in line]
    return "".join(f"{line}\n" for line in lines + [line for line in published if "stream_lag" not in line])


def test_the_reference_has_each_metric_with_its_type_and_labels() -> None:
    """The reference lists exactly the exported names, types and labels, since dashboards depend on them."""
    rows = re.findall(r"^\| `(ingestor_\w+)(?:\{([\w,]+)\})?` \| (\w+) \|", REFERENCE.read_text(), flags=re.MULTILINE)
    documented = {(name, kind, frozenset(labels.split(",")) - {""}) for name, labels, kind in rows}
    found = set()
    for family in text_string_to_metric_families(scraped(KNOWN) + relay_metrics() + buffer_metrics()):
        if family.name.startswith("ingestor_"):
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            suffix = "_total" if family.type == "counter" else ""
            found.add((family.name + suffix, family.type, frozenset(labels)))
    assert found == documented


def test_the_lag_of_a_relay() -> None:
    """A relay's lag is the age of the newest commit that it handed out, and 0 once none waits."""
    telemetry = RelayTelemetry(ManualClock())

    def lag() -> float:
        text = generate_latest(new_relay_registry(telemetry, lambda: (0, 0), 200)).decode()
        return samples(text)["ingestor_relay_lag_seconds", frozenset()]

    telemetry.published(2, lag=7.5)
    assert lag() == 7.5
    telemetry.caught_up()
    assert lag() == 0
    telemetry.published(1, lag=-0.2)  # the database's clock was set back
    assert lag() == 0


def test_unknown_values_are_absent() -> None:
    """An unknown value is absent, since a zero would be a claim."""
    names = {name for name, _ in samples(scraped(UNKNOWN))}
    assert not names & {"ingestor_open_gaps", "ingestor_oldest_open_gap_seconds", "ingestor_coverage_ratio"}
    assert "ingestor_exchange_open" in names


def test_values_are_those_of_the_moment() -> None:
    found = {name: value for (name, labels), value in samples(scraped(KNOWN)).items() if not labels}
    assert found["ingestor_spool_bytes"] == 200
    assert found["ingestor_coverage_ratio"] == 0.875
    assert found["ingestor_messages_total"] == 2
    assert found["ingestor_feed_delay_seconds_sum"] == 1
    assert found["ingestor_clock_difference_seconds"] == -2
    assert found["ingestor_batch_ticks_sum"] == 2
    assert found["ingestor_wire_to_commit_seconds_sum"] == 0.02
    assert found["process_resident_memory_bytes"] > 0


def test_exactly_one_state_holds() -> None:
    found = samples(scraped(KNOWN))
    states = {
        dict(labels)["state"]: value for (name, labels), value in found.items() if name == "ingestor_session_state"
    }
    assert [state for state, value in states.items() if value] == ["waiting"]
    assert set(states.values()) == {0.0, 1.0}
