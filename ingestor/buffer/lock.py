"""A lock on a directory, which the system releases when the owning process ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from typing import IO

from ingestor.errors import ConfigurationError

_HELD = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES})
_UNSUPPORTED = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EPERM})


class DirectoryLock:
    """A locked file in `directory` that contains the owner's process id for operators."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "lock"
        self._file: IO[str] | None = None

    @property
    def is_ours(self) -> bool:
        """Whether this object has claimed the directory."""
        return self._file is not None

    def claim(self) -> None:
        """Lock the directory. Raises ConfigurationError if another process owns it, and OSError if the disk fails."""
        try:
            file = self._path.open("a+", encoding="ascii", errors="replace")
        except IsADirectoryError:
            raise ConfigurationError(f"{self._path} is a directory. Remove it.") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD:
                file.close()
                if error.errno not in _UNSUPPORTED:
                    raise
                raise ConfigurationError(
                    f"INGESTOR_SPOOL_DIR: the file system of {self._path.parent} cannot lock files "
                    f"({os.strerror(error.errno or 0)}). Set it to a directory on a disk of this machine."
                ) from None
            file.seek(0)
            owner = file.read(20).strip()
            file.close()
            raise ConfigurationError(
                f"INGESTOR_SPOOL_DIR: {self._path.parent} is in use by another ingestor"
                f"{f' (process {owner})' if owner.isdecimal() else ''}. "
                "Stop it, or give each one a directory of its own."
            ) from None
        self._file = file
        with contextlib.suppress(OSError):  # on a full disk, own the directory without the number
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()

    def release(self) -> None:
        """Release the lock."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()
