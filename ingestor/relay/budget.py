"""Divides the memory for what is read from the record among the clients that read it. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

MOST, LEAST = 5000, 250
"""Ticks that one client may read at once: alone, and beside any number of others."""

ALL = 50_000
"""Ticks that all clients may hold together, as long as each has more than the least."""


class ReadBudget:
    """Counts the clients that hold a part of the record: a slow one holds it until it has accepted all of it."""

    def __init__(self) -> None:
        self._readers = 0

    @contextmanager
    def share(self) -> Iterator[int]:
        """Hold a part of the record for a while: the number of ticks that it may have."""
        self._readers += 1
        try:
            yield max(LEAST, min(MOST, ALL // self._readers))
        finally:
            self._readers -= 1
