"""How much one transaction holds: less after it was too much for the server or the path, more again after success.

No I/O. A batch that is too large alone is written in parts. The session's row says how many messages of it are there,
so a part counts once, whichever process writes the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ingestor.batch import row_ends
from ingestor.model import Batch, Rejection

NORMAL_BYTES = 8 * 2**20
"""More than one batch, or all that the buffer joins, ever holds."""

SMALLEST_BYTES = 64
"""About one row. A transaction holds one message at least, however large that is."""

MAX_SUCCESSES = 64
"""Commits between two trials of twice the size at most. A trial that fails costs a timeout."""


class AdaptiveLimit:
    """A limit between `smallest` and `normal`: halved by a failure, doubled by success.

    The first success doubles it. Each trial of a larger value that fails doubles the successes before the next trial,
    so that a limit which stays costs one failure for 64 commits. A trial that succeeds makes the next one follow at
    once.
    """

    def __init__(self, smallest: int, normal: int) -> None:
        self.value = self._normal = normal
        self._smallest = smallest
        self._successes = 0
        self._needed = 1
        self._is_trial = False

    @property
    def is_normal(self) -> bool:
        """Whether nothing limits a transaction now."""
        return self.value >= self._normal

    def failed(self, tried: int) -> bool:
        """Halve the limit, from the amount that was tried. Return whether the next transaction holds less."""
        smaller = max(self._smallest, min(self.value, tried) // 2)
        if self._is_trial:
            self._needed = min(MAX_SUCCESSES, 2 * self._needed)
        self._is_trial, self._successes = False, 0
        shrinks, self.value = smaller < self.value, smaller
        return shrinks

    def succeeded(self, tried: int) -> None:
        """Double the limit, if there were enough successes since the last change."""
        if self.is_normal:
            return
        if self._is_trial and 2 * tried > self.value:
            self._is_trial, self._needed = False, 1
        self._successes += 1
        if self._successes >= self._needed:
            self.value = min(self._normal, 2 * self.value)
            self._is_trial, self._successes = True, 0
        if self.value == self._normal:
            self._is_trial, self._needed = False, 1


class TransactionSize:
    """The adaptive limit of one transaction in bytes, up to `NORMAL_BYTES`."""

    def __init__(self) -> None:
        self._limit = AdaptiveLimit(SMALLEST_BYTES, NORMAL_BYTES)

    @property
    def max_bytes(self) -> int:
        """The limit."""
        return self._limit.value

    @max_bytes.setter
    def max_bytes(self, value: int) -> None:
        self._limit.value = value

    @property
    def is_normal(self) -> bool:
        """Whether nothing limits a transaction now."""
        return self._limit.is_normal

    def choose(self, batches: Sequence[Batch]) -> list[Batch]:
        """Return the oldest batches that one transaction may hold. A single one may be too large, and is parted."""
        chosen: list[Batch] = []
        size = 0
        for batch in batches:
            size += batch.size
            if chosen and size > self.max_bytes:
                break
            chosen.append(batch)
        return chosen

    def failed(self, batches: Sequence[Batch]) -> bool:
        """Halve the limit, from the size that was tried. Return whether the next transaction holds less."""
        return self._limit.failed(sum(batch.size for batch in batches))

    def succeeded(self, batches: Sequence[Batch]) -> None:
        """Double the limit, if there were enough successes since the last change."""
        self._limit.succeeded(sum(batch.size for batch in batches))


def part_of(batch: Batch, after: int, max_bytes: int) -> tuple[Batch, int | None]:
    """Return the messages of a batch behind its first `after` ones, up to `max_bytes`, at least one.

    Also returns how many of its messages are written with them; None where these are all. Only the last part says
    what the batch says of its session: coverage, the last arrival and the end. Positions stay those of the batch.
    """
    if not after and batch.size <= max_bytes:
        return batch, None
    begin = end = size = 0
    until, total = after, batch.count + len(batch.rejections)
    for position, row_end, cost in _messages(batch):
        if position <= after:
            begin = end = row_end
        elif position > after + 1 and size + cost > max_bytes:
            break
        else:
            size, end, until = size + cost, row_end, position
    rejections = tuple(each for each in batch.rejections if after < each.position <= until)
    part = replace(
        batch,
        rows=batch.rows[begin:end],
        count=until - after - len(rejections),
        rejections=rejections,
        messages_before=batch.messages_before + after,
    )
    if until >= total:
        return part, None
    return (
        replace(
            part,
            authenticated_at=None,
            covered_until=None,
            last_message_at=None,
            last_tick_at=None,
            cursor=None,
            end=None,
        ),
        until,
    )


def _messages(batch: Batch) -> Iterator[tuple[int, int, int]]:
    """Yield the position of each message, where the rows up to it end, and its bytes."""
    rejections: dict[int, Rejection] = {each.position: each for each in batch.rejections}
    ends = row_ends(batch.rows)
    end = 0
    for position in range(1, batch.count + len(rejections) + 1):
        if (rejection := rejections.get(position)) is not None:
            yield position, end, 256 + len(rejection.raw)
        else:
            begin, end = end, next(ends)
            yield position, end, end - begin
