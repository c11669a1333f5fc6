from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from ingestor.clock import from_datetime
from ingestor.model import DAY, Micros, Reason, Tick
from ingestor.stream.decoder import (
    EARLIEST,
    MAX_VOLUME,
    Authenticated,
    Decoder,
    Message,
    Refused,
    ServerError,
    authenticate,
)

NOW: Micros = from_datetime(datetime(2026, 3, 2, tzinfo=UTC))
GOOD = {"date": "2021-09-29T09:33:30", "price": 2.61, "volume": 5000, "symbol": "SUM020.NZ"}


def price(**fields: Any) -> bytes:
    return json.dumps({"type": "price", "data": {**GOOD, **fields}}).encode()


def raw(**fields: str) -> bytes:
    """Return a price message with fields as literal JSON text."""
    data = {name: json.dumps(value) for name, value in GOOD.items()} | fields
    return ('{"type":"price","data":{' + ",".join(f'"{k}":{v}' for k, v in data.items()) + "}}").encode()


def decode(frame: bytes, *, binary: bool = False) -> Message:
    return Decoder("Pacific/Auckland").decode(frame, NOW, binary=binary)


def instant(text: str) -> Micros:
    return from_datetime(datetime.fromisoformat(text))


DOCUMENTED = [
    ("SUM020.NZ", "09:33:30", 2.61, 5000),
    ("WIA080.NZ", "09:34:45", 3.0, 55000),
    ("WIA080.NZ", "09:34:45", 3.0, 20000),
    ("SUM030.NZ", "09:34:50", 2.65, 25000),
    ("NZB.NZ", "09:35:53", 3.0424, 181123),
    ("KCFHA.NZ", "09:36:17", 99.9, 5000),
    ("NZC.NZ", "09:36:28", 2.9491, 408798),
    ("ANBHB.NZ", "09:41:27", 99.8, 50000),
]


@pytest.mark.parametrize(("symbol", "time", "value", "volume"), DOCUMENTED)
def test_documented_samples(symbol: str, time: str, value: float, volume: int) -> None:
    """The documented dates without an offset are wall time in Auckland (UTC+13 that day)."""
    message = decode(price(symbol=symbol, date=f"2021-09-29T{time}", price=value, volume=volume))
    hour = int(time[:2]) + 24 - 13
    assert message == Tick(symbol, instant(f"2021-09-28T{hour}{time[2:]}+00:00"), value, volume)


@pytest.mark.parametrize(
    ("date", "expected"),
    [
        ("2021-09-29T09:33:30", "2021-09-28T20:33:30+00:00"),
        ("2021-09-29T09:33:30Z", "2021-09-29T09:33:30+00:00"),
        ("2021-09-29t09:33:30z", "2021-09-29T09:33:30+00:00"),
        ("2021-09-29 09:33:30+13:00", "2021-09-28T20:33:30+00:00"),
        ("2021-09-29T09:33:30-00:30", "2021-09-29T10:03:30+00:00"),
        ("2021-09-29T09:33:30.5", "2021-09-28T20:33:30.500000+00:00"),
        ("2021-09-29T09:33:30.000001Z", "2021-09-29T09:33:30.000001+00:00"),
        ("2021-09-29T09:33:30.1234569+00:00", "2021-09-29T09:33:30.123456+00:00"),
        ("2021-09-29T09:33:30.9999999Z", "2021-09-29T09:33:30.999999+00:00"),  # cut off, not rounded
        ("2021-09-29T09:33:30-00:00", "2021-09-29T09:33:30+00:00"),
        ("2021-09-29T09:33:30+23:59", "2021-09-28T09:34:30+00:00"),
        ("2021-09-29T09:33:30-23:59", "2021-09-30T09:32:30+00:00"),
        ("2021-04-04T02:30:00", "2021-04-03T13:30:00+00:00"),  # occurs twice: the first, still summer time
        ("2021-04-04T03:00:00", "2021-04-03T15:00:00+00:00"),
        ("2021-09-26T03:00:00", "2021-09-25T14:00:00+00:00"),
        ("1990-01-01T00:00:00Z", "1990-01-01T00:00:00+00:00"),
        ("2026-03-03T00:00:00Z", "2026-03-03T00:00:00+00:00"),  # a day after now
    ],
)
def test_dates(date: str, expected: str) -> None:
    """A date with an offset is that instant; without one it is the exchange's wall time, to the microsecond."""
    message = decode(price(date=date))
    assert isinstance(message, Tick), message
    assert message.time == instant(expected)


@pytest.mark.parametrize(
    ("date", "reason"),
    [
        ("2021-09-26T02:30:00", Reason.DATE_NONEXISTENT),
        ("2021-09-26T02:00:00", Reason.DATE_NONEXISTENT),
        ("1989-12-31T23:59:59Z", Reason.DATE_OUT_OF_RANGE),
        ("2026-03-03T00:00:01Z", Reason.DATE_OUT_OF_RANGE),
        ("0001-01-01T00:00:00+14:00", Reason.DATE_OUT_OF_RANGE),
        ("9999-12-31T23:59:59", Reason.DATE_OUT_OF_RANGE),
        ("0001-01-01T00:00:00", Reason.DATE_OUT_OF_RANGE),
        ("0000-02-29T00:00:00Z", Reason.DATE_OUT_OF_RANGE),  # a leap year, by the RFC's calendar
        ("0001-02-29T00:00:00Z", Reason.DATE_INVALID),
        ("9999-12-31T23:59:59-23:59", Reason.DATE_OUT_OF_RANGE),
        ("2021-02-29T09:00:00", Reason.DATE_INVALID),
        ("2021-09-31T09:00:00", Reason.DATE_INVALID),
        ("2021-00-01T09:00:00", Reason.DATE_INVALID),
        ("2021-13-01T09:00:00", Reason.DATE_INVALID),
        ("2021-09-00T09:00:00", Reason.DATE_INVALID),
        ("2021-09-29", Reason.DATE_INVALID),
        ("2021-09-29T24:00:00", Reason.DATE_INVALID),
        ("2021-09-29T24:00:00Z", Reason.DATE_INVALID),
        ("2021-09-29T09:60:00", Reason.DATE_INVALID),
        ("2016-12-31T23:59:60Z", Reason.DATE_INVALID),  # it was a leap second; no database stores it
        ("2021-09-29T09:33:61Z", Reason.DATE_INVALID),
        ("2021-09-29T09:33", Reason.DATE_INVALID),
        ("2021-09-29T09:33Z", Reason.DATE_INVALID),
        ("2021-09-29T23:59.645Z", Reason.DATE_INVALID),
        ("2021-09-29T09:33.5", Reason.DATE_INVALID),
        ("2021-09-29T09", Reason.DATE_INVALID),
        ("2021-09-29T09:33:30,5Z", Reason.DATE_INVALID),
        ("2021-09-29T09:33:30.5.5Z", Reason.DATE_INVALID),
        ("2021-09-29T09:33:30+25:00", Reason.DATE_INVALID),
        ("2021-09-29T09:33:30+24:00", Reason.DATE_INVALID),
        ("2021-09-29T09:33:30+10:60", Reason.DATE_INVALID),
        ("2021-09-29T09:33:30-10:99", Reason.DATE_INVALID),
        ("2021-09-29T09:33:30+1000", Reason.DATE_INVALID),
        ("2021-09-29T09:33:30+10", Reason.DATE_INVALID),
        ("2021-09-29T09:33:30+10:00:00", Reason.DATE_INVALID),
        ("2021-09-29T09:33:30 Z", Reason.DATE_INVALID),
        ("2021-09-29T09:33:30\u221210:00", Reason.DATE_INVALID),  # a minus sign instead of a hyphen
        ("2021-09-29T09:33:30ZZ", Reason.DATE_INVALID),
        ("2021-09-29T09:33:30Z\n", Reason.DATE_INVALID),
        ("2021-09-29T09:33:30Z\0", Reason.DATE_INVALID),
        ("2021-09-29  09:33:30", Reason.DATE_INVALID),
        ("2021-09-29_09:33:30", Reason.DATE_INVALID),
        ("20210929T093330Z", Reason.DATE_INVALID),
        ("2021-W39-3T09:33:30Z", Reason.DATE_INVALID),
        ("2021-272T09:33:30Z", Reason.DATE_INVALID),
        ("+2021-09-29T09:33:30Z", Reason.DATE_INVALID),
        ("12021-09-29T09:33:30Z", Reason.DATE_INVALID),
        ("2021-9-29T9:33:30Z", Reason.DATE_INVALID),
        ("1632861210", Reason.DATE_INVALID),
        ("2021-09-29T09:33:30.\u0661Z", Reason.DATE_INVALID),
        ("2021-09-29T09:33:30.", Reason.DATE_INVALID),
        ("٢٠٢١-09-29T09:33:30", Reason.DATE_INVALID),
        (" 2021-09-29T09:33:30", Reason.DATE_INVALID),
        ("", Reason.DATE_INVALID),
    ],
)
def test_bad_dates(date: str, reason: Reason) -> None:
    """An invalid or impossible date, or one outside 1990 to tomorrow, is refused with its reason."""
    assert decode(price(date=date)) == Refused(reason)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", 3.0),
        ("3.0424", 3.0424),
        ('"3.0424"', 3.0424),
        ('"3"', 3.0),
        ('"2.5e1"', 25.0),
        ("0", 0.0),
        ("-2.5", -2.5),
        ("123456789.012345", 123456789.012345),
        ("99999999999999999999", 1e20),
        ("1.7976931348623157e308", 1.7976931348623157e308),
        ("5e-324", 5e-324),
        ("1" + "0" * 308, 1e308),
    ],
)
def test_prices(text: str, expected: float) -> None:
    """A price is an integer, a float, or a string that is a JSON number; any finite one is stored."""
    message = decode(raw(price=text))
    assert isinstance(message, Tick), message
    assert message.price == expected


@pytest.mark.parametrize("text", ["-0", "-0.0", '"-0"', '"-0.00"'])
def test_negative_zero(text: str) -> None:
    """Negative zero is stored as zero, so that equal prices are equal in every bit."""
    message = decode(raw(price=text))
    assert isinstance(message, Tick)
    assert str(message.price) == "0.0"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("NaN", Reason.PRICE_NOT_FINITE),
        ("Infinity", Reason.PRICE_NOT_FINITE),
        ("-Infinity", Reason.PRICE_NOT_FINITE),
        ("1e309", Reason.PRICE_NOT_FINITE),
        ('"1e309"', Reason.PRICE_NOT_FINITE),
        ("9" * 5000, Reason.PRICE_NOT_FINITE),
        ('"NaN"', Reason.PRICE_INVALID),
        ('"inf"', Reason.PRICE_INVALID),
        ('"1_000"', Reason.PRICE_INVALID),
        ('" 1.5 "', Reason.PRICE_INVALID),
        ('"1.5\\n"', Reason.PRICE_INVALID),
        ('"+1"', Reason.PRICE_INVALID),
        ('"01"', Reason.PRICE_INVALID),
        ('".5"', Reason.PRICE_INVALID),
        ('"1."', Reason.PRICE_INVALID),
        ('"0x10"', Reason.PRICE_INVALID),
        ('"١٢"', Reason.PRICE_INVALID),
        ('""', Reason.PRICE_INVALID),
        ("true", Reason.WRONG_TYPE),
        ("null", Reason.WRONG_TYPE),
        ("[1]", Reason.WRONG_TYPE),
        ("{}", Reason.WRONG_TYPE),
    ],
)
def test_bad_prices(text: str, reason: Reason) -> None:
    """Any other value than a finite JSON number is refused as a price."""
    assert decode(raw(price=text)) == Refused(reason)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5000", 5000),
        ("5000.0", 5000),
        ("5e3", 5000),
        ('"5000"', 5000),
        ('"5000.00"', 5000),
        ("0", 0),
        ("-0", 0),
        ("0e999999999999999999", 0),
        (str(MAX_VOLUME), MAX_VOLUME),
        (f'"{MAX_VOLUME}.0"', MAX_VOLUME),
        (f"{MAX_VOLUME}.0", MAX_VOLUME),
        ("9007199254740993.0", 9007199254740993),  # not a float's value: all digits are kept
    ],
)
def test_volumes(text: str, expected: int) -> None:
    """A volume is a whole number up to 2^63 - 1 in any notation, to the unit."""
    message = decode(raw(volume=text))
    assert isinstance(message, Tick), message
    assert message.volume == expected
    assert type(message.volume) is int


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1.5", Reason.VOLUME_FRACTIONAL),
        ('"0.1"', Reason.VOLUME_FRACTIONAL),
        ("1e-999999", Reason.VOLUME_FRACTIONAL),
        ("9007199254740993.5", Reason.VOLUME_FRACTIONAL),
        ("-1", Reason.VOLUME_NEGATIVE),
        ('"-5"', Reason.VOLUME_NEGATIVE),
        (str(MAX_VOLUME + 1), Reason.VOLUME_TOO_LARGE),
        ("1e999999", Reason.VOLUME_TOO_LARGE),
        ("9" * 5000, Reason.VOLUME_TOO_LARGE),
        ('"1e99999999999999999999"', Reason.VOLUME_INVALID),
        ('"1_000"', Reason.VOLUME_INVALID),
        ("NaN", Reason.VOLUME_INVALID),
        ("true", Reason.WRONG_TYPE),
        ("null", Reason.WRONG_TYPE),
    ],
)
def test_bad_volumes(text: str, reason: Reason) -> None:
    """Any other value than a whole number from 0 to 2^63 - 1 is refused; long exponents are cheap."""
    assert decode(raw(volume=text)) == Refused(reason)


@pytest.mark.parametrize("symbol", ["A", "AIR.NZ", "BTC/USD", "A B", "Ω.NZ", "x" * 32, "\u200b"])
def test_symbols(symbol: str) -> None:
    """A symbol is any text of 1 to 32 characters: the decoder has no list of symbols."""
    message = decode(price(symbol=symbol))
    assert isinstance(message, Tick), message
    assert message.symbol == symbol


@pytest.mark.parametrize(
    "symbol", ["", "x" * 33, " A", "A ", "\u3000A", "A\n", "A\0B", "A\x7f", "A\x85B", "A\x9f", "A\ud800"]
)
def test_bad_symbols(symbol: str) -> None:
    """Empty, long or padded symbols, control characters and lone surrogates are refused."""
    assert decode(price(symbol=symbol)) == Refused(Reason.SYMBOL_INVALID)


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"", Reason.NOT_JSON),
        (b"hello", Reason.NOT_JSON),
        (b'{"type":"price"', Reason.NOT_JSON),
        (b'{"type":"price"}}', Reason.NOT_JSON),
        (b'\xef\xbb\xbf{"type":"ping"}', Reason.NOT_JSON),
        ('{"type":"price"}'.encode("utf-16-le"), Reason.NOT_JSON),
        (b"[" * 100_000, Reason.NOT_JSON),
        (b'{"a":' * 100_000, Reason.NOT_JSON),
        (b"[]", Reason.NOT_AN_OBJECT),
        (b"null", Reason.NOT_AN_OBJECT),
        (b'"price"', Reason.NOT_AN_OBJECT),
        (b"NaN", Reason.NOT_AN_OBJECT),
        (b"{}", Reason.MISSING_FIELD),
        (b'{"type":"price"}', Reason.MISSING_FIELD),
        (b'{"type":"price","data":null}', Reason.MISSING_FIELD),
        (b'{"type":"price","data":{}}', Reason.MISSING_FIELD),
        (b'{"type":"price","data":[]}', Reason.WRONG_TYPE),
        (b'{"type":"trade","data":{}}', Reason.UNKNOWN_TYPE),
        (b'{"type":5}', Reason.WRONG_TYPE),
        (b'{"type":null}', Reason.WRONG_TYPE),
        (b"\xff\xfe", Reason.INVALID_UTF8),
        (b'{"type":"price","note":"\xff"}', Reason.INVALID_UTF8),
        (b'"' + b"x" * 2**20 + b'"', Reason.MESSAGE_TOO_BIG),
    ],
)
def test_not_a_message(frame: bytes, reason: Reason) -> None:
    """Each invalid message has a listed reason, and none raises."""
    assert decode(frame) == Refused(reason)


@pytest.mark.parametrize("field", ["date", "price", "volume", "symbol"])
def test_missing_field(field: str) -> None:
    """Each of the four fields is needed."""
    data = {name: value for name, value in GOOD.items() if name != field}
    frame = json.dumps({"type": "price", "data": data}).encode()
    assert decode(frame) == Refused(Reason.MISSING_FIELD)


@pytest.mark.parametrize("field", ["date", "symbol"])
@pytest.mark.parametrize("value", [1, 1.5, None, [], {}, True])
def test_text_fields_are_text(field: str, value: object) -> None:
    """A number is refused as a date and as a symbol."""
    assert decode(price(**{field: value})) == Refused(Reason.WRONG_TYPE)


def test_invalid_utf8_in_a_field_that_is_not_read() -> None:
    """Text that is not UTF-8 is refused at any place, as RFC 6455 demands."""
    frame = price().replace(b'"price"', b'"note":"\xff","type":"price"', 1)
    assert decode(frame) == Refused(Reason.INVALID_UTF8)


def test_unknown_fields_are_ignored() -> None:
    """Unknown fields are ignored."""
    frame = json.dumps({"type": "price", "id": 7, "data": {**GOOD, "side": "buy", "x": [None]}}).encode()
    assert isinstance(decode(frame), Tick)


def test_binary_frame() -> None:
    """A binary frame is refused, even with a valid message inside."""
    assert decode(price(), binary=True) == Refused(Reason.BINARY_FRAME)


@pytest.mark.parametrize(
    "frame",
    [
        b'{"type":"authenticated","data":{"message":"hello"}}',
        b'{"type":"authenticated","data":{}}',
        b'{"type":"authenticated"}',
        b'{"type":"authenticated","data":"hello"}',
    ],
)
def test_authenticated(frame: bytes) -> None:
    """The type decides; the text is for people."""
    assert decode(frame) == Authenticated()


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        (b'{"type":"error","data":{"message":"not authorised"}}', "not authorised"),
        (b'{"type":"error","data":{"message":7}}', "7"),
        (b'{"type":"error","data":"gone"}', ""),
        (b'{"type":"error"}', ""),
    ],
)
def test_server_error(frame: bytes, text: str) -> None:
    """An error keeps its text in any form."""
    assert decode(frame) == ServerError(text)


def test_authenticate_is_the_documented_message() -> None:
    """The first message of the dialogue is the documented one."""
    assert json.loads(authenticate('tk_"quoted"')) == {"type": "authenticate", "data": {"token": 'tk_"quoted"'}}


def test_caches_are_bounded() -> None:
    """Endless new symbols and dates take no more memory."""
    decoder = Decoder("Pacific/Auckland")
    for number in range(10_000):
        date = datetime.fromtimestamp(number * 100_000 % 1_000_000_000 + 700_000_000, UTC).isoformat()
        assert isinstance(decoder.decode(price(symbol=f"S{number}", date=date), NOW), Tick)
    assert len(decoder._symbols) <= 4096
    assert len(decoder._seconds) <= 4096


def test_range_is_relative_to_the_arrival() -> None:
    """Tomorrow is a day after the arrival of this message, not of an earlier one with the same date."""
    decoder, frame = Decoder("Pacific/Auckland"), price(date="2021-09-29T09:33:30Z")
    date = instant("2021-09-29T09:33:30+00:00")
    assert isinstance(decoder.decode(frame, date - DAY), Tick)
    assert decoder.decode(frame, date - DAY - 1) == Refused(Reason.DATE_OUT_OF_RANGE)
    assert instant("1990-01-01T00:00:00+00:00") == EARLIEST
