from __future__ import annotations

from ingestor.model import SECOND
from ingestor.telemetry.readiness import Problem, Readiness
from tests.clocks import ManualClock


def test_a_problem_is_as_old_as_its_first_sign() -> None:
    """The reason is that of now, the time that since when the check has failed without a break."""
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
