from __future__ import annotations

import json
from datetime import UTC, timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ingestor.backfill.answers import MalformedAnswerError, summarize
from ingestor.backfill.bars import Question, parse_bars
from ingestor.backfill.listing import parse_instruments
from ingestor.model import BAR_LENGTH
from tests.unit.test_rest_answers import QUESTION, START, ZONE, bar, taken

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
stamps = (
    st.datetimes(timezones=st.sampled_from([None, UTC, ZONE])).map(lambda moment: moment.isoformat())
    | st.integers(-3, 13).map(lambda minute: bar(minute)["timestamp"])
    | st.sampled_from(["0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "9999-12-31", "0001-01-01"])
    | st.text(max_size=30)
)
numbers = (
    st.integers() | st.floats() | st.floats().map(str) | st.none() | st.sampled_from([0, 1, 2.5, 10**400, -(10**4000)])
)
records = json_values | st.fixed_dictionaries(
    {},
    optional={
        "timestamp": stamps | json_values,
        "symbol": st.text(max_size=40) | json_values,
        **dict.fromkeys(("open", "high", "low", "close", "volume"), numbers | json_values),
    },
)
answers = st.fixed_dictionaries(
    {},
    optional={
        "data": st.lists(records, max_size=6) | json_values,
        "hits": st.integers(0, 6) | json_values,
        "ticker": st.sampled_from(["AIR.NZ", "FPH.NZ"]) | json_values,
        "date_from": stamps | json_values,
        "date_to": stamps | json_values,
        **dict.fromkeys(("interval", "exchange"), json_values),
    },
)
bodies = st.binary(max_size=200) | answers.map(lambda answer: json.dumps(answer).encode())
questions = st.builds(
    lambda minute, length, label: Question(
        "AIR.NZ", START + minute * BAR_LENGTH, START + (minute + length) * BAR_LENGTH, label, ZONE
    ),
    # Around START, and around the days on which the clocks change.
    st.integers(-5, 5) | st.integers(-55 * 1440, -54 * 1440) | st.integers(134 * 1440, 135 * 1440),
    st.integers(1, 300),
    st.sampled_from(["start", "end"]),
)


@given(bodies, questions)
def test_arbitrary_answers(body: bytes, question: Question) -> None:
    """Any bytes give valid bars in the range and faults, or the documented error."""
    try:
        found = parse_bars(body, question)
    except MalformedAnswerError as error:
        str(error).encode()
    else:
        assert len(found.bars) + len(found.faults) <= found.records
        for each in found.bars:
            assert question.since <= each.time < question.until
            assert each.time == each.time.replace(second=0, microsecond=0)
            assert 0 < each.low <= min(each.open, each.close) <= max(each.open, each.close) <= each.high < float("inf")
            assert 0 <= each.volume < 2**63
        assert "\0" not in summarize(found.faults, found.records)
    try:
        listed = parse_instruments(body)
    except MalformedAnswerError as error:
        str(error).encode()
    else:
        assert all(each.symbol.isprintable() for each in listed.listed)


@given(st.lists(st.integers(0, 9), unique=True, min_size=1), records, st.integers(0, 9))
def test_a_bad_record_is_the_only_one_refused(minutes: list[int], odd: Any, position: int) -> None:
    """Good bars of other minutes are kept beside any bad record, and each bad record is reported."""
    given_records = [bar(minute) for minute in minutes]
    given_records.insert(position, odd)
    found = parse_bars(json.dumps({"data": given_records}).encode(), QUESTION)
    kept = {each.time: each for each in found.bars}
    doubtful = {fault.time for fault in found.faults}
    for minute in minutes:
        assert kept.get(START + minute * BAR_LENGTH) == taken(minute) or START + minute * BAR_LENGTH in doubtful
    assert not found.faults or all(fault.time is None or fault.time > START - BAR_LENGTH for fault in found.faults)


@given(st.integers(-55 * 1440, -54 * 1440) | st.integers(134 * 1440, 135 * 1440), st.integers(1, 300))
def test_the_clocks_change(minute: int, length: int) -> None:
    """The requested wall time spans the requested range and little more: an hour before, or two after."""
    question = Question("AIR.NZ", START + minute * BAR_LENGTH, START + (minute + length) * BAR_LENGTH, "start", ZONE)
    hour = timedelta(hours=1)
    assert question.first - hour <= question.earliest <= question.first
    assert question.end <= question.latest <= question.end + 2 * hour
