"""Space on the spool's disk: a reserve for a full disk, and a probe whether the disk accepts writes."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

BALLAST = 16 * 2**20
"""Bytes in reserve. SQLite needs space even to delete, so on a full disk this file is removed first and made later."""

_PIECE = 2**16
"""Bytes of one write of a probe."""


class Reserve:
    """A file of `BALLAST` bytes in `directory` that reserves space."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._ballast = directory / "ballast"

    def restore(self) -> bool:
        """Make the file if it is missing and the disk has twice its size free; return whether it exists."""
        draft = self._ballast.with_suffix(".new")
        try:
            if not self._exists():
                if shutil.disk_usage(self._directory).free < 2 * BALLAST:
                    return False
                with draft.open("wb") as file:
                    file.write(os.urandom(BALLAST))  # a file system may store zeros without using space
                    os.fsync(file.fileno())
                draft.replace(self._ballast)
        except OSError:
            with contextlib.suppress(OSError):
                draft.unlink()
            return False
        return True

    def release(self) -> None:
        """Remove the file to free its space."""
        with contextlib.suppress(OSError):
            self._ballast.unlink()

    def disk_accepts(self, size: int, offset: int) -> bool:
        """Return whether the disk stores and returns `size` bytes at `offset` of a new file, and can rename files.

        A file system with room may still refuse to let a file grow further, hence the offset.
        """
        probe, renamed = self._directory / "probe", self._directory / "probe.renamed"
        try:
            if shutil.disk_usage(self._directory).free < size + _PIECE:
                return False
            with probe.open("w+b", buffering=0) as file:
                file.seek(offset)
                piece = os.urandom(_PIECE)
                for _ in range(-(-size // _PIECE)):
                    if file.write(piece) < _PIECE:
                        return False
                os.fsync(file.fileno())
                file.seek(offset)
                return file.read(_PIECE) == piece and probe.replace(renamed) == renamed
        except OSError:
            return False
        finally:
            for path in (probe, renamed):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _exists(self) -> bool:
        # A directory of that name can't be replaced, and does no harm.
        return self._ballast.is_dir() or (self._ballast.exists() and self._ballast.stat().st_size >= BALLAST)
