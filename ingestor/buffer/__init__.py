"""The buffer: one FIFO between the stream, which must not wait, and the database, which may."""

from __future__ import annotations

from typing import Protocol

from ingestor.model import Batch

MAX_ROWS = 50_000
MAX_BYTES = 4 * 2**20
"""What is joined into one transaction at most, in ticks and in bytes."""


class Buffer(Protocol):
    """Holds batches from when they are closed until they are committed, oldest first, always.

    It is bounded: at its high mark `has_room` turns false, and stays so until it has drained to its low mark.
    What is put all the same is kept; that the stream then stops is the service's part.
    """

    @property
    def has_room(self) -> bool:
        """Whether the stream may go on."""
        ...

    @property
    def size(self) -> int:
        """Bytes held."""
        ...

    @property
    def depth(self) -> int:
        """Batches held."""
        ...

    def put(self, batch: Batch) -> None:
        """Add the newest batch. Never waits."""
        ...

    async def take(self, max_rows: int = MAX_ROWS, max_bytes: int = MAX_BYTES) -> tuple[Batch, ...]:
        """Wait for a batch, then return the oldest ones, at least one. They stay until `done` is called."""
        ...

    def done(self) -> None:
        """Forget the batches taken last: they are committed."""
        ...

    async def wait_for_room(self) -> None:
        """Wait until the stream may go on."""
        ...

    async def wait_until_empty(self) -> None:
        """Wait until everything is committed."""
        ...
