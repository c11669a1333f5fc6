"""The feed's messages: bytes in, a tick or a reason out. No I/O, no clock, no logging.

There are two decoders. The fast one, msgspec's typed decoder, reads the messages that the feed really sends. The slow
one reads again each message that the fast one refuses or could not represent exactly: it names the reason from the
fixed list, and it alone reads rare numbers such as `9007199254740993.0`.
"""

from __future__ import annotations

import json
import math
import re
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any, TypeAlias
from zoneinfo import ZoneInfo

import msgspec

from ingestor.clock import from_datetime
from ingestor.model import DAY, Micros, Reason, Tick

MAX_MESSAGE_BYTES = 2**20
MAX_VOLUME = 2**63 - 1
MAX_SYMBOL_LENGTH = 32
EARLIEST: Micros = from_datetime(datetime(1990, 1, 1, tzinfo=UTC))
"""No tick is older: a wrong date must not create partitions."""

_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_HOUR, _SIXTY = "(?:[01][0-9]|2[0-3])", "[0-5][0-9]"
_DATE = re.compile(
    rf"([0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}})[Tt ]({_HOUR}:{_SIXTY}:{_SIXTY})(?:\.([0-9]+))?([Zz]|[+-]{_HOUR}:{_SIXTY})?"
)
"""The `date-time` of RFC 3339, section 5.6; a blank for the T (as the RFC allows) or a missing offset is accepted too.

It checks every range except the day of the month: `datetime.fromisoformat` accepts much that the RFC forbids, and its
rules differ between Python versions. A leap second (`:60`) is refused, since PostgreSQL has no such instant.
"""
_YEARS = range(1989, 9999)
"""Years beyond these are out of range in every time zone, and their instants may exceed `datetime`."""
_CACHE_SIZE = 4096


class Authenticated(msgspec.Struct, frozen=True):
    """The server accepted our token; prices follow."""


class ServerError(msgspec.Struct, frozen=True):
    """The server's error message; the server then closes the connection."""

    text: str


class Refused(msgspec.Struct, frozen=True):
    """A message that is not stored as a tick, with the reason."""

    reason: Reason


Message: TypeAlias = Tick | Authenticated | ServerError | Refused


class PriceData(msgspec.Struct):
    """The fields of a price, as they were sent."""

    date: str
    price: int | float | str
    volume: int | float | str
    symbol: str


class _Price(msgspec.Struct, tag_field="type", tag="price"):
    data: PriceData


class _Text(msgspec.Struct):
    message: str = ""


class _Authenticated(msgspec.Struct, tag_field="type", tag="authenticated"):
    data: _Text | None = None


class _Error(msgspec.Struct, tag_field="type", tag="error"):
    data: _Text | None = None


_decode = msgspec.json.Decoder(_Price | _Authenticated | _Error).decode


class _Number(str):
    """The digits of a JSON number as sent, distinct from a JSON string."""

    __slots__ = ()


class _RefusedError(Exception):
    """Carries a reason out of the slow decoder."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


def authenticate(token: str) -> bytes:
    """Return the message that authenticates the client: the first of a session."""
    return msgspec.json.encode({"type": "authenticate", "data": {"token": token}})


class Decoder:
    """Decodes frames into messages. Never raises.

    `timezone` is the exchange's: a date without an offset is its wall time. Two bounded caches hold the latest dates
    and the symbols.
    """

    def __init__(self, timezone: str) -> None:
        self._timezone = ZoneInfo(timezone)
        self._seconds: dict[str, Micros] = {}
        self._symbols: set[str] = set()

    def decode(self, frame: bytes, received_at: Micros, *, binary: bool = False) -> Message:
        """Return the message of a frame. A date more than a day after `received_at` is refused."""
        if binary or len(frame) > MAX_MESSAGE_BYTES:
            return Refused(Reason.BINARY_FRAME if binary else Reason.MESSAGE_TOO_BIG)
        try:
            # msgspec does not validate fields that it skips, so non-ASCII frames are checked here.
            if not frame.isascii():
                str(frame, "utf-8")
            message = _decode(frame)
            if type(message) is _Price:
                return self._tick(message.data, received_at)
            text = message.data.message if message.data else ""
            return Authenticated() if type(message) is _Authenticated else ServerError(text)
        except UnicodeDecodeError:
            return Refused(Reason.INVALID_UTF8)
        except _RefusedError as refused:
            return Refused(refused.reason)
        except (msgspec.MsgspecError, RecursionError):
            return self._decode_slowly(frame, received_at)

    def instant(self, text: str) -> Micros | None:
        """Return the instant of an RFC 3339 date; None if it is none."""
        try:
            return self._seconds.get(text) or self._time(text)
        except _RefusedError:
            return None

    def tick(self, data: PriceData, received_at: Micros) -> Tick | None:
        """Return the tick of a price's fields; None if only `decode` can read them, or refuses them."""
        try:
            return self._tick(data, received_at)
        except (_RefusedError, msgspec.MsgspecError):
            return None

    def _tick(self, data: PriceData, received_at: Micros) -> Tick:
        price, volume = data.price, data.volume
        if type(price) is not float:
            price = _price(price)
        if type(volume) is not int or not 0 <= volume <= MAX_VOLUME:
            if type(volume) is float:
                raise msgspec.ValidationError  # it may have been rounded; the slow decoder has every digit
            volume = _volume(volume)
        if data.symbol not in self._symbols:
            self._check_symbol(data.symbol)
        time = self._seconds.get(data.date) or self._time(data.date)
        if not EARLIEST <= time <= received_at + DAY:
            raise _RefusedError(Reason.DATE_OUT_OF_RANGE)
        return Tick(data.symbol, time, price + 0.0, volume)  # + 0.0 turns -0.0 into 0.0

    def _decode_slowly(self, frame: bytes, received_at: Micros) -> Message:
        try:
            message = json.loads(str(frame, "utf-8"), parse_float=_Number, parse_int=_Number)
            return self._interpret(message, received_at)
        except _RefusedError as refused:
            return Refused(refused.reason)
        except (ValueError, RecursionError):
            return Refused(Reason.NOT_JSON)

    def _interpret(self, message: Any, received_at: Micros) -> Message:
        if not isinstance(message, dict):
            raise _RefusedError(Reason.NOT_AN_OBJECT)
        if "type" not in message:
            raise _RefusedError(Reason.MISSING_FIELD)
        data = message.get("data")
        match message["type"]:
            case "price":
                return self._tick(_price_data(data), received_at)
            case "authenticated":
                return Authenticated()
            case "error":
                return ServerError(str(data.get("message", "")) if isinstance(data, dict) else "")
            case other:
                raise _RefusedError(Reason.UNKNOWN_TYPE if type(other) is str else Reason.WRONG_TYPE)

    def _check_symbol(self, symbol: str) -> None:
        if not symbol or len(symbol) > MAX_SYMBOL_LENGTH or symbol != symbol.strip():
            raise _RefusedError(Reason.SYMBOL_INVALID)
        if any(_is_control(character) for character in symbol):
            raise _RefusedError(Reason.SYMBOL_INVALID)
        if len(self._symbols) >= _CACHE_SIZE:
            self._symbols.clear()
        self._symbols.add(symbol)

    def _time(self, text: str) -> Micros:
        """Return the instant of an RFC 3339 date; without an offset it is wall time of the exchange.

        A fraction is truncated to six digits, so that no tick is later than the exchange said.
        """
        match = _DATE.fullmatch(text)
        if match is None:
            raise _RefusedError(Reason.DATE_INVALID)
        day, clock, fraction, offset = match.groups()
        second = f"{day}T{clock}{offset.upper() if offset else ''}"
        time = self._seconds.get(second)
        if time is None:
            time = self._whole_second(second)
            if len(self._seconds) >= _CACHE_SIZE:
                self._seconds.clear()
            self._seconds[second] = time
        return time + (int(fraction[:6].ljust(6, "0")) if fraction else 0)

    def _whole_second(self, text: str) -> Micros:
        year = int(text[:4])
        try:
            # The Gregorian calendar repeats every 400 years, and Python's lacks the year 0 of the RFC.
            moment = datetime.fromisoformat(f"{2000 + year % 400}{text[4:]}")
        except ValueError:
            raise _RefusedError(Reason.DATE_INVALID) from None
        if year not in _YEARS:
            raise _RefusedError(Reason.DATE_OUT_OF_RANGE)
        moment = moment.replace(year=year)
        if moment.tzinfo is None:
            # fold=0: the first of an hour that occurs twice.
            moment = moment.replace(tzinfo=self._timezone)
            wall_time = moment.astimezone(UTC).astimezone(self._timezone)
            if wall_time.replace(tzinfo=None) != moment.replace(tzinfo=None):
                raise _RefusedError(Reason.DATE_NONEXISTENT)
        return from_datetime(moment)


def _price_data(data: object) -> PriceData:
    """Return the fields of a price, each checked on its own to find the reason for a refusal."""
    if data is None:
        raise _RefusedError(Reason.MISSING_FIELD)
    if not isinstance(data, dict):
        raise _RefusedError(Reason.WRONG_TYPE)
    if not {"date", "price", "volume", "symbol"} <= data.keys():
        raise _RefusedError(Reason.MISSING_FIELD)
    date, price, volume, symbol = data["date"], data["price"], data["volume"], data["symbol"]
    if type(date) is not str or type(symbol) is not str:
        raise _RefusedError(Reason.WRONG_TYPE)
    if isinstance(price, float):  # only NaN and Infinity arrive as a float
        raise _RefusedError(Reason.PRICE_NOT_FINITE)
    if isinstance(volume, float):
        raise _RefusedError(Reason.VOLUME_INVALID)
    if not isinstance(price, str) or not isinstance(volume, str):
        raise _RefusedError(Reason.WRONG_TYPE)
    return PriceData(date, str(price), str(volume), symbol)


def _price(value: float | str) -> float:
    """Return a price as the nearest float; a string must be a JSON number."""
    if isinstance(value, str) and not _NUMBER.fullmatch(value):
        raise _RefusedError(Reason.PRICE_INVALID)
    try:
        price = float(value)
    except OverflowError:
        price = math.inf
    if not math.isfinite(price):
        raise _RefusedError(Reason.PRICE_NOT_FINITE)
    return price


def _volume(value: float | str) -> int:
    """Return the exact volume, a whole number; a string must be a JSON number."""
    if isinstance(value, str) and not _NUMBER.fullmatch(value):
        raise _RefusedError(Reason.VOLUME_INVALID)
    try:
        number = Decimal(value)
    except InvalidOperation:  # an exponent that is too large for Decimal
        raise _RefusedError(Reason.VOLUME_INVALID) from None
    if number == 0:
        return 0
    if number < 0:
        raise _RefusedError(Reason.VOLUME_NEGATIVE)
    if number > MAX_VOLUME:  # before the conversion to int, which would expand 1e999999
        raise _RefusedError(Reason.VOLUME_TOO_LARGE)
    if number != int(number):
        raise _RefusedError(Reason.VOLUME_FRACTIONAL)
    return int(number)


def _is_control(character: str) -> bool:
    """Return whether it is a control character (C0, DEL, C1) or a lone surrogate, which UTF-8 can't encode."""
    return character < " " or "\x7f" <= character <= "\x9f" or "\ud800" <= character <= "\udfff"
