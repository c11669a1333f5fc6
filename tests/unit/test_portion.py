from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestor.batch import Batcher
from ingestor.errors import StoreError
from ingestor.model import SECOND, Batch, EndReason, Reason, Session, SessionEnd, Tick
from ingestor.store.portion import NORMAL_BYTES, SMALLEST_BYTES, TransactionSize, part_of
from ingestor.store.retry import may_be_too_large

SESSION = Session(UUID(int=1), "test", "ws://localhost/ws", 0)
T0 = 1_790_000_000 * SECOND


def batch_of(messages: list[int]) -> Batch:
    """Return a batch with a tick for each even number, and a rejection of that length for each odd one."""
    batcher = Batcher(SESSION, max_rows=5000, occurrence_keys=1000)
    batcher.authenticated(T0)
    for number in messages:
        if number % 2:
            batcher.reject(b"x" * number, Reason.NOT_JSON, T0)
        else:
            batcher.add(Tick("Ω" * (1 + number % 7), T0, 1.0, number), T0)
    return replace(batcher.close(SessionEnd(T0, EndReason.CLOSED)), messages_before=100)


@given(st.lists(st.integers(0, 99), max_size=40), st.lists(st.integers(64, 3000), min_size=1, max_size=5))
def test_the_portions_add_up_to_the_batch(messages: list[int], sizes: list[int]) -> None:
    """Each message is in one portion, in its place, for any sizes; only the last portion covers or ends."""
    batch = batch_of(messages)
    parts: list[Batch] = []
    after = 0
    while True:
        max_bytes = sizes[len(parts) % len(sizes)]
        part, until = part_of(batch, after, max_bytes)
        assert part.messages_before == 100 + after
        parts.append(part)
        held = part.count + len(part.rejections)
        assert held <= 1 or len(part.rows) + sum(256 + len(each.raw) for each in part.rejections) <= max_bytes
        if until is None:
            break
        assert until == after + held > after
        after = until
    assert b"".join(part.rows for part in parts) == batch.rows
    assert sum(part.count for part in parts) == batch.count
    assert tuple(each for part in parts for each in part.rejections) == batch.rejections
    for part in parts[:-1]:
        assert (part.covered_until, part.authenticated_at, part.last_message_at, part.end) == (None,) * 4
    last = replace(parts[-1], rows=batch.rows, count=batch.count, rejections=batch.rejections)
    assert replace(last, messages_before=100) == batch


@given(st.integers(2000, 10**6), st.integers(1, 300))
def test_a_permanent_limit_is_found_and_rarely_retried(limit: int, backlog: int) -> None:
    """A backlog passes any limit with few failures; when the limit goes, the size is soon normal."""
    size = TransactionSize()
    waiting = [Batch(SESSION, number, b"x" * 8000, 100) for number in range(backlog)]
    failures = commits = 0
    while waiting:
        chosen = size.choose(waiting)
        tried = min(size.max_bytes, sum(batch.size for batch in chosen))
        if tried > limit:
            assert size.failed(chosen)
            failures += 1
        else:
            size.succeeded(chosen)
            commits += 1
            if len(chosen) > 1 or chosen[0].size <= size.max_bytes:
                waiting = waiting[len(chosen) :]
            elif commits % 5 == 0:  # several portions make a batch
                waiting = waiting[1:]
    assert failures <= 14 + commits / 5
    for _ in range(64 + 17):
        size.succeeded([Batch(SESSION, 1, b"x" * size.max_bytes, 1)])
    assert size.is_normal


def test_permanent_failures_stop_shrinking() -> None:
    """At about one row the size stops shrinking, and the next retry waits as usual; full size takes 17 commits more."""
    size = TransactionSize()
    shrinks = [size.failed([Batch(SESSION, 1, b"x" * 2**20, 100)]) for _ in range(20)]
    assert shrinks == [True] * 14 + [False] * 6
    assert size.max_bytes == SMALLEST_BYTES
    for _ in range(17):
        assert not size.is_normal
        size.succeeded([Batch(SESSION, 1)])
    assert size.max_bytes == NORMAL_BYTES


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        *((state, True) for state in (None, "57014", "53000", "53200", "53400", "54000", "54023", "25P03", "25P04")),
        *((state, True) for state in ("57P01", "57P02", "57P05", "08006", "08P01")),
        *((state, False) for state in ("40P01", "53100", "53300", "55P03", "23505", "23514", "25006", "P0001")),
    ],
)
def test_failures_that_shrink_the_transaction(state: str | None, expected: bool) -> None:
    """Limits of time, memory and size shrink it; a row's fault, a full disk and a missing privilege do not."""
    assert may_be_too_large(StoreError("x", sqlstate=state)) is expected
