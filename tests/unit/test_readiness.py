from __future__ import annotations

from ingestor.model import SECOND
from ingestor.telemetry.readiness import Problem, Readiness
from tests.clocks import ManualClock


def test_a_problem_is_as_old_as_its_first_sign() -> None:
    """The reason is the current one; the time is the start of the uninterrupted failure."""
    clock = ManualClock()
    readiness = Readiness(clock)
    first = clock.wall()
    readiness.fails("database", "refused")
    clock.advance(10)
    readiness.fails("database", "no schema")
    readiness.fails("stream", "cut", since=first - SECOND)
    assert readiness.problems == (
        Problem("stream", first - SECOND, "cut"),
        Problem("database", first, "no schema"),
    )
    readiness.passes("database")
    readiness.passes("spool")
    readiness.fails("database", "refused")
    assert readiness.problems[1] == Problem("database", clock.wall(), "refused")


def test_a_symptom_never_hides_the_cause() -> None:
    """The cause stays, with the current symptom beside it; both are cleared when the check passes."""
    clock = ManualClock()
    readiness = Readiness(clock)
    first = clock.wall()
    readiness.shows("database", "Nothing was committed for 15 s.", first)
    assert readiness.problems == (Problem("database", first, "Nothing was committed for 15 s."),)
    readiness.fails("database", "Run `ingestor migrate`.")
    readiness.shows("database", "Nothing was committed for 66 s.", clock.wall())
    assert readiness.problems == (
        Problem("database", first, "Run `ingestor migrate`. Nothing was committed for 66 s."),
    )
    readiness.passes("database")
    readiness.fails("database", "refused")
    assert [problem.detail for problem in readiness.problems] == ["refused"]
