"""Space on the spool's disk: a reserve for when it is full, and whether it takes anything at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

BALLAST = 16 * 2**20
"""Bytes kept in reserve. On a full disk SQLite can't even delete, so this is removed first and made again later."""

_PIECE = 2**16
"""Bytes of a probe that are written at once."""


class Reserve:
    """A file of `BALLAST` bytes in `directory`, which keeps their space."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._ballast = directory / "ballast"

    def restore(self) -> bool:
        """Make it, if it is not there and the disk has room for twice as much; return whether it is there."""
        draft = self._ballast.with_suffix(".new")
        try:
            if not self._is_there():
                if shutil.disk_usage(self._directory).free < 2 * BALLAST:
                    return False
                with draft.open("wb") as file:
                    file.write(os.urandom(BALLAST))  # random: a file system may keep zeros without using space
                    os.fsync(file.fileno())
                draft.replace(self._ballast)
        except OSError:
            with contextlib.suppress(OSError):
                draft.unlink()
            return False
        return True

    def release(self) -> None:
        """Give its space to who needs it now."""
        with contextlib.suppress(OSError):
            self._ballast.unlink()

    def disk_takes(self, size: int, offset: int) -> bool:
        """Whether the disk takes so many bytes now, that far into a file, gives them back, and lets files be renamed.

        A file system may have room and still not let a file grow any further, hence the offset.
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

    def _is_there(self) -> bool:
        # Something else of that name (a directory) can't be replaced, and a disk with room is no worse for it.
        return self._ballast.is_dir() or (self._ballast.exists() and self._ballast.stat().st_size >= BALLAST)
