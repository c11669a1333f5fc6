"""Standard output and standard error of a process that must go on whatever becomes of them."""

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
"""Time for the lines that still wait when the process ends."""

_writers: list[LogWriter] = []


def open_missing() -> None:
    """Open the null device wherever this process was started without standard input, output or error.

    Otherwise the next file or socket takes the free descriptor, and what is meant for the log is written into it. To be
    called before anything else opens one.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is this one
            os.set_inheritable(opened, True)
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:  # Python's way to say that the descriptor was closed when it started
            setattr(sys, name, os.fdopen(descriptor, mode, errors="backslashreplace", closefd=False))


def never_block(report: Callable[[int], None] | None = None) -> None:
    """Let no write to standard output or error hold up this process: a thread writes, and drops what nobody reads.

    This is for processes that must go on. A command whose output is its purpose waits for its reader instead. When the
    process ends, the lines that still wait are written, for up to `EXIT_SECONDS`. `report` is that of `LogWriter`.
    Streams that a caller has put in their place are left as they are.
    """
    if not (_is_descriptor(sys.stdout, 1) and _is_descriptor(sys.stderr, 2)):
        return
    writers = {1: LogWriter(1, report=report)}
    # Where both are the same file, one thread writes both, so that the order of the lines is kept.
    writers[2] = writers[1] if os.path.sameopenfile(1, 2) else LogWriter(2, report=report)
    sys.stdout = LineStream(writers[1], 1, sys.stdout.encoding)
    sys.stderr = LineStream(writers[2], 2, sys.stderr.encoding)
    _writers[:] = set(writers.values())
    atexit.register(_drain)
    # Or a terminal with `stty tostop` would stop a background job that writes to it.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    _unblock_faulthandler()


def _is_descriptor(stream: TextIO, descriptor: int) -> bool:
    try:
        return stream.fileno() == descriptor
    except OSError:  # a text in memory has none
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
    """Let Python's report of a crash, which a signal handler writes, not wait for its reader.

    A pipe or a terminal is opened a second time, without blocking: O_NONBLOCK on the descriptor itself would hold for
    all processes that share it.
    """
    if not faulthandler.is_enabled():
        return
    kind = os.fstat(2).st_mode
    if stat.S_ISFIFO(kind) or stat.S_ISCHR(kind):
        with contextlib.suppress(OSError):
            faulthandler.enable(os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY))


class LineStream(io.TextIOBase):
    """A text stream in front of a `LogWriter`. It hands on whole lines, and the beginning of one only by `flush`.

    Each thread has a line of its own, so that lines that are written in pieces at the same time stay apart.
    """

    def __init__(self, writer: LogWriter, descriptor: int, encoding: str = "utf-8") -> None:
        self._writer = writer
        self._descriptor = descriptor
        self._encoding = encoding
        self._local = threading.local()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # the library's is read-only too
        """The encoding of what is written; characters that it lacks are escaped."""
        return self._encoding

    def write(self, text: str, /) -> int:
        """Take text. Never waits for it to be written, and never fails."""
        lines, end, rest = text.rpartition("\n")
        if end:
            self._hand_on(lines + end)
        self._local.begun = self._begun + rest
        return len(text)

    def flush(self) -> None:
        """Hand on the beginning of a line, such as a prompt."""
        self._hand_on("")

    def _hand_on(self, text: str) -> None:
        whole, self._local.begun = self._begun + text, ""
        if whole:
            self._writer.write(whole.encode(self._encoding, "backslashreplace"))

    @property
    def _begun(self) -> str:
        return getattr(self._local, "begun", "")

    def writable(self) -> bool:
        """Return True."""
        return True

    def isatty(self) -> bool:
        """Return whether a terminal is behind it."""
        return os.isatty(self._descriptor)

    def fileno(self) -> int:
        """Return the descriptor, for those who ask about what is behind it."""
        return self._descriptor
