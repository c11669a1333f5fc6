"""Instruments out of the bytes of an answer: which are listed, and which records are wrong. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

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
from ingestor.backfill.bars import EXCHANGE
from ingestor.model import Instrument
from ingestor.stream.decoder import MAX_SYMBOL_LENGTH

MAX_TEXT = 500
"""Characters of a name or an industry that are kept."""


@dataclass(frozen=True, slots=True)
class Instruments:
    """What an answer lists, the number of its `records`, and those that are wrong."""

    listed: tuple[Instrument, ...]
    records: int
    faults: tuple[Fault, ...] = ()


def parse_instruments(body: bytes) -> Instruments:
    """Return the instruments of an answer.

    Raises MalformedAnswerError if a part of them is missing or none is one, and UnreadableAnswerError, which is one, if
    it is not JSON of the documented form; nothing else, whatever the bytes are.
    """
    fields = fields_of(body)
    records = records_of(fields, "instruments")
    exchange = read_field(fields, "exchange", str)
    if exchange is not None and exchange.lower() != EXCHANGE:
        raise MalformedAnswerError(f"the exchange '{shown(exchange)}'")
    listed: dict[str, Instrument] = {}
    faults: list[Fault] = []
    for position, record in enumerate(records, 1):
        each = _listing(record_fields(record) or {}, f"record {position}")
        if isinstance(each, Instrument) and listed.setdefault(each.symbol, each) != each:
            each = Fault("listed twice, and differently", each.symbol)
        if isinstance(each, Fault):
            faults.append(each)
    if records and not listed:
        raise MalformedAnswerError(f"{len(records):,} records, and none of them an instrument")
    return Instruments(tuple(listed.values()), len(records), tuple(faults))


def _listing(fields: dict[str, Any], name: str) -> Instrument | Fault:
    """Return an instrument, or why it is none. Only the symbol is needed: another field that can't be read is empty."""
    symbol = _text(fields.get("symbol"))
    if not symbol:
        return Fault("no symbol", name)
    # The printable ones of what the stream takes; "*" stands for all symbols in the records of the backfill.
    if len(symbol) > MAX_SYMBOL_LENGTH or symbol != symbol.strip() or not symbol.isprintable() or symbol == "*":
        return Fault("a symbol that can't be one", shown(symbol))
    exchange = _text(fields.get("exchange"))
    if exchange is not None and exchange.lower() != EXCHANGE:
        return Fault("another exchange", shown(symbol))
    company_name, industry = (_shortened(_text(fields.get(each))) for each in ("company_name", "industry"))
    return Instrument(symbol, company_name, industry, _uuid(fields.get("uuid4")), _is_active(fields.get("active")))


def _text(value: Any) -> str | None:
    try:
        text: str | None = read(value, str | None)  # type: ignore[arg-type]
    except WrongValueError:
        return None
    return text


def _shortened(text: str | None) -> str | None:
    """Return text that a database takes: no NUL, no half of a surrogate pair."""
    return text and "".join(
        each for each in text[:MAX_TEXT] if each and not "\ud800" <= each <= "\udfff" and each != "\0"
    )


def _uuid(value: Any) -> UUID | None:
    try:
        return UUID(_text(value) or "")
    except ValueError:
        return None


def _is_active(value: Any) -> bool:
    """Whether an instrument may be traded: it is asked for unless the provider says that it is not."""
    try:
        return read(value, bool | None) is not False  # type: ignore[arg-type]
    except WrongValueError:
        return True
