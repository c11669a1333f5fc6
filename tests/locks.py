"""A server that several test processes share: any number use it, or one stops it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar


class ServerLock:
    """Locks on files, released when their process ends. A process that waits for the exclusive lock is not overtaken.

    The lock is reentrant.
    """

    _held: ClassVar[set[Path]] = set()

    def __init__(self, url: str) -> None:
        name = f"ingestor-tests-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
        self._gate, self._lock = (Path(tempfile.gettempdir(), f"{name}.{each}") for each in ("gate", "lock"))

    @contextlib.contextmanager
    def held(self, *, alone: bool) -> Iterator[None]:
        """Hold the lock for the block, shared or exclusive."""
        if self._lock in self._held:
            yield
            return
        with self._lock.open("ab") as lock:
            with self._gate.open("ab") as gate:
                fcntl.flock(gate, fcntl.LOCK_EX)
                fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            self._held.add(self._lock)
            try:
                yield
            finally:
                self._held.discard(self._lock)
