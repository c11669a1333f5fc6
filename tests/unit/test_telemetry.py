from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
import structlog

from ingestor.model import SECOND, Batch, EndReason, Session, SessionEnd, Tally
from ingestor.redaction import register_secret
from ingestor.telemetry.events import Telemetry
from ingestor.telemetry.log import configure
from tests.clocks import ManualClock

SESSION = Session(UUID(int=1), "test", "ws://localhost/ws", 0)


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def test_secrets_are_redacted(capsys: pytest.CaptureFixture[str]) -> None:
    """A registered secret is in no log line, also not in the text of an error or its traceback."""
    register_secret("tk_secret")
    configure("debug", "json")
    Telemetry().reconnecting("the server said tk_secret", 1.0, cause="closed", alert=True)
    try:
        raise ValueError("tk_secret")
    except ValueError:
        structlog.get_logger().error("failed", exc_info=True)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert lines[0]["detail"] == "the server said [hidden]"
    assert "ValueError: [hidden]" in lines[1]["exception"]


def commit(telemetry: Telemetry, tally: Tally, end: SessionEnd | None = None) -> None:
    """Close and commit a batch of one tick, after which the database counts `tally` for its session."""
    batch = Batch(SESSION, 1, b"", 1, end=end)
    telemetry.batch_closed(batch, None)
    telemetry.committed((batch,), written=1, ticks=1, tallies={SESSION.id: tally}, seconds=0.1, lag=0.2)


def test_a_failure_is_logged_once_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    """The same failure is logged once a minute; another one, and the recovery, at once."""
    configure("info", "json")
    clock = ManualClock()
    instance = Telemetry(clock)
    for seconds in (0, 1, 58, 1, 1):
        clock.advance(seconds)
        instance.write_failed("away", waiting_bytes=0)
    instance.write_failed("no schema", waiting_bytes=0)
    commit(instance, Tally(1, 0, 1))
    commit(instance, Tally(2, 0, 1))
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(e["event"], e.get("detail")) for e in events] == [
        ("database_write_failed", "away"),
        ("database_write_failed", "away"),
        ("database_write_failed", "no schema"),
        ("database_recovered", None),
    ]
    assert instance.counts.write_failures == 6
    assert (instance.counts.ticks_written, instance.counts.last_lag_seconds) == (2, 0.2)


def test_ends_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """Each end of a session is logged and counted by its reason."""
    configure("info", "json")
    instance = Telemetry()
    instance.session_ended(SESSION, SessionEnd(0, EndReason.CLOSED, 1001), "x")
    instance.session_ended(SESSION, SessionEnd(0, EndReason.STOPPED), "y")
    instance.session_ended(SESSION, SessionEnd(0, EndReason.FINISHED), "z")
    closed, stopped, finished = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (closed["reason"], closed["close_code"], closed["level"]) == ("closed", 1001, "warning")
    assert (stopped["reason"], stopped["level"]) == ("stopped", "info")
    assert (finished["reason"], finished["level"]) == ("finished", "info")
    assert instance.counts.ends == {"closed": 1, "stopped": 1, "finished": 1}


def test_spooling_is_logged_with_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    """A database that is slow at times does not flood the log; each logged start has its end."""
    configure("info", "json")
    clock = ManualClock()
    instance = Telemetry(clock)
    instance.spool_drained()
    for seconds in (0, 1, 58, 1):
        clock.advance(seconds)
        instance.spooling(database_failed=seconds == 1)
        instance.spool_drained()
    instance.spool_found(batches=3, size=100)
    instance.spool_drained()
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(e["event"], e.get("because")) for e in events] == [
        ("spooling", "the database is slow"),
        ("spool_drained", None),
        ("spooling", "the database is unavailable"),
        ("spool_drained", None),
        ("spool_found", None),
        ("spool_drained", None),
    ]


def test_a_failure_of_the_disk(capsys: pytest.CaptureFixture[str]) -> None:
    """A failed disk is logged once a minute, a damaged spool each time with its new name, and both are counted."""
    configure("info", "json")
    clock = ManualClock()
    instance = Telemetry(clock)
    for seconds in (0, 1, 59):
        clock.advance(seconds)
        instance.spool_write_failed("full")
    instance.spool_damaged(Path("/x/spool-damaged.db"), "not a database")
    instance.spool_not_empty(batches=1, size=2)
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [e["event"] for e in events] == [
        "spool_write_failed",
        "spool_write_failed",
        "spool_damaged",
        "spool_not_empty",
    ]
    assert events[2]["set_aside_as"] == "/x/spool-damaged.db"
    assert instance.counts.spools_damaged == 1


def test_refused_rows_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """Refused ticks are logged as an error, and counted as rejections by reason."""
    configure("info", "json")
    instance = Telemetry()
    instance.rows_refused(())
    instance.rows_refused(("database:23514", "database:23514", "database:22003"))
    (event,) = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (event["level"], event["count"]) == ("error", 3)
    assert instance.counts.rejected == {"database:23514": 2, "database:22003": 1}


def test_a_commit_without_an_answer_is_counted_by_the_next() -> None:
    """The counter follows the database's count of a session, also after a lost answer."""
    instance = Telemetry()
    commit(instance, Tally(10, 1, 10))
    commit(instance, Tally(25, 3, 0))  # 15 of them were committed by an attempt whose answer was lost
    assert (instance.counts.ticks_written, instance.counts.duplicates) == (25, 3)
    commit(instance, Tally(26, 3, 1), SessionEnd(0, EndReason.CLOSED))
    assert (instance.counts.ticks_written, instance.counts.ticks_recovered) == (26, 0)


def test_ticks_of_an_earlier_process_are_counted_separately() -> None:
    """Ticks of an inherited spool do not count for this process's sessions."""
    instance = Telemetry()
    batch = Batch(Session(UUID(int=2), "test", "ws://localhost/ws", 0), 7, b"", 5)
    instance.committed((batch,), written=1, ticks=5, tallies={batch.session.id: Tally(50, 0, 5)}, seconds=0.1, lag=0.2)
    assert (instance.counts.ticks_written, instance.counts.ticks_recovered) == (0, 5)


def test_the_stream_is_followed() -> None:
    """Each event changes the state and its start; readiness remembers the start of the loss."""
    clock = ManualClock()
    instance = Telemetry(clock)
    instance.connecting()
    instance.connected(SESSION)
    assert (instance.stream.state, instance.readiness.problems[0].check) == ("authenticating", "stream")
    instance.authenticated(SESSION, clock.wall())
    assert instance.stream.state == "streaming"
    assert [problem.check for problem in instance.readiness.problems] == ["database"]
    clock.advance(100)
    lost = clock.wall()
    instance.session_ended(SESSION, SessionEnd(lost, EndReason.CLOSED, 1001), "cut")
    instance.reconnecting("cut", 5.0, cause="closed", alert=False)
    clock.advance(5)
    instance.connecting()
    instance.reconnecting("refused", 9.0, cause="unreachable", alert=False)
    assert (instance.stream.state, instance.stream.detail) == ("waiting", "refused")
    assert instance.stream.retry_at == clock.wall() + 9 * SECOND
    assert (instance.readiness.problems[0].since, instance.readiness.problems[0].detail) == (lost, "refused")
    assert instance.counts.reconnects == {"closed": 1, "unreachable": 1}
    (connection,) = instance.connections
    assert (connection.authenticated_at, connection.end, connection.detail) == (
        lost - 100 * SECOND,
        SessionEnd(lost, EndReason.CLOSED, 1001),
        "cut",
    )


def test_only_the_latest_batches_are_kept() -> None:
    """Enough batches are kept for the ticks that the page shows."""
    instance = Telemetry()
    for number in range(1, 100):
        instance.batch_closed(Batch(SESSION, number, b"", 3, span=(0, 0), last_message_at=number * SECOND), 0.05)
    assert [batch.number for batch in instance.latest_batches] == [93, 94, 95, 96, 97, 98, 99]
    assert instance.counts.messages == 297


def test_no_counter_falls() -> None:
    """A database that lost commits does not lower a counter: Prometheus would count everything again."""
    instance = Telemetry()
    commit(instance, Tally(1000, 5, 1000))
    commit(instance, Tally(401, 2, 1, missing=600))
    commit(instance, Tally(402, 2, 1, missing=600))
    assert (instance.counts.ticks_written, instance.counts.duplicates) == (1001, 5)
