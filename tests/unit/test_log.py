from __future__ import annotations

import ast
import contextlib
import json
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from ingestor.redaction import register_secret
from ingestor.telemetry import log
from ingestor.telemetry.log import BURST, WINDOW, FloodLimit, configure, log_suppressed_lines

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """Undo the log's configuration after each test."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.captureWarnings(capture=False)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    structlog.reset_defaults()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_library_logs_use_our_format(capsys: pytest.CaptureFixture[str]) -> None:
    """A library's warning is JSON with a constant event and without secrets; lower levels are suppressed."""
    configure("info", "json")
    register_secret("tk_secret")
    try:
        raise ValueError("tk_secret")
    except ValueError:
        logging.getLogger("asyncio").exception("Task for %s failed", "tk_secret")
    logging.getLogger("uvicorn.error").info("Started server process")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("tk_secret is old", DeprecationWarning, stacklevel=1)
    first, second = lines(capsys)
    assert (first["event"], first["library"], first["level"]) == ("library", "asyncio", "error")
    assert first["detail"] == "Task for [hidden] failed"
    assert "ValueError: [hidden]" in str(first["exception"])
    assert (second["library"], second["level"]) == ("py.warnings", "warning")
    assert "tk_secret" not in str(second)


def test_secrets_are_redacted_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    """A secret is redacted deep in a field, in a name, and in JSON's quoting."""
    configure("info", "json")
    register_secret('p"ass\\word')
    register_secret("tk_secret")
    structlog.get_logger().info("asked", headers={"token": ["tk_secret", 'p"ass\\word']}, tk_secret=1)
    text = capsys.readouterr().err
    assert json.loads(text)["headers"] == {"token": ["[hidden]", "[hidden]"]}
    assert "tk_secret" not in text


def test_the_next_library_line_counts_suppressed_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next line of a library reports the suppressed lines, as an event of ours does, unless they were reported."""
    now = 0.0
    monkeypatch.setattr(log, "FloodLimit", lambda: FloodLimit(lambda: now))
    configure("info", "json")
    for _ in range(BURST + 7):
        logging.getLogger("websockets").warning("odd")
    now = WINDOW
    logging.getLogger("websockets").warning("odd")
    *_, last = lines(capsys)
    assert (last["event"], last["left_out"]) == ("library", 7)


def test_a_terminal_gets_lines_to_read(capsys: pytest.CaptureFixture[str]) -> None:
    configure("info", "console")
    structlog.get_logger().warning("reconnecting", in_seconds=3)
    logging.getLogger("asyncio").warning("slow")
    text = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().err)
    assert "reconnecting" in text
    assert "in_seconds=3" in text
    assert "library=asyncio" in text


def test_a_flood_is_cut_and_counted() -> None:
    """After the burst nothing passes until the window ends; then the first line reports the suppressed lines."""
    now = 0.0
    limit = FloodLimit(lambda: now)
    admitted = [limit.admit("a") for _ in range(BURST + 5)]
    assert admitted == [0] * BURST + [None] * 5
    assert limit.admit("b") == 0
    now = WINDOW
    assert limit.admit("a") == 5
    assert limit.admit("a") == 0


def test_suppressed_lines_are_reported_without_a_next_line() -> None:
    """Suppressed lines are reported once, after the window or at the end of the process."""
    now = 0.0
    limit = FloodLimit(lambda: now)
    for _ in range(BURST + 3):
        limit.admit("a")
    assert limit.left_out() == []
    now = WINDOW
    assert limit.left_out() == [("a", 3)]
    assert limit.left_out() == []
    for _ in range(BURST + 1):
        limit.admit("a")
    assert limit.left_out(at_once=True) == [("a", 1)]


def test_floods_do_not_reach_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    """Floods of ours and of a library are limited; lines of the level debug are not."""
    configure("debug", "json")
    for number in range(3 * BURST):
        structlog.get_logger().warning("reconnecting", number=number)
        structlog.get_logger().debug("committed")
        logging.getLogger("websockets").warning("odd %s", number)
    log_suppressed_lines(at_once=True)
    found = [(line["event"], line.get("of"), line.get("count")) for line in lines(capsys)]
    assert found.count(("reconnecting", None, None)) == BURST
    assert found.count(("library", None, None)) == BURST
    assert found.count(("committed", None, None)) == 3 * BURST
    assert set(found[-2:]) == {
        ("log_lines_suppressed", "reconnecting", 2 * BURST),
        ("log_lines_suppressed", "library:websockets", 2 * BURST),
    }


def logged_events() -> set[str]:
    """Return the names of the logged events: the first argument of each call."""
    found: set[str] = set()
    for path in (ROOT / "ingestor").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            function, name = ast.unparse(node.func), node.args[0] if node.args else None
            if not re.fullmatch(r"(self\._log|structlog\.get_logger\(\))\.\w+|level|.*elemetry\.warned", function):
                continue
            if function == "self._log.warning" and isinstance(name, ast.Name):
                continue  # within `warned`, whose callers are examined
            assert isinstance(name, ast.Constant), f"{path.name}: {ast.unparse(node)}: the event is no constant"
            assert isinstance(name.value, str)
            found.add(name.value)
    return found


def test_events_are_constants_and_documented() -> None:
    """The reference lists exactly the events that the package logs, so that monitoring can rely on the names."""
    text = (ROOT / "docs/reference/events.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE))
    assert documented == logged_events() | {"library"}


def test_a_failing_log_does_not_stop_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log on a full disk stops nothing, and the failure itself is then reported."""
    with Path("/dev/full").open("w", encoding="utf-8", buffering=1) as full:
        monkeypatch.setattr("sys.stderr", full)
        configure("info", "json")
        structlog.get_logger().error("spool_write_failed", detail="full")
        with contextlib.suppress(OSError):
            full.close()
