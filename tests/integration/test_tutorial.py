"""The tutorial, step by step as a reader takes it: the demo on a terminal, the other commands in a second one."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clocks import HANG_SECONDS
from tests.commands import environment_with

PAGE = Path(__file__).parents[2] / "docs/tutorial.md"
BLOCK = re.compile(r"^```(sh|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ADDRESS = re.compile(r"postgresql://postgres:\S+@127\.0\.0\.1:\d+/demo")
PLACEHOLDER = "postgresql://postgres:PASSWORD@127.0.0.1:PORT/demo"
INVITATION = "until you press Ctrl-C"
SECONDS = 5


@pytest.fixture
def demo() -> Iterator[str]:
    """Run a shorter demo on a terminal; yield its screen once it invites to query, and stop it by Ctrl-C's signal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "ingestor", "demo", "--duration", f"{SECONDS}s"]
    environment = environment_with(TERM="xterm", COLUMNS="150")
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    try:
        yield read_until(ours, INVITATION)
        process.send_signal(signal.SIGINT)
        assert "Nothing is left running." in read_until(ours, "running.")
        assert process.wait(HANG_SECONDS) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def read_until(terminal: int, text: str) -> str:
    """Return what a terminal shows up to a text."""
    shown, deadline = b"", time.monotonic() + HANG_SECONDS
    while text.encode() not in shown:
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, shown.decode(errors="replace")
        shown += os.read(terminal, 65536)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(errors="replace")).replace("\r\n", "\n")


def form(text: str) -> str:
    """Return an output with each symbol, duration and number replaced by one word."""
    numbers = re.sub(r"\d[\d,.]*", "NUMBER", re.sub(r"[A-Z0-9]+\.NZ", "SYMBOL", text.strip()))
    return re.sub(r"NUMBER (ms|s|min( NUMBER s)?)\b", "DURATION", numbers)


def second_terminal(script: str, directory: Path) -> list[str]:
    """Run a reader's commands in a shell; return the output of each step."""
    done = subprocess.run(
        ["sh", "-eu"],
        input=script,
        env=environment_with(),
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("END-OF-STEP\n")[:-1]


def test_the_tutorial(demo: str, tmp_path: Path) -> None:
    """Each step works as written, and each output has the form on the page."""
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert blocks[0] == ("sh", "make demo\n")
    assert form(blocks[1][1]) in form(demo)
    address = ADDRESS.search(demo)
    assert address is not None
    (tmp_path / ".venv-demo").symlink_to(Path(sys.executable).parents[1])
    script = "".join(f"{code}echo END-OF-STEP\n" for language, code in blocks[2:] if language == "sh")
    assert script.count(PLACEHOLDER) == 1
    script = script.replace(PLACEHOLDER, address[0])
    expected = [form(text) for language, text in blocks[2:] if language == "text"]
    deadline = time.monotonic() + HANG_SECONDS
    while (found := [form(output) for output in second_terminal(script, tmp_path)]) != expected:
        # A demo of thirty seconds is old enough to report on; this one must age.
        assert found[-1].startswith("There was no trading time yet."), found
        assert time.monotonic() < deadline
