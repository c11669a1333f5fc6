from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestor.clock import from_datetime
from ingestor.model import DAY, SECOND, Micros, Reason, Tick
from ingestor.relay.coverage import coverage_message, coverage_messages
from ingestor.relay.encoder import Encoder
from ingestor.stream.decoder import Authenticated, Decoder, Refused, ServerError
from ingestor.stream.frames import whole_texts
from ingestor.stream.recorded import Covered, NotARelay, RecordedDecoder, RecordedTick

NOW: Micros = 1_790_000_000 * SECOND
PRICE: dict[str, Any] = {
    "date": "2026-09-21T22:00:00+12:00",
    "price": 2.61,
    "volume": 5000,
    "symbol": "AIR.NZ",
    "received_at": "2026-09-21T10:00:00.123456Z",
    "occurrence": 2,
    "cursor": "0123abcd.17.3",
}
TIME = from_datetime(datetime.fromisoformat(PRICE["date"]))


def decode(content: Any, *, binary: bool = False) -> Any:
    frame = content if isinstance(content, bytes) else json.dumps(content).encode()
    return RecordedDecoder(Decoder("Pacific/Auckland")).decode(frame, NOW, binary=binary)


def price(**changes: Any) -> dict[str, Any]:
    data = {**PRICE, **changes}
    return {"type": "price", "data": {name: value for name, value in data.items() if value is not None}}


def test_a_tick_as_it_is_on_record() -> None:
    """Arrival, number and cursor are those of the relay."""
    expected = RecordedTick(Tick("AIR.NZ", TIME, 2.61, 5000), TIME + 123_456, 2, "0123abcd.17.3")
    assert decode(price()) == expected


@pytest.mark.parametrize("name", ["received_at", "occurrence", "cursor"])
def test_a_server_that_is_no_relay(name: str) -> None:
    """A price without one of them is not stored: its number or its arrival would be made up."""
    assert decode(price(**{name: None})) == NotARelay()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"received_at": "yesterday"}, Reason.DATE_INVALID),
        ({"received_at": "1989-06-01T00:00:00Z"}, Reason.DATE_OUT_OF_RANGE),
        ({"received_at": "2999-01-01T00:00:00Z"}, Reason.DATE_OUT_OF_RANGE),
        ({"occurrence": -1}, Reason.WRONG_TYPE),
        ({"occurrence": 2**31}, Reason.WRONG_TYPE),
        ({"cursor": "x" * 5000}, Reason.WRONG_TYPE),
        ({"volume": 1.5}, Reason.VOLUME_FRACTIONAL),
        ({"price": "x"}, Reason.PRICE_INVALID),
        ({"symbol": ""}, Reason.SYMBOL_INVALID),
        ({"date": "2026-09-30T00:00:00Z"}, Reason.DATE_OUT_OF_RANGE),
    ],
)
def test_refused_ticks(changes: dict[str, Any], reason: Reason) -> None:
    """An unreadable tick is kept with its reason, as one of the provider is."""
    assert decode(price(**changes)) == Refused(reason)


def test_rare_numbers() -> None:
    """Numbers that only the slow decoder reads are read exactly."""
    found = decode(json.dumps(price()).replace("5000", "9007199254740993.0").encode())
    assert found.tick.volume == 9007199254740993
    assert (found.occurrence, found.received_at) == (2, TIME + 123_456)


def test_other_messages() -> None:
    """Messages of the common protocol, and broken ones, are read as those of the provider."""
    assert decode({"type": "authenticated", "data": {"message": "x"}}) == Authenticated()
    assert decode({"type": "error", "data": {"message": "resume: x"}}) == ServerError("resume: x")
    assert decode({"type": "news"}) == Refused(Reason.UNKNOWN_TYPE)
    assert decode(b"{") == Refused(Reason.NOT_JSON)
    assert decode(b"\xff") == Refused(Reason.INVALID_UTF8)
    assert decode(b"{}", binary=True) == Refused(Reason.BINARY_FRAME)
    assert decode(b"[" * 100_000) == Refused(Reason.NOT_JSON)


@pytest.mark.parametrize(
    "data", [{"from": "x", "to": "2026-01-01T00:00:00Z"}, {"from": "2026-01-01T00:00:00Z"}, {}, None]
)
def test_broken_coverage(data: Any) -> None:
    """A broken message on coverage covers nothing."""
    assert isinstance(decode({"type": "coverage", "data": data}), Refused)


def test_reversed_coverage() -> None:
    """Nor does one whose end is before its beginning."""
    data = {"from": "2026-01-02T00:00:00Z", "to": "2026-01-01T00:00:00Z"}
    assert decode({"type": "coverage", "data": data}) == Refused(Reason.DATE_INVALID)


def test_what_the_relay_encodes() -> None:
    """The decoder returns what the relay's encoder was given, to the microsecond."""
    row = (NOW - DAY, NOW - 1, 0.1 + 0.2, 2**62, 7, "Ω.NZ".encode())
    (payload,), _ = whole_texts(Encoder("Pacific/Auckland").frames([row], lambda _: "c.1.2"), 0)
    assert decode(payload) == RecordedTick(Tick("Ω.NZ", NOW - DAY, 0.1 + 0.2, 2**62), NOW - 1, 7, "c.1.2")
    (payload,), _ = whole_texts(coverage_message(NOW - 5, NOW), 0)
    assert decode(payload) == Covered(NOW - 5, NOW)
    (payload,), _ = whole_texts(coverage_message(NOW - SECOND, NOW, is_complete=False), 0)
    assert decode(payload) == Covered(NOW - SECOND, NOW, is_complete=False)


@pytest.mark.parametrize(
    ("spans", "stated_until", "expected"),
    [
        ([], 10, []),
        ([(0, 5)], 10, []),
        ([(0, 20)], 10, [Covered(10, 20)]),
        ([(0, 20), (30, 40)], 20, [Covered(10, 20), Covered(30, 40)]),
        ([(15, 20)], 20, [Covered(15, 20)]),
        ([(0, 15)], 20, [Covered(15, 20, is_complete=False), Covered(10, 15)]),
        ([(0, 15), (30, 40)], 20, [Covered(15, 20, is_complete=False), Covered(10, 15), Covered(30, 40)]),
        ([(0, 5)], 20, [Covered(10, 20, is_complete=False)]),
        ([], 20, [Covered(10, 20, is_complete=False)]),
        ([(20, 30)], 20, [Covered(10, 20, is_complete=False), Covered(20, 30)]),
    ],
)
def test_statements_of_coverage(spans: list[tuple[int, int]], stated_until: int, expected: list[Covered]) -> None:
    """A client from 10 on is sent the spans, and first what of its last span is not covered after all."""
    frames = b"".join(coverage_messages([(at(begin), at(end)) for begin, end in spans], at(10), at(stated_until)))
    found = [decode(payload) for payload in whole_texts(frames, 0)[0]]
    assert found == [Covered(at(each.since), at(each.until), each.is_complete) for each in expected]


def at(seconds: int) -> Micros:
    return NOW + seconds * SECOND


@given(
    st.one_of(
        st.binary(max_size=200),
        st.fixed_dictionaries(
            {},
            optional={
                "type": st.sampled_from(["price", "coverage", "error", 1]),
                "data": st.dictionaries(
                    st.sampled_from([*PRICE, "from", "to", "complete"]),
                    st.one_of(st.sampled_from(list(PRICE.values())), st.text(max_size=30), st.integers(), st.none()),
                ),
            },
        ).map(lambda content: json.dumps(content).encode()),
    )
)
def test_any_message(frame: bytes) -> None:
    """Anything that a server sends becomes a message or a reason, never an error; a tick has valid numbers."""
    message = decode(frame)
    if isinstance(message, RecordedTick):
        assert message.occurrence >= 1
        assert message.received_at <= NOW + DAY
