from __future__ import annotations

from ingestor.telemetry.liveness import GRACE, PATIENCE, LivenessDeadline
from tests.clocks import ManualClock


def test_a_missed_deadline_is_stuck() -> None:
    """A loop is stuck when it is late by more than the grace; when it is back, it is not stuck any more."""
    clock = ManualClock()
    liveness = LivenessDeadline(clock)
    liveness.expect_within(10)
    found = []
    for seconds in (10 + GRACE, 1):
        clock.advance(seconds)
        found.append(liveness.is_stuck)
    liveness.extend()
    clock.advance(PATIENCE + GRACE)
    assert [*found, liveness.is_stuck] == [False, True, False]


def test_a_cleared_deadline_is_not_stuck() -> None:
    """Without a database there is nothing to do, for as long as it takes."""
    clock = ManualClock()
    liveness = LivenessDeadline(clock)
    liveness.extend()
    liveness.clear()
    clock.advance(1e9)
    assert not liveness.is_stuck
