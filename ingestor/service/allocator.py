"""Keeps the process small over the months that it runs."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3
_LARGE = 2**20


def return_large_blocks() -> None:
    """Let the C library give blocks of 1 MiB or more back to the system when they are freed.

    The counter of occurrences is a table of some 20 MB that Python makes anew now and then. By default glibc keeps the
    freed one, small blocks settle in it, and the next table needs new memory (mallopt(3): the threshold is moved by the
    first such block that is freed, unless it is set). Other C libraries have no such setting, and need none.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
