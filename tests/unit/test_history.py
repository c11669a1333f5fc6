from __future__ import annotations

from ingestor.telemetry.history import HISTORY_STEPS, History, Step


def test_contents_of_a_step() -> None:
    """A step holds the sum of the ticks and the median and the maximum of the delays; the current step is not shown."""
    history = History(5.0)
    history.add_ticks(3, 6.0)
    history.add_ticks(4, 9.9)
    for delay in (0.3, 0.1, 0.2):
        history.add_delay(delay, 9.9)
    history.add_ticks(100, 10.0)
    assert history.steps(19.9) == [Step(7, 0.2, 0.3)]
    assert history.steps(20.0) == [Step(7, 0.2, 0.3), Step(100, None, None)]


def test_silence_fills_steps() -> None:
    history = History(0.0, step=2.0)
    history.add_ticks(1, 1.0)
    assert history.steps(6.0) == [Step(1, None, None), Step(0, None, None), Step(0, None, None)]


def test_only_the_last_hour_is_kept() -> None:
    """Steps older than an hour are removed, also after a pause of days."""
    history = History(0.0)
    history.add_ticks(1, 1.0)
    steps = history.steps(1e6)
    assert len(steps) == HISTORY_STEPS
    assert sum(step.ticks for step in steps) == 0
