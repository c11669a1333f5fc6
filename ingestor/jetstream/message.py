"""The messages of the stream: batches of one session as msgpack, in parts if they are too large for one. Pure."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

import msgspec

from ingestor.errors import IngestorError
from ingestor.model import Batch

FORMAT = "1"
"""The format of the body. New fields of a batch have defaults, so they need no new format."""

HEADER_ROOM = 4096
"""Bytes of a message that are kept free for its headers and subject."""

MESSAGE_ID = "Nats-Msg-Id"
EXPECTED_STREAM = "Nats-Expected-Stream"
EXPECTED_SEQUENCE = "Nats-Expected-Last-Subject-Sequence"
_FORMAT = "Ingestor-Format"
_BATCHES = "Ingestor-Batches"
_PART = "Ingestor-Part"
_CHECKSUM = "Ingestor-Checksum"
_INHERITED = "Ingestor-Inherited"

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[Batch, ...]).decode


class MessageDamagedError(IngestorError):
    """A message of the stream is not what a recorder publishes. The message says how it differs."""


@dataclass(frozen=True, slots=True)
class Label:
    """The headers of a message: the numbers of its first and last batch, its part of how many, and a checksum of all.

    `is_inherited`: an earlier process recorded the batches.
    """

    first: int
    last: int
    part: int
    parts: int
    checksum: int
    is_inherited: bool

    @property
    def is_last_part(self) -> bool:
        """Whether the batches are complete with this message."""
        return self.part == self.parts


def subject_of(stream: str, session: UUID) -> str:
    """Return the subject of a session's batches."""
    return f"{stream}.batch.{session}"


def session_of(subject: str) -> UUID:
    """Return the session of a subject. Raises MessageDamagedError."""
    try:
        return UUID(subject.rpartition(".")[2])
    except ValueError:
        raise MessageDamagedError("its subject names no session") from None


def pack(
    batches: Sequence[Batch], *, stream: str, room: int, attempt: str = "", is_inherited: bool = False
) -> list[tuple[dict[str, str], bytes]]:
    """Return the messages, headers and body, of consecutive batches of one session, each of at most `room` bytes.

    `attempt` is part of their ids: the stream takes no message with an id that it had within the last minutes, even if
    it lost that message since.
    """
    body = _encode(tuple(batches))
    checksum = zlib.crc32(body)
    size = room - HEADER_ROOM
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    first, last, session = batches[0].number, batches[-1].number, batches[0].session.id
    messages = []
    for part, piece in enumerate(pieces, 1):
        name = f"{session}-{last}" + (f".{part}" if len(pieces) > 1 else "") + (f"-{attempt}" if attempt else "")
        headers = {
            MESSAGE_ID: name,
            EXPECTED_STREAM: stream,
            _FORMAT: FORMAT,
            _BATCHES: f"{first}-{last}",
            _PART: f"{part}/{len(pieces)}",
            _CHECKSUM: f"{checksum:08x}",
        }
        if is_inherited:
            headers[_INHERITED] = "1"
        messages.append((headers, piece))
    return messages


def read_label(headers: Mapping[str, str] | None) -> Label:
    """Return what the headers of a message say. Raises MessageDamagedError."""
    found = headers or {}
    if (form := found.get(_FORMAT)) != FORMAT:
        raise MessageDamagedError(f"it has the format {form!r}; a newer version of ingestor may have written it")
    batches = re.fullmatch(r"(\d{1,18})-(\d{1,18})", found.get(_BATCHES, ""), re.ASCII)
    part = re.fullmatch(r"(\d{1,6})/(\d{1,6})", found.get(_PART, ""), re.ASCII)
    checksum = re.fullmatch(r"[0-9a-f]{8}", found.get(_CHECKSUM, ""), re.ASCII)
    if batches is None or part is None or checksum is None:
        raise MessageDamagedError("its headers are incomplete")
    label = Label(
        int(batches[1]), int(batches[2]), int(part[1]), int(part[2]), int(checksum[0], 16), _INHERITED in found
    )
    if not (1 <= label.first <= label.last and 1 <= label.part <= label.parts):
        raise MessageDamagedError("its headers contradict each other")
    return label


def unpack(label: Label, body: bytes, session: UUID) -> tuple[Batch, ...]:
    """Return the batches of a complete body. Raises MessageDamagedError."""
    if zlib.crc32(body) != label.checksum:
        raise MessageDamagedError("its body differs from its checksum")
    try:
        batches = _decode(body)
    except msgspec.MsgspecError as error:
        raise MessageDamagedError(f"its body cannot be read: {type(error).__name__}") from None
    if not batches or any(batch.session.id != session for batch in batches):
        raise MessageDamagedError("its batches are not of the session that its subject names")
    return batches


class Assembler:
    """Joins the parts of large messages. Parts of one session follow each other, with other sessions' between them."""

    def __init__(self) -> None:
        self._parts: dict[UUID, tuple[Label, int, list[bytes]]] = {}

    @property
    def oldest(self) -> int | None:
        """The stream's sequence of the oldest part of incomplete batches; None if all are complete."""
        return min((sequence for _, sequence, _ in self._parts.values()), default=None)

    def add(self, label: Label, session: UUID, body: bytes, sequence: int) -> bytes | None:
        """Add a message; return the complete body, or None while parts are missing.

        A part that does not continue the one before it is dropped, and so is that one: a recorder that was interrupted
        publishes all parts again.
        """
        if label.parts == 1:
            self._parts.pop(session, None)
            return body
        before = self._parts.pop(session, None)
        if label.part == 1:
            self._parts[session] = (label, sequence, [body])
            return None
        if before is None:
            return None
        last, began, pieces = before
        if (last.part + 1, last.parts, last.checksum) != (label.part, label.parts, label.checksum):
            return None
        pieces.append(body)
        if label.is_last_part:
            return b"".join(pieces)
        self._parts[session] = (label, began, pieces)
        return None
