"""The content of the spool's file: its tables, its rows, and the checksums that prove them. Pure.

SQLite checks the structure of its file in part, and of the values in it nothing. So every value that the spool acts on
is under a checksum of ours, and every row names the one before it: what is changed, missing, moved or left over from an
older state of the file does not fit.
"""

from __future__ import annotations

import secrets
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

FORMAT = 1
"""Of the table `batches`. Fields that a batch has since gained have defaults, so they need no new one."""

TABLES = {
    # The same in all formats, so that an older version can prove that a newer one wrote the file.
    "queue": "CREATE TABLE queue (id INTEGER PRIMARY KEY, format INTEGER, content BLOB, checksum INTEGER)",
    "batches": "CREATE TABLE batches (position INTEGER PRIMARY KEY, previous INTEGER, checksum INTEGER, body BLOB)",
}

Row: TypeAlias = tuple[int, int, int, bytes]
"""Of the table `batches`: position, position of the batch before it, checksum, body."""

_STATE = struct.Struct(">5q")
_FORMAT = struct.Struct(">q")
_PLACE = struct.Struct(">4q")


class FileDamagedError(Exception):
    """The file is not what was written; the message says in which way."""


class NewerFormatError(Exception):
    """A newer version wrote the file: its checksum proves it."""


@dataclass(frozen=True, slots=True)
class QueueState:
    """What must be in the file; kept in it, in the transaction of each change.

    `file` is a random number that tells this file from the one before it. Positions up to `forgotten` have left the
    queue, `last` is that of the newest batch that ever was in it. `depth` and `size` count batches and bytes of bodies.
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
        """Whether the numbers can be true together: a queue is empty if all of it has left, and only then."""
        empty = self.last == self.forgotten
        return 0 <= self.forgotten <= self.last and (self.depth > 0, self.size > 0) == (not empty, not empty)


def pack_state(state: QueueState) -> bytes:
    """Return the state as bytes, without a checksum."""
    return _STATE.pack(state.file, state.forgotten, state.last, state.depth, state.size)


def unpack_state(content: bytes) -> QueueState | None:
    """Return the state that bytes hold; None where they can't be one."""
    if len(content) != _STATE.size:
        return None
    state = QueueState(*_STATE.unpack(content))
    return state if state.is_consistent else None


def state_row(state: QueueState) -> tuple[int, bytes, int]:
    """Return format, content and checksum for the table `queue`."""
    content = pack_state(state)
    return FORMAT, content, zlib.crc32(content, zlib.crc32(_FORMAT.pack(FORMAT)))


def state_of(row: object) -> QueueState:
    """Return the state that a row of `queue` (format, content, checksum) holds.

    Raises FileDamagedError, and NewerFormatError where the row is sound and of a format that is not known yet.
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
    """Return the body that a row of `batches` holds. Raises FileDamagedError."""
    match row:
        case (int(position), int(previous), int(checksum), bytes(body)) if checksum == _checksum(
            file, position, previous, body
        ):
            return body
    raise FileDamagedError("a batch differs from its checksum")


def _checksum(file: int, position: int, previous: int, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(_PLACE.pack(file, position, previous, len(body))))
