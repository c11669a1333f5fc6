from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
import structlog

from ingestor import telemetry
from ingestor.model import EndReason, Session, SessionEnd
from ingestor.telemetry import Telemetry, configure, hide, scrub

SESSION = Session(UUID(int=1), "test", "ws://localhost/ws", 0)


@pytest.fixture(autouse=True)
def _own_secrets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(telemetry, "_secrets", set())
    yield
    structlog.reset_defaults()


def test_secrets_are_scrubbed(capsys: pytest.CaptureFixture[str]) -> None:
    """A registered secret reaches no log line, also not in the text of an error or its traceback."""
    hide("tk_secret")
    configure("debug", "json")
    Telemetry().reconnecting("the server said tk_secret", 1.0, loud=True)
    try:
        raise ValueError("tk_secret")
    except ValueError:
        structlog.get_logger().error("failed", exc_info=True)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert lines[0]["detail"] == "the server said [hidden]"
    assert "ValueError: [hidden]" in lines[1]["exception"]


def test_what_is_too_short_is_no_secret() -> None:
    """An empty or tiny secret would garble every line."""
    for text in ("", "1", "abc"):
        hide(text)
    assert scrub("abc 1") == "abc 1"


def test_trouble_is_said_once_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    """The same trouble does not flood the log; another one is said at once, and so is its end."""
    configure("info", "json")
    instance = Telemetry()
    for now in (0.0, 1.0, 59.0, 60.0, 61.0):
        instance.write_failed("away", now, waiting_bytes=0)
    instance.write_failed("no schema", 62.0, waiting_bytes=0)
    instance.committed(batches=1, ticks=1, duplicates=0, rejected=0, seconds=0.1, lag=0.2)
    instance.committed(batches=1, ticks=1, duplicates=0, rejected=0, seconds=0.1, lag=0.2)
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(e["event"], e.get("detail")) for e in events] == [
        ("database_trouble", "away"),
        ("database_trouble", "away"),
        ("database_trouble", "no schema"),
        ("database_back", None),
    ]
    assert instance.counts.write_failures == 6
    assert (instance.counts.ticks_written, instance.counts.last_lag_seconds) == (2, 0.2)


def test_ends_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """Each end of a session is logged with its reason and counted by it."""
    configure("info", "json")
    instance = Telemetry()
    instance.session_ended(SESSION, SessionEnd(0, EndReason.CLOSED, 1001), "x")
    instance.session_ended(SESSION, SessionEnd(0, EndReason.STOPPED), "y")
    closed, stopped = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (closed["reason"], closed["close_code"], closed["level"]) == ("closed", 1001, "warning")
    assert (stopped["reason"], stopped["level"]) == ("stopped", "info")
    assert instance.counts.ends == {"closed": 1, "stopped": 1}


def test_spooling_is_said_with_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    """A database that is slow now and then does not flood the log; what was said to begin is said to end."""
    configure("info", "json")
    instance = Telemetry()
    instance.spool_drained()
    for now in (0.0, 1.0, 59.0, 60.0):
        instance.spooling(away=now > 50, now=now)
        instance.spool_drained()
    instance.spool_found(batches=3, size=100)
    instance.spool_drained()
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(e["event"], e.get("because")) for e in events] == [
        ("spooling", "the database is slow"),
        ("spool_drained", None),
        ("spooling", "the database is away"),
        ("spool_drained", None),
        ("spool_found", None),
        ("spool_drained", None),
    ]


def test_trouble_with_the_disk(capsys: pytest.CaptureFixture[str]) -> None:
    """A disk that takes nothing is said once a minute, a damaged spool each time, with its new name, and counted."""
    configure("info", "json")
    instance = Telemetry()
    for now in (0.0, 1.0, 60.0):
        instance.disk_trouble("full", now)
    instance.spool_damaged(Path("/x/spool-damaged.db"))
    instance.left_in_spool(batches=1, size=2)
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [e["event"] for e in events] == ["disk_trouble", "disk_trouble", "spool_damaged", "left_in_spool"]
    assert events[2]["set_aside_as"] == "/x/spool-damaged.db"
    assert instance.counts.spools_damaged == 1


def test_refused_rows_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """Ticks that the database refused are an error in the log, and count as rejections by their reason."""
    configure("info", "json")
    instance = Telemetry()
    instance.rows_refused(())
    instance.rows_refused(("database:23514", "database:23514", "database:22003"))
    (event,) = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (event["level"], event["count"]) == ("error", 3)
    assert instance.counts.rejected == {"database:23514": 2, "database:22003": 1}
