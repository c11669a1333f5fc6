"""Many rejections without a tick make the daemon unready."""

from __future__ import annotations

import pytest

from ingestor.clock import SystemClock
from ingestor.model import SECOND, Batch, EndReason, Micros, Rejection, Session, SessionEnd
from ingestor.service.recorder import new_session_id
from ingestor.telemetry.events import Telemetry
from ingestor.telemetry.rejections import RejectionRun

SESSION = Session(new_session_id(0), "test", "ws://localhost/ws", 0)
T0: Micros = 1_790_000_000 * SECOND


def batch(*times: float, tick: float | None = None, last: float | None = None) -> Batch:
    """Return a batch with rejections at these seconds, perhaps a tick, and an earlier `last` tick."""
    rejections = tuple(
        Rejection(number, T0 + round(time * SECOND), "unknown_type", b"", 0) for number, time in enumerate(times, 1)
    )
    ticked = tick if tick is not None else last
    return Batch(
        SESSION,
        1,
        count=int(tick is not None),
        span=(T0, T0) if tick is not None else None,
        rejections=rejections,
        last_message_at=T0 + round(max(*times, tick or 0, 0) * SECOND),
        last_tick_at=None if ticked is None else T0 + round(ticked * SECOND),
    )


@pytest.mark.parametrize(
    ("batches", "problem"),
    [
        ([batch(0, 1, 2, 3, 4, 5)], True),
        ([batch(second) for second in range(6)], True),
        ([batch(0), batch(30), batch(60)], True),
        ([batch(0, 5)], False),  # too few
        ([batch(*(number / 1000 for number in range(100)))], False),  # a burst, then silence
        ([batch(*(hour * 3600 for hour in range(10)))], False),  # notices at night
        ([batch(0, 1, 2, 3, 4), batch(5, tick=4.5), batch(6)], False),
        ([batch(*range(10)), batch(10, tick=10.5)], False),  # ended by the first tick
        ([batch(0, tick=0.5), batch(*range(1, 7), last=0.5)], True),
        ([batch(1, 2, tick=0), batch(7, last=0)], True),
        ([batch(*range(10)), batch(3600)], True),  # a pause does not end it
    ],
)
def test_a_feed_that_cannot_be_read(batches: list[Batch], problem: bool) -> None:
    """Three rejections or more over five seconds without a tick among them, and in each minute one, are too many."""
    run = RejectionRun()
    for each in batches:
        run.add(each)
    assert run.is_problem is problem


def test_readiness_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """The daemon is unready with the reason, also after a reconnect, until a tick; the log has start and end once."""
    telemetry = Telemetry(SystemClock())
    telemetry.readiness.passes("database")
    telemetry.connected(SESSION)
    telemetry.authenticated(SESSION, T0)
    telemetry.batch_closed(batch(0), 0.05)
    assert not telemetry.readiness.problems
    telemetry.batch_closed(batch(1, 2, 3, 4, 5), 0.05)
    telemetry.batch_closed(batch(6), 0.05)
    (problem,) = telemetry.readiness.problems
    assert (problem.check, problem.since) == ("stream", T0)
    assert problem.detail == "No ticks: 7 messages were rejected, most of them as unknown_type."
    telemetry.session_ended(SESSION, SessionEnd(T0 + 7 * SECOND, EndReason.STALL), "No tick for 4 s in trading hours.")
    assert telemetry.readiness.problems[0].detail == "No tick for 4 s in trading hours."
    telemetry.authenticated(SESSION, T0 + 8 * SECOND)
    assert telemetry.readiness.problems[0].detail == problem.detail
    telemetry.batch_closed(batch(tick=9), 0.05)
    assert not telemetry.readiness.problems
    lines = capsys.readouterr().out.splitlines()
    assert [name for line in lines for name in ("ticks_missing", "ticks_back") if name in line] == [
        "ticks_missing",
        "ticks_back",
    ]
