"""Records beside the spool how far it was committed, because SQLite silently drops the end of a damaged log."""

from __future__ import annotations

import contextlib
import os
import zlib
from pathlib import Path

from ingestor.buffer.spool_format import QueueState, pack_state, unpack_state

_CHECKSUM = 4


class Watermark:
    """A file of a few bytes, overwritten in place after each commit without waiting for the disk.

    It is never ahead of the commits. It is exact after the process has ended, and may be seconds old or empty after a
    power loss. An unreadable or damaged file counts as absent.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None

    def read(self) -> QueueState | None:
        """Return the state that was written last; None if there is none."""
        try:
            record = self._path.read_bytes()
        except OSError:
            return None
        content, checksum = record[:-_CHECKSUM], record[-_CHECKSUM:]
        return unpack_state(content) if checksum == _checksum(content) else None

    def write(self, state: QueueState) -> None:
        """Record a committed state. If the write fails, remove the record, which is safe."""
        content = pack_state(state)
        try:
            if self._file is None:
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
            os.pwrite(self._file, content + _checksum(content), 0)
        except OSError:
            self.clear()

    def clear(self) -> None:
        """Remove the record."""
        self.close()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                os.close(file)


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(_CHECKSUM)
