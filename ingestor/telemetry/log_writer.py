"""Writes lines to a descriptor in a thread of its own, so that a slow reader never holds up the process."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections import deque
from collections.abc import Callable

MAX_BYTES = 65_536
"""Bytes of waiting lines at most, in addition to the descriptor's own buffer."""


class LogWriter:
    """Queues lines and writes them in order. `write` never waits and never fails.

    At most `max_bytes` wait. Above that, new lines are dropped until half of `max_bytes` is free again; the oldest are
    kept, because they show how a failure began. Lines that the descriptor refuses (a full disk, a closed reader) are
    dropped too. Once a line can be written again, the thread calls `report` with the number of lines dropped since the
    last report; by default it writes that number.
    """

    def __init__(
        self, descriptor: int, *, max_bytes: int = MAX_BYTES, report: Callable[[int], None] | None = None
    ) -> None:
        self._descriptor = descriptor
        self._max_bytes = max_bytes
        self._report = report or self._write_report
        # Reentrant, because garbage collection during a write may run code that logs a warning.
        self._changed = threading.Condition(threading.RLock())
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._is_full = False
        self._is_torn = False  # the last line was written in part
        self._unreported = 0
        self._thread: threading.Thread | None = None
        self.lines_dropped = 0

    def write(self, lines: bytes) -> None:
        """Queue lines, which are written or dropped together."""
        with self._changed:
            if self._waiting and self._size + len(lines) > self._max_bytes:
                self._is_full = True
            if self._is_full:
                self._drop(lines)
                return
            self._waiting.append(lines)
            self._size += len(lines)
            self._changed.notify_all()
            if self._thread is None:
                self._start()

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        with contextlib.suppress(RuntimeError):  # the system has no thread left; the next line tries again
            thread.start()
            self._thread = thread

    def drain(self, seconds: float) -> None:
        """Wait up to `seconds` until all lines are written."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                lines = self._waiting[0]
            is_written = self._put(lines)
            if unreported := self._settle(lines, is_written=is_written):
                self._report(unreported)
            with self._changed:
                self._waiting.popleft()  # after the report, because `drain` waits for it too
                self._changed.notify_all()

    def _settle(self, lines: bytes, *, is_written: bool) -> int:
        """Account for lines that no longer wait. Return the number of dropped lines to report now."""
        with self._changed:
            self._size -= len(lines)
            if not is_written:
                self._drop(lines)
            if self._size > self._max_bytes // 2:
                return 0
            self._is_full = False
            if not is_written:
                return 0
            unreported, self._unreported = self._unreported, 0
            return unreported

    def _drop(self, lines: bytes) -> None:
        count = lines.count(b"\n") or 1
        self.lines_dropped += count
        self._unreported += count

    def _put(self, lines: bytes) -> bool:
        """Write all lines, however long that takes. Return False if the descriptor refuses them."""
        rest = memoryview(b"\n" + lines if self._is_torn else lines)
        try:
            while rest:
                try:
                    rest = rest[os.write(self._descriptor, rest) :]
                    self._is_torn = True
                except BlockingIOError:  # another process set O_NONBLOCK on the shared descriptor
                    self._wait_until_writable()
        except OSError:
            return False
        self._is_torn = False
        return True

    def _wait_until_writable(self) -> None:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        poll.poll()

    def _write_report(self, count: int) -> None:
        self.write(f"ingestor: {count} lines were dropped here, because they could not be written\n".encode())
