from __future__ import annotations

import json
from collections.abc import Iterator
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
