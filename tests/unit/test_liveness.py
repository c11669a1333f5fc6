from __future__ import annotations

from ingestor.telemetry.liveness import LIVENESS_GRACE_SECONDS, LIVENESS_STEP_SECONDS, LivenessDeadline
from tests.clocks import ManualClock


def test_a_missed_deadline_is_stuck() -> None:
    """A loop is stuck while it is past its deadline by more than the grace."""
    clock = ManualClock()
    liveness = LivenessDeadline(clock)
    liveness.expect_within(10)
    found = []
    for seconds in (10 + LIVENESS_GRACE_SECONDS, 1):
        clock.advance(seconds)
        found.append(liveness.is_stuck)
    liveness.extend()
    clock.advance(LIVENESS_STEP_SECONDS + LIVENESS_GRACE_SECONDS)
    assert [*found, liveness.is_stuck] == [False, True, False]


def test_a_cleared_deadline_is_not_stuck() -> None:
    """A loop without a deadline is not stuck, however long the database is unavailable."""
    clock = ManualClock()
    liveness = LivenessDeadline(clock)
    liveness.extend()
    liveness.clear()
    clock.advance(1e9)
    assert not liveness.is_stuck
