"""Remembers beside the spool how far it was known to be on disk: SQLite drops the end of a damaged log in silence."""

from __future__ import annotations

import contextlib
import os
import zlib
from pathlib import Path

from ingestor.buffer.spool_format import QueueState, pack_state, unpack_state

_CHECKSUM = 4


class Watermark:
    """A file of a few bytes that is written after each commit, in place and without waiting for the disk.

    It is never ahead of what was committed. After the end of the process it is exact; after a loss of power it may be
    seconds old, or nothing. A file that can't be read, or is damaged, says nothing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None

    def read(self) -> QueueState | None:
        """Return the state that was noted last."""
        try:
            noted = self._path.read_bytes()
        except OSError:
            return None
        content, checksum = noted[:-_CHECKSUM], noted[-_CHECKSUM:]
        return unpack_state(content) if checksum == _checksum(content) else None

    def write(self, state: QueueState) -> None:
        """Note a state that is committed. Where that is not possible nothing is known any more, which is safe."""
        content = pack_state(state)
        try:
            if self._file is None:
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
            os.pwrite(self._file, content + _checksum(content), 0)
        except OSError:
            self.clear()

    def clear(self) -> None:
        """Forget what was noted."""
        self.close()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the file."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                os.close(file)


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(_CHECKSUM)
