from __future__ import annotations

from tests.cluster.faults import KINDS, schedule
from tests.cluster.results import Episode, longest_pause, table

S = 1_000_000


def test_the_longest_pause_around_a_fault() -> None:
    """A pause counts if it touches the fault; later ones do not."""
    commits = [0 * S, 1 * S, 2 * S, 7 * S, 8 * S, 9 * S, 20 * S]
    assert longest_pause(commits, 3 * S, 8 * S) == 5.0


def test_no_commit_during_a_fault() -> None:
    """The pause reaches from the last commit before the fault to the first one after it."""
    assert longest_pause([1 * S, 30 * S], 10 * S, 20 * S) == 29.0


def test_the_table_has_a_row_for_each_kind() -> None:
    """Times, median and longest pause of each kind on each path."""
    episodes = [Episode("direct", "switchover", pause) for pause in (1.0, 2.0, 6.0)]
    assert table(episodes).splitlines()[2:] == ["| direct | switchover | 3 | 2.0 s | 6.0 s |"]


def test_the_schedule_repeats() -> None:
    """The same seed draws the same faults, and each round has each kind once."""
    kinds = list(KINDS)
    drawn = schedule(7, 2 * len(kinds), kinds)
    assert drawn == schedule(7, 2 * len(kinds), kinds)
    assert {entry.kind for entry in drawn[: len(kinds)]} == set(kinds)
