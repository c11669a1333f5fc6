"""The messages of a relay, with what makes a tick itself: its arrival, its number, and the cursor behind it. Pure."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from ingestor.model import DAY, Micros, Reason, Tick
from ingestor.stream.decoder import EARLIEST, MAX_MESSAGE_BYTES, Authenticated, Decoder, PriceData, Refused, ServerError

MAX_CURSOR_LENGTH = 4096
_MAX_OCCURRENCE = 2**31 - 1


class RecordedTick(msgspec.Struct, frozen=True, gc=False):
    """A tick as the relay's record has it."""

    tick: Tick
    received_at: Micros
    occurrence: int
    cursor: str


class Covered(msgspec.Struct, frozen=True):
    """The relay's record is complete between two instants; or, if not `is_complete`, it is not, although it said so."""

    since: Micros
    until: Micros
    is_complete: bool = True


class NotARelay(msgspec.Struct, frozen=True):
    """A price without what makes a tick itself: the server is no relay."""


RecordedMessage: TypeAlias = RecordedTick | Covered | NotARelay | Authenticated | ServerError | Refused


class _RecordedData(PriceData):
    received_at: str = ""
    occurrence: int = 0
    cursor: str = ""


class _Price(msgspec.Struct, tag_field="type", tag="price"):
    data: _RecordedData


class _CoverageData(msgspec.Struct, rename={"since": "from", "until": "to"}):
    since: str
    until: str
    complete: bool = True


class _Coverage(msgspec.Struct, tag_field="type", tag="coverage"):
    data: _CoverageData


_decode = msgspec.json.Decoder(_Price | _Coverage).decode


class RecordedDecoder:
    """Decodes a relay's frames. Never raises. Messages of the common protocol are left to `decoder`."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def decode(self, frame: bytes, at: Micros, *, binary: bool = False) -> RecordedMessage:
        """Return the message of a frame that was read at the instant `at`."""
        if binary or len(frame) > MAX_MESSAGE_BYTES:
            return Refused(Reason.BINARY_FRAME if binary else Reason.MESSAGE_TOO_BIG)
        try:
            message = _decode(frame)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            return self._other(frame, at)
        if isinstance(message, _Coverage):
            return self._coverage(message.data)
        return self._tick(frame, message.data, at)

    def _other(self, frame: bytes, at: Micros) -> RecordedMessage:
        message = self._decoder.decode(frame, at)
        return NotARelay() if isinstance(message, Tick) else message

    def _tick(self, frame: bytes, data: _RecordedData, at: Micros) -> RecordedMessage:
        if not data.received_at or not data.occurrence or not data.cursor:
            return self._other(frame, at)
        received_at = self._decoder.instant(data.received_at)
        if received_at is None or not EARLIEST <= received_at <= at + DAY:
            return Refused(Reason.DATE_INVALID if received_at is None else Reason.DATE_OUT_OF_RANGE)
        if not 1 <= data.occurrence <= _MAX_OCCURRENCE or len(data.cursor) > MAX_CURSOR_LENGTH:
            return Refused(Reason.WRONG_TYPE)
        tick = self._decoder.tick(data, received_at) or self._decoder.decode(frame, received_at)
        return RecordedTick(tick, received_at, data.occurrence, data.cursor) if isinstance(tick, Tick) else tick

    def _coverage(self, data: _CoverageData) -> RecordedMessage:
        since, until = self._decoder.instant(data.since), self._decoder.instant(data.until)
        if since is None or until is None or since > until:
            return Refused(Reason.DATE_INVALID)
        return Covered(since, until, data.complete)
