from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

CRASH = "raise SystemError('of ours')"
ABORT = "import os; os.abort()"
PRINT = "import sys; print('out', 1); print('err', file=sys.stderr); print('more', end='')"
CLOSED = "import os, sys; print('x'); print('y', file=sys.stderr, flush=True); assert os.open('/', 0) > 2"


def run(code: str, output: int, *, closed: bool = False) -> subprocess.CompletedProcess[bytes]:
    """Run code in a process that never waits for its output, optionally with closed standard streams."""
    before = "from ingestor.telemetry.standard_streams import *; open_missing(); never_block()"
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", f"{before}\n{code}"],
        check=False,
        stdout=output,
        stderr=output,
        timeout=60,
        preexec_fn=(lambda: os.closerange(0, 3)) if closed else None,
    )


@pytest.fixture
def full_pipe() -> Iterator[int]:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"\n")
    os.set_blocking(writer, True)
    yield writer
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(("code", "status"), [(CRASH, 1), (ABORT, -signal.SIGABRT), (PRINT, 0)])
def test_exit_never_waits_for_the_reader(code: str, status: int, full_pipe: int) -> None:
    """Neither a traceback, nor a crash report of a signal handler, nor the last output delays the exit."""
    assert run(code, full_pipe).returncode == status


def test_the_last_output_is_written() -> None:
    """The last output is written in order, on both streams, also without an end of line."""
    reader, writer = os.pipe()
    for code in (PRINT, CRASH):
        run(code, writer)
    os.close(writer)
    with os.fdopen(reader) as output:
        first, second, *rest = output.read().splitlines()
    assert (first, second) == ("out 1", "err")
    assert rest[0] == "moreTraceback (most recent call last):"
    assert rest[-1] == "SystemError: of ours"


def test_missing_streams_are_replaced() -> None:
    """Closed streams are replaced, so that the first opened file does not become the log."""
    assert run(CLOSED, subprocess.DEVNULL, closed=True).returncode == 0
