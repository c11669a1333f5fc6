"""Parses answers into listed instruments and wrong records. Pure."""

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
"""Characters kept of a name or an industry."""


@dataclass(frozen=True, slots=True)
class Instruments:
    """The instruments of an answer, the number of its `records`, and the wrong ones."""

    listed: tuple[Instrument, ...]
    records: int
    faults: tuple[Fault, ...] = ()


def parse_instruments(body: bytes) -> Instruments:
    """Return the instruments of an answer.

    Raises MalformedAnswerError if records are missing or none is an instrument, and its subclass UnreadableAnswerError
    if the answer is not JSON of the documented form. No bytes raise any other error.
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
    """Return an instrument, or a fault. Only the symbol is required: any other unreadable field is left empty."""
    symbol = _text(fields.get("symbol"))
    if not symbol:
        return Fault("no symbol", name)
    # Printable symbols as the stream accepts them; in the records of the backfill "*" stands for all symbols.
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
    """Return text that the database accepts: without NUL and lone surrogates."""
    return text and "".join(
        each for each in text[:MAX_TEXT] if each and not "\ud800" <= each <= "\udfff" and each != "\0"
    )


def _uuid(value: Any) -> UUID | None:
    try:
        return UUID(_text(value) or "")
    except ValueError:
        return None


def _is_active(value: Any) -> bool:
    """Return whether an instrument is active: true unless the provider says that it is not."""
    try:
        return read(value, bool | None) is not False  # type: ignore[arg-type]
    except WrongValueError:
        return True
