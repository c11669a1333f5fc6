"""The REST API's answers: bytes in, records out, and the faults of records. No I/O, no clock, no logging.

An answer is refused as a whole only if it is not JSON of the documented form, or not what was asked for. A wrong record
costs itself only: it becomes a `Fault`, which says why and names the record.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar

import msgspec

from ingestor.errors import IngestorError
from ingestor.redaction import outside_text

MAX_VALUES = 100_000
"""JSON values in one answer: many times those of a day's bars, or of all instruments. It bounds what decoding takes."""

BAR_LENGTH = timedelta(minutes=1)
"""The length of one of the provider's bars."""

NAME_LIMIT = 40
"""Characters that are shown of a value that should not be there."""

NAMED_OF_EACH = 3
"""So many wrong records are named for each reason; the others are counted."""

_T = TypeVar("_T")


class MalformedAnswerError(IngestorError):
    """The answer is not what was asked for: nothing is known from it. The message completes "it has …"."""


class UnreadableAnswerError(MalformedAnswerError):
    """The answer is not JSON of the documented form: it was cut, or a proxy answered. Worth another try."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A wrong record. `time` is when its bar would begin (UTC); None if the record does not tell."""

    reason: str
    name: str
    time: datetime | None = None

    def may_lie_within(self, since: datetime, until: datetime) -> bool:
        """Whether it may be a minute of a range; one whose time is off the minute may be the next one, too."""
        return self.time is None or since - BAR_LENGTH < self.time < until


class WrongValueError(ValueError):
    """A value of a record is not of the documented type."""


def fields_of(body: bytes) -> dict[str, Any]:
    """Return the top-level fields of an answer, each to be given to `read`. Raises UnreadableAnswerError."""
    values = body.count(b",") + body.count(b"[") + body.count(b"{")
    if values > MAX_VALUES:
        raise UnreadableAnswerError(f"about {values:,} values, more than {MAX_VALUES:,}")
    try:
        return msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return _lenient_fields_of(body, error)


def _lenient_fields_of(body: bytes, error: Exception) -> dict[str, Any]:
    """Read what JSON forbids but services send: NaN, Infinity, half of a surrogate pair. Each costs its record only."""
    try:
        fields = json.loads(body.decode("utf-8-sig", "surrogateescape"), parse_int=_integer)
    except (ValueError, RecursionError):
        raise UnreadableAnswerError(f"an answer that is no JSON ({outside_text(error)})") from None
    if not isinstance(fields, dict):
        raise UnreadableAnswerError(f"an answer that is no object ({outside_text(error)})")
    return fields


def _integer(digits: str) -> float:
    """Return an integer; one of a hundred digits is no price or volume, and Python refuses one of thousands."""
    return int(digits) if len(digits) < 100 else float(digits)


def read(value: Any, kind: type[_T]) -> _T:
    """Return a value of an answer as a type; a number may be written as a string. Raises WrongValueError."""
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
    """Return the records of an answer, each unread. Raises MalformedAnswerError if some are missing."""
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
    """Return the fields of a record, each to be given to `read`; None if it is no object."""
    try:
        return read(record, dict[str, msgspec.Raw]) if isinstance(record, msgspec.Raw) else read(record, dict[str, Any])
    except WrongValueError:
        return None


def summarize(faults: Sequence[Fault], records: int) -> str:
    """Return what is wrong with how many of the records, by reason, with the names of some; empty for no faults."""
    if not faults:
        return ""
    return f"{len(faults):,} of {records:,} records are wrong: {'; '.join(_by_reason(faults))}"


def _by_reason(faults: Sequence[Fault]) -> Iterator[str]:
    for reason in dict.fromkeys(fault.reason for fault in faults):
        names = [fault.name for fault in faults if fault.reason == reason]
        others = f" and {len(names) - NAMED_OF_EACH:,} more" if len(names) > NAMED_OF_EACH else ""
        yield f"{reason} ({', '.join(names[:NAMED_OF_EACH])}{others})"


def shown(value: object) -> str:
    """Return a value that should not be there as it may be shown: without secrets, printable and short."""
    return outside_text(value, limit=NAME_LIMIT)
