"""The memory for what is read from the record, divided among the clients that read it."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from ingestor.relay.budget import ALL, LEAST, MOST, ReadBudget


@pytest.mark.parametrize("clients", [1, 10, 11, 50, 200, 10_000])
def test_many_readers_hold_no_more_than_a_few(clients: int) -> None:
    """A client alone reads whole pages; many together read shorter ones, but never none."""
    budget = ReadBudget()
    with ExitStack() as stack:
        share = [stack.enter_context(budget.share()) for _ in range(clients)][-1]
        assert LEAST <= share <= MOST
        assert share * clients <= max(ALL, LEAST * clients)
    with budget.share() as share:
        assert share == MOST
