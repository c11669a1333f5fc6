"""The conversion between instants and `datetime`."""

from __future__ import annotations

import calendar
import random
from datetime import UTC, datetime, timedelta, timezone

import pytest

from ingestor.clock import from_datetime, to_datetime
from ingestor.model import SECOND, Micros

FIRST: Micros = calendar.timegm((1990, 1, 1, 0, 0, 0)) * SECOND
LAST: Micros = calendar.timegm((2201, 1, 1, 0, 0, 0)) * SECOND - 1


def oracle(moment: datetime) -> Micros:
    """Return the instant of a moment in UTC, computed in integers."""
    return calendar.timegm(moment.timetuple()) * SECOND + moment.microsecond


def test_round_trip_is_exact_to_the_microsecond() -> None:
    """Every microsecond from 1990 to 2200 becomes its own moment and comes back."""
    numbers = random.Random(1)
    edges = [instant + step for instant in (FIRST, LAST) for step in (0, 1, -1)]
    for instant in [*edges, *(numbers.randint(FIRST, LAST) for _ in range(20_000))]:
        moment = to_datetime(instant)
        assert moment.tzinfo is UTC
        assert oracle(moment) == instant == from_datetime(moment)


@pytest.mark.parametrize("instant", [-1, -SECOND, -SECOND - 1, -(SECOND // 2), -631_152_000 * SECOND + 1])
def test_instants_before_the_epoch(instant: Micros) -> None:
    """A negative instant is exact, too."""
    assert oracle(to_datetime(instant)) == instant == from_datetime(to_datetime(instant))


def test_one_microsecond_before_the_epoch() -> None:
    """Division rounds down, never towards zero."""
    assert to_datetime(-1) == datetime(1969, 12, 31, 23, 59, 59, 999_999, UTC)
    assert from_datetime(datetime(1969, 12, 31, 23, 59, 59, 999_999, UTC)) == -1


def test_other_time_zones() -> None:
    """A moment with another offset is the same instant."""
    moment = datetime(2026, 3, 2, 10, 0, 0, 1, timezone(timedelta(hours=13)))
    assert from_datetime(moment) == oracle(datetime(2026, 3, 1, 21, 0, 0, 1, UTC))


def test_beyond_the_calendar() -> None:
    """An instant after the year 9999 has no `datetime`."""
    with pytest.raises(OverflowError):
        to_datetime(oracle(datetime(9999, 12, 31, 23, 59, 59, 999_999, UTC)) + 1)
