"""Standard output and error of a process that must survive their failure."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import io
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from ingestor.telemetry.log_writer import LogWriter

EXIT_SECONDS = 1.0
"""Time to write the waiting lines when the process ends."""

_writers: list[LogWriter] = []


def open_missing() -> None:
    """Open the null device for each of standard input, output and error that this process lacks.

    Otherwise the next file or socket gets the free descriptor, and log lines are written into it. Call this before
    any file is opened.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # opens the lowest free number, which is `descriptor`
            os.set_inheritable(opened, True)
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:  # the descriptor was closed when Python started
            setattr(sys, name, os.fdopen(descriptor, mode, errors="backslashreplace", closefd=False))


def never_block(report: Callable[[int], None] | None = None) -> None:
    """Write standard output and error in a thread, which drops lines that a slow reader does not accept.

    Only for processes that must never wait; a command whose purpose is its output waits for its reader. When the
    process ends, waiting lines are written for up to `EXIT_SECONDS`. `report` is that of `LogWriter`. Streams that a
    caller has replaced stay as they are.
    """
    if not (_is_descriptor(sys.stdout, 1) and _is_descriptor(sys.stderr, 2)):
        return
    writers = {1: LogWriter(1, report=report)}
    # If both are the same file, one thread writes both, which keeps the order of the lines.
    writers[2] = writers[1] if os.path.sameopenfile(1, 2) else LogWriter(2, report=report)
    sys.stdout = LineStream(writers[1], 1, sys.stdout.encoding)
    sys.stderr = LineStream(writers[2], 2, sys.stderr.encoding)
    _writers[:] = set(writers.values())
    atexit.register(_drain)
    # A terminal with `stty tostop` stops a background job that writes to it.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    _unblock_faulthandler()


def _is_descriptor(stream: TextIO, descriptor: int) -> bool:
    try:
        return stream.fileno() == descriptor
    except OSError:  # a stream in memory has no descriptor
        return False


def lines_dropped() -> int:
    """Return how many lines could not be written so far."""
    return sum(writer.lines_dropped for writer in _writers)


def _drain() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    deadline = time.monotonic() + EXIT_SECONDS
    for writer in _writers:
        writer.drain(max(0.0, deadline - time.monotonic()))


def _unblock_faulthandler() -> None:
    """Keep Python's crash report, which a signal handler writes, from waiting for a reader.

    This opens a pipe or terminal a second time with O_NONBLOCK, which on the descriptor itself would affect all
    processes that share it.
    """
    if not faulthandler.is_enabled():
        return
    kind = os.fstat(2).st_mode
    if stat.S_ISFIFO(kind) or stat.S_ISCHR(kind):
        with contextlib.suppress(OSError):
            faulthandler.enable(os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY))


class LineStream(io.TextIOBase):
    """A text stream that passes complete lines to a `LogWriter`, and an incomplete line on `flush` only.

    Each thread has its own incomplete line, so that lines which threads write in pieces do not mix.
    """

    def __init__(self, writer: LogWriter, descriptor: int, encoding: str = "utf-8") -> None:
        self._writer = writer
        self._descriptor = descriptor
        self._encoding = encoding
        self._local = threading.local()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # the library's is read-only too
        """The encoding of the output; characters that it lacks are escaped."""
        return self._encoding

    def write(self, text: str, /) -> int:
        """Queue text; never waits, never fails."""
        lines, end, rest = text.rpartition("\n")
        if end:
            self._pass_on(lines + end)
        self._local.incomplete = self._incomplete + rest
        return len(text)

    def flush(self) -> None:
        """Pass an incomplete line, such as a prompt, to the writer."""
        self._pass_on("")

    def _pass_on(self, text: str) -> None:
        lines, self._local.incomplete = self._incomplete + text, ""
        if lines:
            self._writer.write(lines.encode(self._encoding, "backslashreplace"))

    @property
    def _incomplete(self) -> str:
        return getattr(self._local, "incomplete", "")

    def writable(self) -> bool:
        """Return True."""
        return True

    def isatty(self) -> bool:
        """Return whether the descriptor is a terminal."""
        return os.isatty(self._descriptor)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor
