from __future__ import annotations

from uuid import UUID

import pytest

from ingestor.model import Batch, Session
from ingestor.store.proof import proof

SESSION = Session(UUID(int=1), "test", "ws://localhost/ws", 0)


def batch(number: int, before: int, count: int, covered_until: int | None) -> Batch:
    return Batch(SESSION, number, b"", count, covered_until=covered_until, messages_before=before)


@pytest.mark.parametrize(
    ("held", "batches", "expected"),
    [
        (0, [batch(1, 0, 5, 10)], (10, 0)),
        (5, [batch(2, 5, 5, 10), batch(3, 10, 0, 20), batch(7, 10, 1, 30)], (30, 0)),  # heartbeats were merged
        (3, [batch(2, 5, 5, 10)], (None, 2)),
        (3, [batch(2, 5, 5, 10), batch(3, 10, 5, 20)], (None, 2)),
        (5, [batch(2, 5, 5, 10), batch(4, 14, 5, 20), batch(5, 19, 0, 30)], (10, 4)),
        (0, [batch(1, 0, 0, None), batch(2, 0, 3, 10)], (10, 0)),
        (0, [batch(2, 4, 0, None), batch(3, 4, 3, 10)], (None, 4)),  # it began among the missing messages
        (9, [batch(2, 5, 5, 10)], (10, 0)),
    ],
)
def test_missing_messages_prove_nothing(held: int, batches: list[Batch], expected: tuple[int | None, int]) -> None:
    """Coverage ends at the first missing message, before the batches or between them."""
    assert proof(batches, held) == expected
