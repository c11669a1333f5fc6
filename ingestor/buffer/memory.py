"""The part of the buffer in this process's memory: the newest batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from ingestor.buffer.spool import Entry
from ingestor.model import Batch


def merges(older: Batch, newer: Batch) -> bool:
    """Return whether the newer batch replaces the older one: both are heartbeats of one session."""
    return older.is_heartbeat and newer.is_heartbeat and older.session.id == newer.session.id


def without_coverage(batch: Batch) -> Batch:
    """Return the same batch without its claims: of coverage, and of all ticks before its cursor."""
    return replace(batch, covered_until=None, cursor=None)


class Memory:
    """A queue of entries with its exact size in bytes, and the arrival of each entry in monotonic seconds."""

    def __init__(self) -> None:
        self._entries: deque[tuple[Entry, float]] = deque()
        self.size = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return (entry for entry, _ in self._entries)

    @property
    def oldest_since(self) -> float:
        """The arrival of the oldest entry."""
        return self._entries[0][1]

    def add(self, entry: Entry, now: float) -> None:
        """Add the newest entry; a heartbeat replaces its session's heartbeat directly before it."""
        if self._entries and merges(self._entries[-1][0].batch, entry.batch):
            self.size -= self._entries.pop()[0].batch.size
        self._entries.append((entry, now))
        self.size += entry.batch.size

    def oldest(self, max_rows: int, max_bytes: int, after: int = 0) -> list[Entry]:
        """Return the oldest entries behind a position up to the limits, at least one if there is any."""
        found: list[Entry] = []
        rows = size = 0
        for entry in self:
            if entry.position <= after:
                continue
            rows, size = rows + entry.batch.count, size + entry.batch.size
            if found and (rows > max_rows or size > max_bytes):
                break
            found.append(entry)
        return found

    def drop(self, upto: int) -> None:
        """Remove the entries up to a position."""
        while self._entries and self._entries[0][0].position <= upto:
            self.size -= self._entries.popleft()[0].batch.size

    def shift(self, positions: int) -> None:
        """Move all entries back in the queue by `positions`."""
        self._entries = deque((Entry(entry.position + positions, entry.batch), at) for entry, at in self._entries)

    def withdraw_coverage(self) -> None:
        """Remove the coverage of all entries, because an older batch was lost."""
        self._entries = deque((Entry(entry.position, without_coverage(entry.batch)), at) for entry, at in self._entries)
