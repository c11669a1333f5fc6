"""The options that a client gives in the query of the stream's address. Pure."""

from __future__ import annotations

import base64
import json
import math
import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from urllib.parse import parse_qsl

from ingestor.batch import Row
from ingestor.clock import from_datetime
from ingestor.errors import IngestorError
from ingestor.model import Micros
from ingestor.store.record import LogPosition, Place, Progress

MAX_SYMBOLS = 1000
MAX_SYMBOL_LENGTH = 32
MAX_QUERY_LENGTH = 16_384

_INSTANT = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,6})?([Zz]|[+-]\d\d:\d\d)")
_CURSOR = re.compile(r"([0-9a-f]{8})\.(\d{1,18})\.(\d{1,9})(?:\.(-?\d{1,18})(?:\.([\w-]+))?)?", re.ASCII)
_LATEST = from_datetime(datetime(9999, 1, 1, tzinfo=UTC))
_BAD_CURSOR = "resume: not a cursor; use the cursor of the last price that was received, unchanged"


class OptionError(IngestorError):
    """An option is wrong. The message goes to the client."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which ticks a client gets, and in which form. Clients with equal filters share their frames."""

    symbols: frozenset[bytes] | None = None
    since: Micros | None = None
    until: Micros | None = None
    meta: bool = False
    compress: bool = False

    @property
    def is_open(self) -> bool:
        """Whether all ticks pass."""
        return self.symbols is None and self.since is None and self.until is None

    def matches(self, row: Row) -> bool:
        """Return whether a client gets a tick."""
        return (
            (self.symbols is None or row[5] in self.symbols)
            and (self.since is None or row[1] >= self.since)
            and (self.until is None or row[1] < self.until)
        )

    def within(self, first: Micros, last: Micros) -> Filter:
        """Return the filter without the bounds that all arrivals from `first` to `last` meet."""
        since = None if self.since is not None and first >= self.since else self.since
        until = None if self.until is not None and last < self.until else self.until
        return self if (since, until) == (self.since, self.until) else replace(self, since=since, until=until)


@dataclass(frozen=True, slots=True)
class Resume:
    """A client's cursor: the mark of its log, and what it has."""

    mark: str
    progress: Progress


@dataclass(frozen=True, slots=True)
class Options:
    """The options of one stream. `speed` is None for as fast as possible, else a factor of real time.

    The table is read from the arrival `since` on. `coverage` is the instant from which on the relay reports when the
    record is complete: such a client gets late ticks of any arrival, so that its own record becomes the same.
    """

    filter: Filter = Filter()
    resume: Resume | None = None
    speed: float | None = None
    gaps: bool = False
    since: Micros | None = None
    coverage: Micros | None = None

    @property
    def symbols(self) -> tuple[str, ...]:
        """The symbols, in order; empty for all."""
        return tuple(sorted(symbol.decode() for symbol in self.filter.symbols or ()))


def parse_options(query: str, now: Micros) -> Options:
    """Return the options of a query. Raises OptionError, with a message for the client."""
    if len(query) > MAX_QUERY_LENGTH:
        raise OptionError("The options are too long.")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query), errors="strict", max_num_fields=50)
    except ValueError:
        raise OptionError("The options cannot be read: write name=value&name=value, percent-encoded.") from None
    given = dict(pairs)
    if len(given) < len(pairs):
        raise OptionError("An option is given twice.")
    if unknown := sorted(given.keys() - _KNOWN):
        raise OptionError(f"There is no option {unknown[0][:40]!r}; there are {', '.join(sorted(_KNOWN))}.")
    since, until = (_instant(name, given[name]) if name in given else None for name in ("from", "to"))
    if since is not None and since > now:
        raise OptionError("from: lies in the future")
    if until is not None and until <= (-math.inf if since is None else since):
        raise OptionError("to: must be later than from")
    symbols = _symbols(given["symbols"]) if "symbols" in given else None
    coverage = _coverage(given)
    return Options(
        Filter(
            symbols,
            since if coverage is None else None,
            until,
            meta=_flag("meta", given),
            compress=_flag("compress", given),
        ),
        parse_cursor(given["resume"]) if "resume" in given else None,
        _speed(given.get("speed", "max")),
        _flag("gaps", given),
        since,
        coverage,
    )


_KNOWN = {"from", "to", "resume", "symbols", "speed", "gaps", "meta", "coverage", "compress"}


def _coverage(given: dict[str, str]) -> Micros | None:
    if "coverage" not in given:
        return None
    if not _flag("meta", given) or not given.keys() & {"from", "resume"} or given.keys() & {"to", "symbols", "speed"}:
        raise OptionError("coverage: goes with meta=1 and from or resume, and without to, symbols and speed")
    return _instant("coverage", given["coverage"])


def _instant(name: str, text: str) -> Micros:
    if not _INSTANT.fullmatch(text):
        raise OptionError(f"{name}: not an instant with an offset; write 2026-11-26T10:00:00%2B13:00, or end it with Z")
    try:
        found = from_datetime(datetime.fromisoformat(text.upper().replace(" ", "T")))
        return min(max(found, 0), _LATEST)
    except (ValueError, OverflowError):
        raise OptionError(f"{name}: there is no such instant") from None


def _symbols(text: str) -> frozenset[bytes]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not 1 <= len(names) <= MAX_SYMBOLS:
        raise OptionError(f"symbols: write 1 to {MAX_SYMBOLS} symbols, separated by commas")
    if any(len(name) > MAX_SYMBOL_LENGTH or not name.isprintable() for name in names):
        raise OptionError(f"symbols: a symbol has at most {MAX_SYMBOL_LENGTH} printable characters")
    return frozenset(name.encode() for name in names)


def _speed(text: str) -> float | None:
    if text == "max":
        return None
    if not re.fullmatch(r"\d{1,6}(\.\d{1,6})?", text, re.ASCII) or float(text) == 0:
        raise OptionError("speed: write max, or a factor of real time such as 1 or 60")
    return float(text)


def _flag(name: str, given: dict[str, str]) -> bool:
    value = given.get(name, "0")
    if value not in {"0", "1"}:
        raise OptionError(f"{name}: write 1 or 0")
    return value == "1"


def cursor_text(mark: str, progress: Progress) -> str:
    """Return a progress as the text by which a client can resume."""
    position, place = progress.position, progress.place
    text = f"{mark}.{position.entry}.{position.skip}"
    if place is None:
        return text
    text += f".{place.received_at}"
    if place.last is None:
        return text
    time, _, price, volume, occurrence, symbol = place.last
    packed = json.dumps([time, price, volume, occurrence, symbol.decode()])
    return f"{text}.{base64.urlsafe_b64encode(packed.encode()).decode().rstrip('=')}"


def parse_cursor(text: str) -> Resume:
    """Return the progress of a cursor. Raises OptionError."""
    match = _CURSOR.fullmatch(text)
    if match is None:
        raise OptionError(_BAD_CURSOR)
    mark, entry, skip, received_at, last = match.groups()
    place = None
    if received_at is not None and not -1 <= int(received_at) < _LATEST:
        raise OptionError(_BAD_CURSOR)
    if received_at is not None:
        place = Place(int(received_at), _row(int(received_at), last) if last else None)
    return Resume(mark, Progress(LogPosition(int(entry), int(skip)), place))


def _row(received_at: Micros, packed: str) -> Row:
    try:
        found = json.loads(base64.urlsafe_b64decode(packed + "=" * (-len(packed) % 4)))
        time, price, volume, occurrence, symbol = found
        row = (int(time), received_at, float(price), int(volume), int(occurrence), str(symbol).encode())
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise OptionError(_BAD_CURSOR) from None
    if (
        not 0 <= row[0] < _LATEST
        or not math.isfinite(row[2])
        or abs(row[3]) >= 2**63
        or abs(row[4]) >= 2**31
        or 0 in row[5]
    ):
        raise OptionError(_BAD_CURSOR)
    return row
