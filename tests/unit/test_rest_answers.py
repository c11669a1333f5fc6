from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from ingestor.backfill.answers import (
    MAX_VALUES,
    Fault,
    MalformedAnswerError,
    UnreadableAnswerError,
    shown,
    summarize,
)
from ingestor.backfill.bars import Bars, Question, parse_bars
from ingestor.backfill.listing import Instruments, parse_instruments
from ingestor.model import BAR_LENGTH, Bar, Instrument
from ingestor.redaction import register_secret

ZONE = ZoneInfo("Pacific/Auckland")
START = datetime(2026, 11, 19, 21, 0, tzinfo=UTC)  # 10:00 in Auckland
QUESTION = Question("AIR.NZ", START, START + 10 * BAR_LENGTH, "start", ZONE)
NONE = dict.fromkeys(("open", "high", "low", "close", "volume"))


def bar(minute: float, **changed: Any) -> dict[str, Any]:
    """Return a record as the API sends it: in Auckland's time, without an offset."""
    stamp = (START + minute * BAR_LENGTH).astimezone(ZONE).replace(tzinfo=None).isoformat()
    return {"timestamp": stamp, "open": 2.0, "high": 3.0, "low": 1.0, "close": 2.5, "volume": 5, **changed}


def taken(minute: int) -> Bar:
    return Bar(START + minute * BAR_LENGTH, 2.0, 3.0, 1.0, 2.5, 5)


def parse(*records: Any, question: Question = QUESTION, **fields: Any) -> Bars:
    return parse_bars(json.dumps({"data": records, **fields}).encode(), question)


def test_an_empty_answer() -> None:
    """An answer without records means no trades."""
    assert parse() == parse(hits=0, ticker="AIR.NZ", interval="1m", exchange="NZX") == Bars((), 0)


@pytest.mark.parametrize(
    "empty",
    [NONE, {**NONE, "volume": 0}, {**NONE, "volume": 0.0}, {**NONE, "volume": "0"}, dict.fromkeys(NONE, "null")],
)
def test_a_minute_without_trades(empty: dict[str, Any]) -> None:
    """A record of nulls is a minute without trades: it is left out, without a fault."""
    assert parse(bar(0), bar(1, **empty), bar(2)) == Bars((taken(0), taken(2)), 3)
    assert parse(bar(1, **empty)) == Bars((), 1)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"open": None}, "a price that is null"),
        ({**NONE, "volume": 5}, "a price that is null"),
        ({"volume": None}, "a volume that is null"),
        ({"close": "cheap"}, "no number as close"),
        ({"close": True}, "no number as close"),
        ({"close": [[]]}, "no number as close"),
        ({"close": ""}, "no number as close"),
        ({"close": 10**400}, "a price that is not finite"),
        ({"close": "1e400"}, "no number as close"),
        ({"close": float("nan")}, "a price that is not finite"),
        ({"low": float("-inf")}, "a price that is not finite"),
        ({"high": "Infinity"}, "a price that is not finite"),
        ({"open": "NaN"}, "a price that is not finite"),
        ({"open": -2.0}, "a price that is not above zero"),
        ({"low": -0.0}, "a price that is not above zero"),
        ({"low": 0}, "a price that is not above zero"),
        ({"high": 0.5}, "a high below another price"),
        ({"high": 2.25}, "a high below another price"),
        ({"low": 2.25}, "a low above another price"),
        ({"volume": -1}, "a negative volume"),
        ({"volume": 1.5}, "a fractional volume"),
        ({"volume": 1e30}, "a volume that is too large"),
        ({"volume": 2**63}, "a volume that is too large"),
        ({"volume": 10**400}, "a volume that is too large"),
        ({"volume": -(10**400)}, "a negative volume"),
        ({"open": float("nan"), "volume": 10**400}, "a price that is not finite"),
        ({"volume": float("inf")}, "a volume that is not finite"),
        ({"volume": False}, "no number as volume"),
        ({"volume": {"of": 5}}, "no number as volume"),
    ],
)
def test_a_wrong_bar(changed: dict[str, Any], reason: str) -> None:
    """A wrong value costs only its record, which is reported with its reason and minute."""
    wrong = bar(1, **changed)
    assert parse(bar(0), wrong, bar(2)) == Bars(
        (taken(0), taken(2)), 3, (Fault(reason, wrong["timestamp"], START + BAR_LENGTH),)
    )


@pytest.mark.parametrize("name", ["open", "high", "low", "close", "volume"])
def test_a_bar_that_lacks_a_field(name: str) -> None:
    """A missing field differs from a null."""
    wrong = bar(1, **NONE)
    del wrong[name]
    assert [fault.reason for fault in parse(bar(0), wrong).faults] == [f"no {name}"]


@pytest.mark.parametrize(
    "stamp",
    [
        "yesterday", "", 7, None, ["2026-11-20T10:01:00"], "0001-01-01T00:00:00", "9999-12-31T23:59:59-05:00",
        "9999-12-31T23:59:59Z", "0001-01-01T00:00:00+13:00",
        "2026-11-20T10:01:00+10:60", "2026-11-20T10:01:00+24:00", "2026-11-20T10:01:60", "2026-11-20T24:00:00",
        "2026-11-20T10:01", "2026-11-20T10:01.5Z", "20261120T100100", "2026-W47-5T10:01:00", "2026-11-20",
        "2026-13-20T10:01:00", "2026-11-20T10:01:00,5", "2026-11-20T10:01:00 ", "٢026-11-20T10:01:00", "x" * 100_000,
        "2026-11-20T10:01:00\ud800", "2026-11-20T10:01:00+13:00:30", "2026-11-20x10:01:00",
    ],
)  # fmt: skip
def test_an_invalid_timestamp(stamp: Any) -> None:
    """A timestamp that RFC 3339 forbids, though Python reads it, makes a wrong record of unknown minute."""
    found = parse(bar(0), bar(1, timestamp=stamp), bar(2))
    assert found.bars == (taken(0), taken(2))
    (fault,) = found.faults
    assert fault.reason == "no timestamp that can be read"
    assert fault.time is None
    assert len(fault.name) <= 40
    assert fault.may_lie_within(START, START + BAR_LENGTH)


@pytest.mark.parametrize(
    "stamp", ["2026-11-20T10:01:00", "2026-11-20 10:01:00.000000", "2026-11-20t10:01:00+13:00", "2026-11-19T21:01:00z"]
)
def test_forms_of_a_timestamp(stamp: str) -> None:
    """A timestamp may have an offset, or be the exchange's wall time."""
    assert parse(bar(0, timestamp=stamp)) == Bars((taken(1),), 1)


@pytest.mark.parametrize("record", [None, 1, "bar", [], [bar(1)], True])
def test_a_record_of_another_type(record: Any) -> None:
    """A record that is no object is named by its position."""
    assert parse(bar(0), record) == Bars((taken(0),), 2, (Fault("a record that is no object", "record 2"),))


def test_a_time_off_the_minute() -> None:
    """A bar between two minutes may belong to either, so it concerns both."""
    found = parse(bar(0), bar(1.5))
    assert found.bars == (taken(0),)
    (fault,) = found.faults
    assert fault.reason == "a time off the minute"
    near = [
        minute
        for minute in range(-1, 5)
        if fault.may_lie_within(START + minute * BAR_LENGTH, START + (minute + 1) * BAR_LENGTH)
    ]
    assert near == [1, 2]
    assert parse(bar(0), bar(-0.5)).faults
    assert parse(bar(0), bar(10.5)) == Bars((taken(0),), 2)


def test_a_repeated_minute() -> None:
    """An equal bar is accepted twice; of different ones none is, since either may be right."""
    assert parse(bar(0), bar(1), bar(1)) == Bars((taken(0), taken(1)), 3)
    for other in (bar(1, volume=6), bar(1, **NONE)):
        found = parse(bar(0), bar(1), other)
        assert found.bars == (taken(0),)
        assert [(fault.reason, fault.time) for fault in found.faults] == [
            ("different bars of one minute", START + BAR_LENGTH)
        ]


def test_a_time_that_the_clocks_skipped() -> None:
    """A wall time that the clocks skipped is refused."""
    since = datetime(2026, 9, 26, 13, 0, tzinfo=UTC)
    question = Question("AIR.NZ", since, since + 120 * BAR_LENGTH, "start", ZONE)
    found = parse(bar(0, timestamp="2026-09-27T02:30:00"), question=question)
    assert [fault.reason for fault in found.faults] == ["a time that the exchange's clocks skipped"]


def test_bars_outside_of_the_range_among_others() -> None:
    """Bars outside of the range, right or wrong, are ignored."""
    assert parse(bar(-60), bar(0), bar(10), bar(300), bar(11, open=-1)) == Bars((taken(0),), 5)
    assert parse(bar(-60), bar(1, **NONE)) == Bars((), 2)


@pytest.mark.parametrize("minutes", [(-1,), (11, 12), (10, 11), (-300, 300), (1440,), (-(365 * 1440),)])
def test_only_bars_outside_of_the_range(minutes: tuple[int, ...]) -> None:
    """An answer entirely outside of the range answers another question, and does not mean no trades."""
    with pytest.raises(MalformedAnswerError, match="none of the asked range"):
        parse(*map(bar, minutes))


def test_a_range_that_ends_inclusively() -> None:
    """The provider may treat the end as inclusive: a bar of it alone means no trades before."""
    assert parse(bar(10)) == Bars((), 1)


def test_a_record_of_another_day() -> None:
    """A record of another day among others is wrong, since its time may be at fault."""
    found = parse(bar(0), bar(1440))
    assert found.bars == (taken(0),)
    assert found.faults == (Fault("another day", "2026-11-21T10:00:00"),)


def test_the_repeated_hour() -> None:
    """The extra hour that the request's wall time explains is accepted; anything beyond it is another answer."""
    second = datetime(2026, 4, 4, 14, 0, tzinfo=UTC)  # 02:00 in Auckland, for the second time
    question = Question("AIR.NZ", second, second + 30 * BAR_LENGTH, "start", ZONE)
    assert question.parameters()["datetime_from"] == "2026-04-05 02:00:00"
    assert question.parameters()["datetime_to"] == "2026-04-05 03:30:00"
    for stamp in ("2026-04-05T02:10:00+13:00", "2026-04-05T03:30:00+12:00"):
        assert parse(bar(0, timestamp=stamp), question=question) == Bars((), 1)
    for stamp in ("2026-04-05T01:59:00", "2026-04-05T03:31:00"):
        with pytest.raises(MalformedAnswerError):
            parse(bar(0, timestamp=stamp), question=question)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"hits": 400}, "400 hits and 1 bars"), ({"hits": 0}, "0 hits"), ({"hits": 10**4000}, "10{38}… hits"),
        ({"interval": "1h"}, "the interval '1h'"),
        ({"ticker": "FPH.NZ"}, "the ticker 'FPH.NZ'"), ({"ticker": "AIR.AX"}, "ticker"), ({"ticker": ""}, "ticker"),
        ({"ticker": "AI"}, "ticker"), ({"ticker": "A" * 1000}, f"the ticker '{'A' * 39}…'"),
        ({"exchange": "asx"}, "the exchange 'asx'"),
        ({"date_from": "2026-11-19", "date_to": "2026-11-19"}, "the span 2026-11-19 to 2026-11-19"),
        ({"date_to": "2026-11-20T09:00:00"}, "span"), ({"date_from": "2026-11-20T10:30:00"}, "span"),
        ({"date_from": "2026-11-20 10:05:00"}, "span"), ({"date_to": "2026-11-19T21:04:00Z"}, "span"),
    ],
)  # fmt: skip
def test_an_answer_to_another_question(fields: dict[str, Any], what: str) -> None:
    """An answer that names other parameters than the request is refused."""
    with pytest.raises(MalformedAnswerError, match=what):
        parse(bar(1), **fields)
    if fields != {"hits": 0}:
        with pytest.raises(MalformedAnswerError):
            parse(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"ticker": "air.nz"}, {"ticker": "AIR"}, {"ticker": None}, {"exchange": None}, {"hits": None}, {"hits": "1"},
        {"interval": None}, {"date_from": "2026-11-20T10:00:00", "date_to": "2026-11-20T10:10:00"},
        {"date_from": "2026-11-20", "date_to": "2026-11-20"}, {"date_from": "2026-11-19T21:00:00+00:00"},
        {"date_from": "2026-11-20T10:01:00", "date_to": "2026-11-20T10:01:00"}, {"date_from": "soon", "date_to": [7]},
        {"date_from": None, "date_to": ""}, {"date_from": "2026-01-01", "date_to": "2027-01-01"},
    ],
)  # fmt: skip
def test_an_answer_that_names_its_parameters(fields: dict[str, Any]) -> None:
    """The ticker may be in any case, with or without suffix; the span the request's, a wider one, or the records'."""
    assert parse(bar(1), **fields) == Bars((taken(1),), 1)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"7", b'"data"', b"<html>proxy error</html>", b"\xff\xfe", b"{}", b'{"data": null}',
        b'{"data": {}}', b'{"data": 7}', b'{"data": "[]"}', b'{"message": "no data here"}', b'{"data": [], "hits": []}',
        b'{"data": [01]}', b'{"data": []} {"data": []}', b'{"data": [{"open": NaN}',
        b'{"data": [' + b"[" * 100_000 + b"]" * 100_000 + b"]}",
        b'{"data": [NaN' + b",[" * 100_000 + b"]" * 100_000 + b"]}",
        b'{"data": [' + b"{}," * MAX_VALUES + b"{}]}",
        b'{"data": [' + b'"\\ud800"' + b",[]" * MAX_VALUES + b"]}",
    ],
)  # fmt: skip
def test_an_invalid_answer(body: bytes) -> None:
    """An answer of another form, or of an implausible size, is refused."""
    for parse_any in (lambda: parse_bars(body, QUESTION), lambda: parse_instruments(body)):
        with pytest.raises(UnreadableAnswerError):
            parse_any()


@pytest.mark.parametrize(
    "broken",
    [b'{"open": NaN}', b'"\\ud800"', b'"\xff"', b'{"timestamp": "\xff"}', b'{"\xff": 1}', b"1e400", b"9" * 5000,
     b"-Infinity", b'{"timestamp": "2026-11-20T10:01:00", "timestamp": 7}'],
)  # fmt: skip
def test_a_record_that_breaks_the_json(broken: bytes) -> None:
    """JSON errors that services do send cost only their record."""
    body = b'\xef\xbb\xbf{"data": [' + json.dumps(bar(0)).encode() + b", " + broken + b"]}"
    for each in (body, body[3:]):
        found = parse_bars(each, QUESTION)
        assert found.bars == (taken(0),)
        assert len(found.faults) == 1


def test_forms_of_numbers() -> None:
    """Numbers may be integers, floats or strings of either; a large volume is exact."""
    record = bar(0, open=2, high="3", low="1.0", close=2.5, volume=9_007_199_254_740_993)
    assert parse(record).bars == (Bar(START, 2.0, 3.0, 1.0, 2.5, 9_007_199_254_740_993),)
    assert parse(bar(0, volume=5.0), bar(1, volume="5")).bars == (taken(0), taken(1))


def test_the_other_label() -> None:
    """With the label of the end, bars and faults begin a minute earlier."""
    question = Question("AIR.NZ", START, START + 10 * BAR_LENGTH, "end", ZONE)
    found = parse(bar(1), bar(2, open=-1.0), question=question)
    assert found.bars == (taken(0),)
    assert [fault.time for fault in found.faults] == [START + BAR_LENGTH]


def test_texts_of_faults() -> None:
    """Each reason names its first symbols; text from outside is short, printable and redacted."""
    faults = [Fault("a negative volume", f"record {number}") for number in range(5)] + [Fault("no open", "x")]
    assert summarize(faults, 1020) == (
        "6 of 1,020 records are wrong: a negative volume (record 0, record 1, record 2 and 2 more); no open (x)"
    )
    assert summarize([], 3) == ""
    register_secret("pk_0123456789abcdefgh")
    assert shown("a\0b\n\ud800 pk_0123456789abcdefgh").isprintable()
    assert "pk_" not in shown("x" * 39 + "pk_0123456789abcdefgh")
    assert len(shown("x" * 100_000)) <= 41


def listing(*records: Any, **fields: Any) -> Instruments:
    return parse_instruments(json.dumps({"data": records, **fields}).encode())


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        (7, Fault("no symbol", "record 2")), ({}, Fault("no symbol", "record 2")),
        ({"symbol": None}, Fault("no symbol", "record 2")), ({"symbol": 7}, Fault("no symbol", "record 2")),
        ({"symbol": "*"}, Fault("a symbol that can't be one", "*")),
        ({"symbol": "C\0.NZ"}, Fault("a symbol that can't be one", "C\\x00.NZ")),
        ({"symbol": " C.NZ"}, Fault("a symbol that can't be one", " C.NZ")),
        ({"symbol": "C" * 5000}, Fault("a symbol that can't be one", "C" * 39 + "…")),
        ({"symbol": "C\ud800"}, Fault("a symbol that can't be one", "C\\ud800")),
        ({"symbol": "C.AX", "exchange": "asx"}, Fault("another exchange", "C.AX")),
        ({"symbol": "A.NZ", "active": False}, Fault("listed twice, and differently", "A.NZ")),
    ],
)  # fmt: skip
def test_a_wrong_instrument(record: Any, fault: Fault) -> None:
    """A wrong instrument is refused alone, and named."""
    assert listing({"symbol": "A.NZ"}, record) == Instruments(
        (Instrument("A.NZ", None, None, None, True),), 2, (fault,)
    )


def test_odd_fields_of_an_instrument() -> None:
    """An instrument needs only its symbol."""
    odd = {"symbol": "A.NZ", "company_name": "\0" + "x" * 9999, "industry": 7, "uuid4": "?", "active": "maybe"}
    (found,) = listing(odd, dict(odd)).listed
    assert found.active
    assert found.industry is None
    assert found.company_name is not None
    assert len(found.company_name) == 499


@pytest.mark.parametrize(
    ("records", "fields"),
    [(({"symbol": "A.NZ"},), {"hits": 2}), (({"symbol": "A.NZ"},), {"exchange": "asx"}), ((7, 8), {})],
)
def test_an_invalid_listing(records: tuple[Any, ...], fields: dict[str, Any]) -> None:
    """An incomplete listing, one of another exchange, or one without instruments is refused."""
    with pytest.raises(MalformedAnswerError):
        listing(*records, **fields)
