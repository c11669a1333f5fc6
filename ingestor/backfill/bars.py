"""Parses answers into one-minute bars: kept bars, wrong records, or the refusal of the whole answer. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from ingestor.backfill.answers import (
    Fault,
    MalformedAnswerError,
    WrongValueError,
    fields_of,
    read,
    read_field,
    record_fields,
    records_of,
    shown,
)
from ingestor.model import BAR_LENGTH, Bar, Label

EXCHANGE = "nzx"
INTERVAL = "1m"

MAX_VOLUME = 2**63 - 1
PRICES = ("open", "high", "low", "close")

_MOMENT = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ](?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?"
    r"(?:[Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])?"
)
"""RFC 3339, with or without an offset: Python's own parser accepts more."""

_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_BEGINNING = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Question:
    """A request for a symbol's bars that begin at or after `since` and before `until`, both whole minutes.

    The API accepts wall time of the exchange. It does not document which hour is meant if one occurs twice, nor whether
    the end is inclusive. The answer may therefore cover more than the request: `earliest` to `latest`.
    """

    symbol: str
    since: datetime
    until: datetime
    label: Label
    timezone: ZoneInfo

    @property
    def shift(self) -> timedelta:
        """The difference between a bar's timestamp and its start."""
        return BAR_LENGTH if self.label == "end" else timedelta()

    @property
    def first(self) -> datetime:
        """The first wanted timestamp."""
        return self.since + self.shift

    @property
    def end(self) -> datetime:
        """The first timestamp after the wanted ones."""
        return self.until + self.shift

    @property
    def wall_from(self) -> datetime:
        """The start in the request: naive."""
        return self.first.astimezone(self.timezone).replace(tzinfo=None)

    @property
    def wall_to(self) -> datetime:
        """The end in the request: naive; an hour later in an hour that occurs twice."""
        local = self.end.astimezone(self.timezone)
        is_ambiguous = local.replace(fold=0).utcoffset() != local.replace(fold=1).utcoffset()
        return local.replace(tzinfo=None, fold=0) + (timedelta(hours=1) if is_ambiguous else timedelta())

    @property
    def earliest(self) -> datetime:
        """The earliest moment that the wall time of the start may mean."""
        return min(_both(self.wall_from, self.timezone))

    @property
    def latest(self) -> datetime:
        """The latest moment that the wall time of the end may mean."""
        return max(_both(self.wall_to, self.timezone))

    def parameters(self) -> dict[str, str]:
        """Return the query of the request."""
        return {
            "ticker": self.symbol,
            "exchange": EXCHANGE,
            "datetime_from": f"{self.wall_from:%Y-%m-%d %H:%M:%S}",
            "datetime_to": f"{self.wall_to:%Y-%m-%d %H:%M:%S}",
            "interval": INTERVAL,
        }


@dataclass(frozen=True, slots=True)
class Bars:
    """The wanted, correct bars of an answer, the number of its `records`, and the wrong ones."""

    bars: tuple[Bar, ...]
    records: int
    faults: tuple[Fault, ...] = ()


def parse_bars(body: bytes, question: Question) -> Bars:
    """Return the bars of an answer to a question.

    Raises MalformedAnswerError if the answer belongs to another question, and its subclass UnreadableAnswerError if it
    is not JSON of the documented form. No bytes raise any other error.
    """
    fields = fields_of(body)
    records = records_of(fields, "bars")
    _check_envelope(fields, question)
    reader = _Reader(question)
    for position, record in enumerate(records, 1):
        reader.add(record, position)
    bars = reader.bars()
    _check_span(fields, question, sorted(reader.stamps))
    return Bars(bars, len(records), tuple(reader.faults))


def _check_envelope(fields: dict[str, Any], question: Question) -> None:
    """Raise MalformedAnswerError if interval, ticker or exchange contradict the question."""
    interval = read_field(fields, "interval", str)
    if interval not in {None, INTERVAL}:
        raise MalformedAnswerError(f"the interval '{shown(interval or '')}'")
    ticker = read_field(fields, "ticker", str)
    # Whether the API repeats the symbol's case and suffix is not documented.
    if ticker is not None and not f"{question.symbol}.".upper().startswith(f"{ticker}.".upper()):
        raise MalformedAnswerError(f"the ticker '{shown(ticker)}'")
    exchange = read_field(fields, "exchange", str)
    if exchange is not None and exchange.lower() != EXCHANGE:
        raise MalformedAnswerError(f"the exchange '{shown(exchange)}'")


def _check_span(fields: dict[str, Any], question: Question, stamps: Sequence[datetime]) -> None:
    """Compare `date_from` and `date_to` with the question. Raises MalformedAnswerError.

    The documentation has only their names. They may repeat the question; then a narrower span belongs to another one.
    Or they may be the times of the first and the last record.
    """
    texts = {name: _text(fields.get(name)) for name in ("date_from", "date_to")}
    begin, end = (_bound(text, question, is_end=name == "date_to") for name, text in texts.items())
    is_late = begin is not None and begin > question.first and not _is_near(begin, stamps[:1])
    is_early = end is not None and end < question.end - BAR_LENGTH and not _is_near(end, stamps[-1:])
    if is_late or is_early:
        raise MalformedAnswerError(f"the span {' to '.join(shown(text) for text in texts.values())}")


def _is_near(moment: datetime, stamps: Sequence[datetime]) -> bool:
    return any(abs(moment - stamp) <= BAR_LENGTH for stamp in stamps)


def _text(value: Any) -> str:
    try:
        return read(value, str)
    except WrongValueError:
        return ""


def _bound(text: str, question: Question, *, is_end: bool) -> datetime | None:
    """Return the moment of a bound, read as widely as possible; None if it is unreadable."""
    try:
        if not (_DAY.fullmatch(text) or _MOMENT.fullmatch(text)):
            return None
        moment = datetime.fromisoformat(text.upper())
        if is_end and _DAY.fullmatch(text):
            moment += timedelta(days=1)
        if moment.tzinfo is not None:
            return moment.astimezone(UTC)
        return (max if is_end else min)(_both(moment, question.timezone))
    except (ValueError, OverflowError):
        return None


class _FaultError(Exception):
    """Carries the reason why a record is wrong."""


@dataclass(slots=True)
class _Reader:
    """Reads the records of one answer in order."""

    question: Question
    minutes: dict[datetime, Bar | None] = field(default_factory=dict)
    """By start; None is a minute without trades."""
    contradicted: set[datetime] = field(default_factory=set)
    stamps: set[datetime] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)
    is_answered: bool = False
    """Whether a record is, or may be, of the requested range."""
    is_astray: bool = False
    """Whether a record lies beyond every range that the request's wall time may mean."""
    previous: datetime = _BEGINNING

    def add(self, record: Any, position: int) -> None:
        """Read a record: a bar, a minute without trades, an unwanted minute, or a fault."""
        name, time = f"record {position}", None
        try:
            fields = record_fields(record)
            if fields is None:
                raise _FaultError("a record that is no object")
            text = _text(fields.get("timestamp"))
            name = shown(text) or name
            stamp = self.previous = self._instant(text)
            self.stamps.add(stamp)
            if self._is_wanted(stamp):
                time = stamp - self.question.shift
                self._keep(time, _bar(fields, time))
                self.is_answered = True
            elif not self.question.earliest <= stamp <= self.question.latest:
                self.is_astray = True
                if not self._is_of_the_day(stamp):
                    self.faults.append(Fault("another day", name))
        except _FaultError as fault:
            self.faults.append(Fault(str(fault), name, time))
            self.is_answered = True

    def bars(self) -> tuple[Bar, ...]:
        """Return the wanted, correct bars. Raises MalformedAnswerError if all records are of other ranges."""
        if self.is_astray and not self.is_answered:
            span = f"{self.question.wall_from} to {self.question.wall_to}"
            raise MalformedAnswerError(f"bars, but none of the asked range ({span})")
        kept = (bar for time, bar in self.minutes.items() if bar is not None and time not in self.contradicted)
        return tuple(kept)

    def _is_wanted(self, stamp: datetime) -> bool:
        """Return whether a bar may be of the requested range; a time off the minute may mean the next minute."""
        return self.question.first - BAR_LENGTH < stamp < self.question.end

    def _is_of_the_day(self, stamp: datetime) -> bool:
        day = stamp.astimezone(self.question.timezone).date()
        return self.question.wall_from.date() <= day <= self.question.wall_to.date()

    def _keep(self, time: datetime, bar: Bar | None) -> None:
        if self.minutes.setdefault(time, bar) != bar:
            self.contradicted.add(time)
            raise _FaultError("different bars of one minute")

    def _instant(self, text: str) -> datetime:
        """Return the moment of a timestamp; without an offset it is wall time, and a repeated hour is read in order."""
        zone = self.question.timezone
        try:
            if not _MOMENT.fullmatch(text):
                raise ValueError
            moment = datetime.fromisoformat(text.upper())
            if moment.tzinfo is not None:
                return moment.astimezone(zone).astimezone(UTC)  # raises OverflowError if either zone can't hold it
            early, late = _both(moment, zone)
            if early.astimezone(zone).replace(tzinfo=None) != moment:
                raise _FaultError("a time that the exchange's clocks skipped")
        except (ValueError, OverflowError):
            raise _FaultError("no timestamp that can be read") from None
        return late if early <= self.previous or early < self.question.first <= late else early


def _both(wall: datetime, zone: ZoneInfo) -> tuple[datetime, datetime]:
    """Return the two moments that a wall time may mean; they differ only in an hour that occurs twice."""
    early, late = (wall.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
    return early, late


def _bar(fields: dict[str, Any], time: datetime) -> Bar | None:
    """Return the bar that begins at `time`; None for a minute without trades: no prices and no volume."""
    if time.second or time.microsecond:
        raise _FaultError("a time off the minute")
    if missing := [name for name in (*PRICES, "volume") if name not in fields]:
        raise _FaultError(f"no {missing[0]}")
    prices = [_number(fields, name) for name in PRICES]
    volume = _number(fields, "volume")
    if not volume and all(price is None for price in prices):
        return None
    opened, high, low, close = (_price(price) for price in prices)
    if high < max(opened, low, close):
        raise _FaultError("a high below another price")
    if low > min(opened, close):
        raise _FaultError("a low above another price")
    return Bar(time, opened, high, low, close, _volume(volume))


def _number(fields: dict[str, Any], name: str) -> float | None:
    try:
        number: float | None = read(fields[name], int | float | None)  # type: ignore[arg-type]
    except WrongValueError:
        raise _FaultError(f"no number as {name}") from None
    return number


def _price(value: float | None) -> float:
    """Return a price. Zero or less is refused: a provider sends it if it has no price."""
    if value is None:
        raise _FaultError("a price that is null")
    try:
        price = float(value)
    except OverflowError:
        price = math.inf
    if not math.isfinite(price):
        raise _FaultError("a price that is not finite")
    if price <= 0:
        raise _FaultError("a price that is not above zero")
    return price


def _volume(value: float | None) -> int:
    """Return a volume: whole units, zero or more."""
    if value is None:
        raise _FaultError("a volume that is null")
    if not -math.inf < value < math.inf:  # not isfinite(): a huge integer overflows it
        raise _FaultError("a volume that is not finite")
    if value < 0:
        raise _FaultError("a negative volume")
    if value > MAX_VOLUME:
        raise _FaultError("a volume that is too large")
    if value != int(value):
        raise _FaultError("a fractional volume")
    return int(value)
