"""The buffer's memory: a bounded FIFO in this process."""

from __future__ import annotations

import asyncio
from collections import deque

from ingestor.buffer import MAX_BYTES, MAX_ROWS
from ingestor.model import Batch

LOW_MARK = 0.8
"""A full buffer takes ticks again when it has drained to this share of its bound."""


class MemoryBuffer:
    """A `Buffer` in memory, bounded by `max_bytes`. For one event loop."""

    def __init__(self, max_bytes: int) -> None:
        self._high, self._low = max_bytes, int(max_bytes * LOW_MARK)
        self._batches: deque[Batch] = deque()
        self._taken = 0
        self._size = 0
        self._filled, self._emptied, self._room = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._emptied.set()
        self._room.set()

    @property
    def has_room(self) -> bool:
        """Whether the stream may go on."""
        return self._room.is_set()

    @property
    def size(self) -> int:
        """Bytes held."""
        return self._size

    @property
    def depth(self) -> int:
        """Batches held."""
        return len(self._batches)

    def put(self, batch: Batch) -> None:
        """Add the newest batch; a heartbeat takes the place of its session's heartbeat before it."""
        if self._follows_heartbeat(batch):
            self._size -= self._batches.pop().size
        self._batches.append(batch)
        self._size += batch.size
        self._filled.set()
        self._emptied.clear()
        if self._size >= self._high:
            self._room.clear()

    def _follows_heartbeat(self, batch: Batch) -> bool:
        if not batch.is_heartbeat or len(self._batches) <= self._taken:
            return False
        last = self._batches[-1]
        return last.is_heartbeat and last.session.id == batch.session.id

    async def take(self, max_rows: int = MAX_ROWS, max_bytes: int = MAX_BYTES) -> tuple[Batch, ...]:
        """Wait for a batch, then return the oldest ones up to the limits, at least one."""
        await self._filled.wait()
        taken: list[Batch] = []
        rows = size = 0
        for batch in self._batches:
            rows, size = rows + batch.count, size + batch.size
            if taken and (rows > max_rows or size > max_bytes):
                break
            taken.append(batch)
        self._taken = len(taken)
        return tuple(taken)

    def done(self) -> None:
        """Forget the batches taken last."""
        for _ in range(self._taken):
            self._size -= self._batches.popleft().size
        self._taken = 0
        if not self._batches:
            self._filled.clear()
            self._emptied.set()
        if self._size <= self._low:
            self._room.set()

    async def wait_for_room(self) -> None:
        """Wait until the low mark is reached."""
        await self._room.wait()

    async def wait_until_empty(self) -> None:
        """Wait until everything is committed."""
        await self._emptied.wait()
