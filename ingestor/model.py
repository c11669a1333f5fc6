"""The values that travel between the stages: frozen, slotted, without behaviour.

Every instant in the pipeline is an integer: microseconds since 1970-01-01T00:00:00Z (`Micros`), the
resolution of PostgreSQL's `timestamptz`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from typing import Literal, NamedTuple, TypeAlias
from uuid import UUID

import msgspec

Micros: TypeAlias = int
"""An instant: microseconds since the Unix epoch, UTC."""

Duration: TypeAlias = int
"""A length of time in microseconds."""

SECOND: Duration = 1_000_000
DAY: Duration = 86_400 * SECOND

BAR_LENGTH = timedelta(minutes=1)
"""The length of the bars that are fetched, compared and drawn: one minute."""

RAW_LIMIT = 64 * 1024
"""Bytes kept of a rejected message."""


class Tick(msgspec.Struct, frozen=True, gc=False):
    """One trade print as the exchange sent it. A struct for speed: one is made for each message."""

    symbol: str
    time: Micros
    price: float
    volume: int


class Reason(StrEnum):
    """Why a message was not stored as a tick: the fixed list behind `ingest.rejected_messages.reason`."""

    BINARY_FRAME = "binary_frame"
    MESSAGE_TOO_BIG = "message_too_big"  # in a replay; the stream's session ends instead
    INVALID_UTF8 = "invalid_utf8"
    NOT_JSON = "not_json"
    NOT_AN_OBJECT = "not_an_object"
    UNKNOWN_TYPE = "unknown_type"
    MISSING_FIELD = "missing_field"
    WRONG_TYPE = "wrong_type"
    PRICE_INVALID = "price_invalid"
    PRICE_NOT_FINITE = "price_not_finite"
    VOLUME_INVALID = "volume_invalid"
    VOLUME_FRACTIONAL = "volume_fractional"
    VOLUME_NEGATIVE = "volume_negative"
    VOLUME_TOO_LARGE = "volume_too_large"
    SYMBOL_INVALID = "symbol_invalid"
    DATE_INVALID = "date_invalid"
    DATE_NONEXISTENT = "date_nonexistent"
    DATE_OUT_OF_RANGE = "date_out_of_range"


@dataclass(frozen=True, slots=True)
class Rejection:
    """A message that could not be stored as a tick, kept with its reason.

    `position` is the message's place in its batch, counted from 1 over ticks and rejections alike.
    `raw` holds the first `RAW_LIMIT` bytes; `raw_bytes` is the full size.
    """

    position: int
    received_at: Micros
    reason: str
    raw: bytes
    raw_bytes: int


class EndReason(StrEnum):
    """Why a session ended: the fixed list behind `ingest.stream_sessions.end_reason`."""

    STOPPED = "stopped"  # a signal asked the daemon to stop
    FINISHED = "finished"  # a replay reached the end of its file
    CLOSED = "closed"  # the server closed the connection, or the network did
    KEEPALIVE = "keepalive"  # a ping was not answered in time
    STALL = "stall"  # alive, but without a tick in trading hours
    CLOCK_STEP = "clock_step"  # this machine's wall clock was set
    MESSAGE_TOO_BIG = "message_too_big"
    PROTOCOL_ERROR = "protocol_error"  # the peer broke RFC 6455
    BUFFER_FULL = "buffer_full"  # memory or spool had reached its bound
    DISK_FULL = "disk_full"  # the disk of the spool is full
    SPOOL_DAMAGED = "spool_damaged"  # unwritten batches were lost with a spool file
    COMMITS_LOST = "commits_lost"  # the database no longer has what it had acknowledged
    FROZEN = "frozen"  # this process did not run for longer than the keepalive
    AUTHENTICATION_TIMEOUT = "authentication_timeout"
    STREAM_LIMIT = "stream_limit"
    NOT_AUTHORISED = "not_authorised"
    NO_ACCESS = "no_access"
    SERVER_ERROR = "server_error"  # an error message with any other text
    INTERNAL_ERROR = "internal_error"  # a bug of the daemon
    UPSTREAM_GAP = "upstream_gap"  # the relay that was recorded from has a gap itself
    CRASHED = "crashed"  # the process ended without a record; written by its successor


@dataclass(frozen=True, slots=True)
class Session:
    """One connection to the feed (`stream`), or one replay of a file (`replay`).

    The id is a UUIDv7 made here, so that a session can begin while the database is unavailable. Only sessions
    of kind `stream` count as coverage.
    """

    id: UUID
    instance: str
    endpoint: str
    connected_at: Micros
    kind: Literal["stream", "replay"] = "stream"


@dataclass(frozen=True, slots=True)
class SessionEnd:
    """When and why a session ended. `close_code` is the WebSocket's, if it sent one."""

    at: Micros
    reason: EndReason
    close_code: int | None = None


class Tally(NamedTuple):
    """The totals of a session in the database after a commit, which added `added` of the ticks."""

    ticks: int
    duplicates: int
    added: int
    missing: int = 0
    """Messages that were acknowledged earlier and are now missing."""

    def after(self, earlier: Tally | None) -> Tally:
        """Return this tally with the ticks added by an earlier one."""
        return self if earlier is None else self._replace(added=earlier.added + self.added)


@dataclass(frozen=True, slots=True)
class Batch:
    """Ticks, rejections and their proof of coverage, committed together.

    `number` counts 1, 2, 3 … in its session; a number once committed is never written again. `rows` are
    `count` rows of PostgreSQL's binary COPY format for `market.ticks`, without header and trailer, so that
    batches can be joined. `span` is the time of the oldest and of the newest of the ticks, `months` are the first days
    of the UTC months in which they lie.
    `covered_until` is None until the session is authenticated. `last_message_at` is the arrival of the session's last
    tick or rejection, `last_tick_at` that of its last tick: only a tick proves that prices arrive. `messages_before`
    counts the ticks and rejections of the session's earlier batches: a database with fewer has lost some.
    `cursor` is that of the last tick, if the ticks come from a relay: all before it are in this batch or earlier ones.
    """

    session: Session
    number: int
    rows: bytes = b""
    count: int = 0
    span: tuple[Micros, Micros] | None = None
    months: frozenset[date] = frozenset()
    rejections: tuple[Rejection, ...] = ()
    authenticated_at: Micros | None = None
    covered_until: Micros | None = None
    last_message_at: Micros | None = None
    end: SessionEnd | None = None
    messages_before: int = 0
    last_tick_at: Micros | None = None
    cursor: str | None = None

    @property
    def size(self) -> int:
        """Bytes in memory, with an allowance for Python objects."""
        return 1024 + len(self.rows) + sum(256 + len(rejection.raw) for rejection in self.rejections)

    @property
    def is_heartbeat(self) -> bool:
        """Whether it carries only coverage, so that a newer heartbeat may replace it."""
        return not self.count and not self.rejections and self.end is None and self.number > 1


class ResumePoint(NamedTuple):
    """The place at which recording a relay continues: behind a cursor (None: unknown), covered from `covered_until`."""

    cursor: str | None
    covered_until: Micros


Label: TypeAlias = Literal["start", "end"]
"""Whether the provider's bars carry the time of their start or of their end."""


@dataclass(frozen=True, slots=True)
class GapSpan:
    """A span within one trading day that is backfilled as a unit."""

    started_at: datetime
    ended_at: datetime


@dataclass(frozen=True, slots=True)
class Bar:
    """The trades of one symbol in the minute that begins at `time`; `backfilled` if fetched from the provider."""

    time: datetime
    open: float
    high: float
    low: float
    close: float
    volume: int
    backfilled: bool = False


@dataclass(frozen=True, slots=True)
class Instrument:
    """An instrument as the provider lists it."""

    symbol: str
    company_name: str | None
    industry: str | None
    uuid: UUID | None
    active: bool


def minute_of(moment: datetime) -> datetime:
    """Return the start of the minute that contains a moment, in UTC."""
    return moment.astimezone(UTC).replace(second=0, microsecond=0)
