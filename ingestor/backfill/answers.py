"""The REST API's answers: bytes in, records and their faults out. No I/O, no clock, no logging.

A whole answer is refused only if it is not JSON of the documented form, or does not match the request. A wrong record
becomes a `Fault`, which names the record and the reason; the other records are kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import msgspec

from ingestor.errors import IngestorError
from ingestor.model import BAR_LENGTH
from ingestor.redaction import outside_text

MAX_VALUES = 100_000
"""JSON values in one answer: many times those of a day's bars or of all instruments. It bounds the cost of decoding."""

NAME_LIMIT = 40
"""Characters shown of an unexpected value."""

NAMED_OF_EACH = 3
"""Wrong records named for each reason; the others are counted."""

_T = TypeVar("_T")


class MalformedAnswerError(IngestorError):
    """The answer does not match the request, and is not used. The message completes "it has …"."""


class UnreadableAnswerError(MalformedAnswerError):
    """The answer is not JSON of the documented form: it was cut, or a proxy answered. A retry may help."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A wrong record. `time` is the start of its bar (UTC); None if unknown."""

    reason: str
    name: str
    time: datetime | None = None

    def may_lie_within(self, since: datetime, until: datetime) -> bool:
        """Return whether it may be a minute of a range; a time off the minute may also mean the next minute."""
        return self.time is None or since - BAR_LENGTH < self.time < until


class WrongValueError(ValueError):
    """A value of a record is not of the documented type."""


def fields_of(body: bytes) -> dict[str, Any]:
    """Return the top-level fields of an answer, undecoded: for `read`. Raises UnreadableAnswerError."""
    values = body.count(b",") + body.count(b"[") + body.count(b"{")
    if values > MAX_VALUES:
        raise UnreadableAnswerError(f"about {values:,} values, more than {MAX_VALUES:,}")
    try:
        return msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return _lenient_fields_of(body, error)


def _lenient_fields_of(body: bytes, error: Exception) -> dict[str, Any]:
    """Read an answer with NaN, Infinity or lone surrogates, which JSON forbids: each makes only its record wrong."""
    try:
        fields = json.loads(body.decode("utf-8-sig", "surrogateescape"), parse_int=_integer)
    except (ValueError, RecursionError):
        raise UnreadableAnswerError(f"an answer that is no JSON ({outside_text(error)})") from None
    if not isinstance(fields, dict):
        raise UnreadableAnswerError(f"an answer that is no object ({outside_text(error)})")
    return fields


def _integer(digits: str) -> float:
    """Return an integer; a float from 100 digits on, since Python refuses integers of thousands of digits."""
    return int(digits) if len(digits) < 100 else float(digits)


def read(value: Any, kind: type[_T]) -> _T:
    """Return a value converted to `kind`; a string may hold a number. Raises WrongValueError."""
    try:
        if isinstance(value, msgspec.Raw):
            return msgspec.json.decode(value, type=kind, strict=False)
        return msgspec.convert(value, type=kind, strict=False)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        raise WrongValueError(outside_text(error)) from None


def read_field(fields: dict[str, Any], name: str, kind: type[_T]) -> _T | None:
    """Return a field that may be absent or null. Raises UnreadableAnswerError if it has another type."""
    try:
        return read(fields[name], kind | None) if name in fields else None  # type: ignore[arg-type]
    except WrongValueError as error:
        raise UnreadableAnswerError(f"the field {name} ({outside_text(error)})") from None


def records_of(fields: dict[str, Any], noun: str) -> list[Any]:
    """Return the records of an answer, undecoded. Raises MalformedAnswerError if some are missing."""
    data = fields.get("data")
    try:
        records = read(data, list[msgspec.Raw]) if isinstance(data, msgspec.Raw) else read(data, list[Any])
    except WrongValueError:
        raise UnreadableAnswerError("no list in the field data") from None
    hits = read_field(fields, "hits", int)
    if hits not in {None, len(records)}:
        raise MalformedAnswerError(f"{shown(hits)} hits and {len(records)} {noun}")
    return records


def record_fields(record: Any) -> dict[str, Any] | None:
    """Return the fields of a record, undecoded: for `read`; None if it is no object."""
    try:
        return read(record, dict[str, msgspec.Raw]) if isinstance(record, msgspec.Raw) else read(record, dict[str, Any])
    except WrongValueError:
        return None


def summarize(faults: Sequence[Fault], records: int) -> str:
    """Return the number of wrong records with the reasons and some names; empty without faults."""
    if not faults:
        return ""
    return f"{len(faults):,} of {records:,} records are wrong: {'; '.join(_by_reason(faults))}"


def _by_reason(faults: Sequence[Fault]) -> Iterator[str]:
    for reason in dict.fromkeys(fault.reason for fault in faults):
        names = [fault.name for fault in faults if fault.reason == reason]
        others = f" and {len(names) - NAMED_OF_EACH:,} more" if len(names) > NAMED_OF_EACH else ""
        yield f"{reason} ({', '.join(names[:NAMED_OF_EACH])}{others})"


def shown(value: object) -> str:
    """Return an unexpected value for display: without secrets, printable and short."""
    return outside_text(value, limit=NAME_LIMIT)
