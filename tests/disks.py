"""A real small disk to be filled; it needs root (or CAP_SYS_ADMIN)."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path


def mount(path: Path, size: int) -> bool:
    """Mount an empty disk of `size` bytes at a directory; return whether that is possible here."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    return (
        shutil.which("mount") is not None and not subprocess.run(command, check=False, capture_output=True).returncode
    )


def unmount(path: Path) -> None:
    """Unmount the disk, even if files on it are open."""
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@contextlib.contextmanager
def small_disk(path: Path, size: int) -> Iterator[Path]:
    """Mount a disk for the block. Raises PermissionError if that is not possible."""
    path.mkdir(exist_ok=True)
    try:
        if not mount(path, size):
            raise PermissionError("no disk can be mounted here")
        try:
            yield path
        finally:
            unmount(path)
    finally:
        with contextlib.suppress(OSError):  # it existed before, and is not empty
            path.rmdir()


@contextlib.contextmanager
def pinned(path: Path) -> Iterator[None]:
    """Keep a file from being renamed for the block. Raises PermissionError if that is not possible."""
    if subprocess.run(["mount", "--bind", str(path), str(path)], check=False, capture_output=True).returncode:
        raise PermissionError("no file can be mounted here")
    try:
        yield
    finally:
        unmount(path)


def fill(disk: Path, *, leave: int = 0) -> Path:
    """Fill a disk up to `leave` bytes with one file, and return its path."""
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):  # another process may be faster
        while (free := shutil.disk_usage(disk).free) > leave:
            file.write(b"x" * min(free - leave, 2**20))
    return filler
