"""Reads a message as the standards define it, slowly: JSON by RFC 8259, dates by RFC 3339, numbers as fractions.

Written from the grammars and from the tables of docs/reference/messages.md, for comparison with the decoder. It shares
no code with it, and uses neither regular expressions nor a library's parser.
"""

from __future__ import annotations

import calendar
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any
from zoneinfo import ZoneInfo

from ingestor.model import DAY, SECOND, Micros, Reason, Tick

DIGITS = "0123456789"
ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
WORDS = {"true": True, "false": False, "null": None}
NON_FINITE = ("NaN", "Infinity", "-Infinity")
LARGEST = 2**63 - 1


class NotJson(Exception):  # noqa: N818 - a finding
    """The text is not JSON."""


@dataclass(frozen=True)
class Number:
    """A number as it was written."""

    text: str


@dataclass(frozen=True)
class Word:
    """NaN or an infinity, which JSON lacks: they are parsed so that the reason can be given."""

    text: str


class Cursor:
    """A position in a text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def peek(self) -> str:
        return self.text[self.at] if self.at < len(self.text) else ""

    def take(self, expected: str) -> bool:
        if self.text.startswith(expected, self.at):
            self.at += len(expected)
            return True
        return False

    def digits(self) -> str:
        start = self.at
        while self.peek() and self.peek() in DIGITS:
            self.at += 1
        return self.text[start : self.at]

    @property
    def at_end(self) -> bool:
        return self.at == len(self.text)


def parse(text: str) -> Any:
    """Return the value of a JSON text; of a repeated name, the last value. Raises NotJson."""
    cursor = Cursor(text)
    value = _value(cursor)
    if not cursor.at_end:
        raise NotJson
    return value


def _blank(cursor: Cursor) -> None:
    while cursor.peek() and cursor.peek() in " \t\n\r":
        cursor.at += 1


def _value(cursor: Cursor) -> Any:
    _blank(cursor)
    value = _bare_value(cursor)
    _blank(cursor)
    return value


def _bare_value(cursor: Cursor) -> Any:
    if cursor.take("{"):
        return _members(cursor)
    if cursor.take("["):
        return _elements(cursor)
    if cursor.take('"'):
        return _string(cursor)
    for word, meaning in WORDS.items():
        if cursor.take(word):
            return meaning
    for word in NON_FINITE:
        if cursor.take(word):
            return Word(word)
    found = number(cursor)
    if found is None:
        raise NotJson
    return Number(found)


def _members(cursor: Cursor) -> dict[str, Any]:
    found: dict[str, Any] = {}
    _blank(cursor)
    if cursor.take("}"):
        return found
    while True:
        _blank(cursor)
        if not cursor.take('"'):
            raise NotJson
        name = _string(cursor)
        _blank(cursor)
        if not cursor.take(":"):
            raise NotJson
        found[name] = _value(cursor)
        if cursor.take("}"):
            return found
        if not cursor.take(","):
            raise NotJson


def _elements(cursor: Cursor) -> list[Any]:
    found: list[Any] = []
    _blank(cursor)
    if cursor.take("]"):
        return found
    while True:
        found.append(_value(cursor))
        if cursor.take("]"):
            return found
        if not cursor.take(","):
            raise NotJson


def _string(cursor: Cursor) -> str:
    units: list[str] = []
    while not cursor.take('"'):
        character = cursor.peek()
        if not character or character < " ":
            raise NotJson
        cursor.at += 1
        units.append(_escape(cursor) if character == "\\" else character)
    # Two surrogates of a pair are one character; a lone surrogate stays.
    return "".join(units).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def _escape(cursor: Cursor) -> str:
    letter = cursor.peek()
    cursor.at += 1
    if letter != "u":
        if letter not in ESCAPES:
            raise NotJson
        return ESCAPES[letter]
    code = cursor.text[cursor.at : cursor.at + 4]
    if len(code) < 4 or any(digit not in "0123456789abcdefABCDEF" for digit in code):
        raise NotJson
    cursor.at += 4
    return chr(int(code, 16))


def number(cursor: Cursor) -> str | None:
    """Consume and return a number of the grammar; return None if there is none."""
    start = cursor.at
    cursor.take("-")
    whole = cursor.digits()
    if not whole or (whole[0] == "0" and len(whole) > 1):
        cursor.at = start
        return None
    if cursor.peek() == "." and cursor.text[cursor.at + 1 : cursor.at + 2] in tuple(DIGITS):
        cursor.at += 1
        cursor.digits()
    if cursor.peek() in ("e", "E"):
        before = cursor.at
        cursor.at += 1
        if not cursor.take("+"):
            cursor.take("-")
        if not cursor.digits():
            cursor.at = before
    return cursor.text[start : cursor.at]


def _is_number(text: str) -> bool:
    cursor = Cursor(text)
    return number(cursor) is not None and cursor.at_end


def _exact(text: str) -> Fraction:
    """Return the value of a number. Exponents are cut at 5,000: far beyond a float or a volume."""
    mantissa, _, exponent = text.lower().partition("e")
    whole, _, decimals = mantissa.partition(".")
    power = max(-5000, min(5000, int(exponent or 0)))
    return Fraction(int(whole + decimals), 10 ** len(decimals)) * Fraction(10) ** power


def price(value: Any) -> float | Reason:
    """Return the nearest float of a price, or its fault."""
    if isinstance(value, Word):
        return Reason.PRICE_NOT_FINITE
    text = value.text if isinstance(value, Number) else value
    if not isinstance(text, str):
        return Reason.WRONG_TYPE
    if not _is_number(text):
        return Reason.PRICE_INVALID
    exact = _exact(text)
    try:
        return exact.numerator / exact.denominator + 0.0
    except OverflowError:
        return Reason.PRICE_NOT_FINITE


def volume(value: Any) -> int | Reason:
    """Return a volume, or its fault."""
    if isinstance(value, Word):
        return Reason.VOLUME_INVALID
    text = value.text if isinstance(value, Number) else value
    if not isinstance(text, str):
        return Reason.WRONG_TYPE
    if not _is_number(text):
        return Reason.VOLUME_INVALID
    exact = _exact(text)
    if exact < 0:
        return Reason.VOLUME_NEGATIVE
    if exact > LARGEST:
        return Reason.VOLUME_TOO_LARGE
    return int(exact) if exact.denominator == 1 else Reason.VOLUME_FRACTIONAL


def symbol(value: Any) -> str | Reason:
    """Return a symbol, or its fault."""
    if not isinstance(value, str):
        return Reason.WRONG_TYPE
    codes = [ord(character) for character in value]
    if any(code < 32 or 127 <= code < 160 or 0xD800 <= code < 0xE000 for code in codes):
        return Reason.SYMBOL_INVALID
    if not 1 <= len(value) <= 32 or value[0].isspace() or value[-1].isspace():
        return Reason.SYMBOL_INVALID
    return value


def date(value: Any, now: Micros, zone: ZoneInfo) -> Micros | Reason:  # noqa: PLR0911 - the grammar, in its order
    """Return the instant of a `date-time` (RFC 3339, section 5.6), or its fault.

    Two liberties: a blank may replace the T, and a time without an offset is wall time. A leap second is refused.
    """
    if not isinstance(value, str):
        return Reason.WRONG_TYPE
    cursor = Cursor(value)
    try:
        year, month, day = _field(cursor, 4), _field(cursor, 2, "-"), _field(cursor, 2, "-")
        if not (cursor.take("T") or cursor.take("t") or cursor.take(" ")):
            return Reason.DATE_INVALID
        hour, minute, second = _field(cursor, 2), _field(cursor, 2, ":"), _field(cursor, 2, ":")
        micros = 0
        if cursor.take("."):
            fraction = cursor.digits()
            if not fraction:
                return Reason.DATE_INVALID
            micros = int(Fraction(int(fraction), 10 ** len(fraction)) * SECOND)
        offset = _offset(cursor)
    except ValueError:
        return Reason.DATE_INVALID
    if not cursor.at_end or hour > 23 or minute > 59 or second > 59:
        return Reason.DATE_INVALID
    days = [31, 29 if calendar.isleap(year) else 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
    if not 1 <= month <= 12 or not 1 <= day <= days[month - 1]:
        return Reason.DATE_INVALID
    if not 1980 < year < 2100:
        return Reason.DATE_OUT_OF_RANGE
    wall = datetime(year, month, day, hour, minute, second)  # noqa: DTZ001 - the zone is the question
    seconds = _seconds(wall) - offset if offset is not None else _local(wall, zone)
    if seconds is None:
        return Reason.DATE_NONEXISTENT
    time = seconds * SECOND + micros
    earliest = _seconds(datetime(1990, 1, 1)) * SECOND  # noqa: DTZ001
    return time if earliest <= time <= now + DAY else Reason.DATE_OUT_OF_RANGE


def _field(cursor: Cursor, width: int, before: str = "") -> int:
    start = cursor.at + len(before)
    text = cursor.text[start : start + width]
    if not cursor.take(before) or len(text) < width or any(digit not in DIGITS for digit in text):
        raise ValueError
    cursor.at += width
    return int(text)


def _offset(cursor: Cursor) -> int | None:
    """Return an offset in seconds; None if there is none."""
    if cursor.at_end:
        return None
    if cursor.take("Z") or cursor.take("z"):
        return 0
    sign = 1 if cursor.take("+") else -1 if cursor.take("-") else 0
    hours, minutes = _field(cursor, 2), _field(cursor, 2, ":")
    if not sign or hours > 23 or minutes > 59:
        raise ValueError
    return sign * (hours * 3600 + minutes * 60)


def _seconds(moment: datetime) -> int:
    return calendar.timegm(moment.timetuple())


def _local(wall: datetime, zone: ZoneInfo) -> int | None:
    """Return the first instant at which clocks in a zone show a wall time; None if they never do."""
    for hours in range(15, -16, -1):  # the earliest instant has the largest offset
        for half in (30, 0):
            instant = wall.replace(tzinfo=UTC) - timedelta(hours=hours, minutes=half)
            if instant.astimezone(zone).replace(tzinfo=None) == wall:
                return _seconds(instant)
    return None


def read(frame: bytes, now: Micros, timezone: str) -> Tick | set[Reason]:  # noqa: PLR0911 - a table
    """Return the tick of a price message, or all its faults."""
    try:
        message = parse(frame.decode())
    except UnicodeDecodeError:
        return {Reason.INVALID_UTF8}
    except NotJson:
        return {Reason.NOT_JSON}
    if not isinstance(message, dict):
        return {Reason.NOT_AN_OBJECT}
    if "type" not in message:
        return {Reason.MISSING_FIELD}
    if message["type"] != "price":
        return {Reason.UNKNOWN_TYPE if isinstance(message["type"], str) else Reason.WRONG_TYPE}
    data = message.get("data")
    if data is None:
        return {Reason.MISSING_FIELD}
    if not isinstance(data, dict):
        return {Reason.WRONG_TYPE}
    return _fields(data, now, ZoneInfo(timezone))


def _fields(data: dict[str, Any], now: Micros, zone: ZoneInfo) -> Tick | set[Reason]:
    readers: dict[str, Callable[[Any], Any]] = {
        "symbol": symbol, "date": lambda value: date(value, now, zone), "price": price, "volume": volume,
    }  # fmt: skip
    if not readers.keys() <= data.keys():
        return {Reason.MISSING_FIELD}
    found = {name: reader(data[name]) for name, reader in readers.items()}
    wrong = {value for value in found.values() if isinstance(value, Reason)}
    return wrong or Tick(found["symbol"], found["date"], found["price"], found["volume"])
