"""The content of the spool's file: its tables, rows and checksums. Pure.

SQLite checks the structure of its file in part, and the values in it not at all. So our own checksums cover every value
that the spool relies on, and every row names its predecessor. This detects rows that are changed, missing, moved or
left over from an older state of the file.
"""

from __future__ import annotations

import secrets
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

FORMAT = 1
"""The format of the table `batches`. New fields of a batch have defaults, so they need no new format."""

TABLES = {
    # The same in all formats, so that an older version can prove that a newer one wrote the file.
    "queue": "CREATE TABLE queue (id INTEGER PRIMARY KEY, format INTEGER, content BLOB, checksum INTEGER)",
    "batches": "CREATE TABLE batches (position INTEGER PRIMARY KEY, previous INTEGER, checksum INTEGER, body BLOB)",
}

Row: TypeAlias = tuple[int, int, int, bytes]
"""A row of the table `batches`: position, position of the previous batch, checksum, body."""

_STATE = struct.Struct(">5q")
_FORMAT = struct.Struct(">q")
_PLACE = struct.Struct(">4q")


class FileDamagedError(Exception):
    """The file differs from what was written; the message says how."""


class NewerFormatError(Exception):
    """A newer version wrote the file, as its checksum proves."""


@dataclass(frozen=True, slots=True)
class QueueState:
    """The expected content of the file, stored in it by the transaction of each change.

    `file` is a random number that identifies the file. Batches up to position `forgotten` have left the queue, `last`
    is the position of the newest batch it ever held. `depth` and `size` count batches and bytes of bodies.
    """

    file: int
    forgotten: int = 0
    last: int = 0
    depth: int = 0
    size: int = 0

    @classmethod
    def new(cls) -> QueueState:
        """Return the state of a new file."""
        return cls(secrets.randbits(63))

    @property
    def is_consistent(self) -> bool:
        """Whether the numbers agree: the queue is empty if and only if all batches have left it."""
        empty = self.last == self.forgotten
        return 0 <= self.forgotten <= self.last and (self.depth > 0, self.size > 0) == (not empty, not empty)


def pack_state(state: QueueState) -> bytes:
    """Return the state as bytes, without a checksum."""
    return _STATE.pack(state.file, state.forgotten, state.last, state.depth, state.size)


def unpack_state(content: bytes) -> QueueState | None:
    """Return the state in bytes; None if they hold none or it is inconsistent."""
    if len(content) != _STATE.size:
        return None
    state = QueueState(*_STATE.unpack(content))
    return state if state.is_consistent else None


def state_row(state: QueueState) -> tuple[int, bytes, int]:
    """Return the row of the table `queue`: format, content, checksum."""
    content = pack_state(state)
    return FORMAT, content, zlib.crc32(content, zlib.crc32(_FORMAT.pack(FORMAT)))


def state_of(row: object) -> QueueState:
    """Return the state in a row of `queue` (format, content, checksum).

    Raises FileDamagedError, and NewerFormatError if the row is valid and of a newer format.
    """
    match row:
        case (int(number), bytes(content), int(checksum)) if checksum == zlib.crc32(
            content, zlib.crc32(_FORMAT.pack(number))
        ):
            if number > FORMAT:
                raise NewerFormatError
            if number == FORMAT and (state := unpack_state(content)) is not None:
                return state
    raise FileDamagedError("the state of the queue differs from its checksum")


def row_of(file: int, position: int, previous: int, body: bytes) -> Row:
    """Return a row of `batches`."""
    return position, previous, _checksum(file, position, previous, body), body


def body_of(file: int, row: Sequence[object]) -> bytes:
    """Return the body in a row of `batches`. Raises FileDamagedError."""
    match row:
        case (int(position), int(previous), int(checksum), bytes(body)) if checksum == _checksum(
            file, position, previous, body
        ):
            return body
    raise FileDamagedError("a batch differs from its checksum")


def _checksum(file: int, position: int, previous: int, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(_PLACE.pack(file, position, previous, len(body))))
