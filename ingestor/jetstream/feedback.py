"""Messages between recorder and writer beside the stream. They may get lost and are repeated.

| subject                        | from     | meaning                                                               |
|--------------------------------|----------|-----------------------------------------------------------------------|
| STREAM.committed.SESSION       | writer   | the database has the session's batches up to a number                 |
| STREAM.missing.SESSION         | writer   | batches after a number are not in the stream: publish them again      |
| STREAM.gone.SESSION            | recorder | it no longer has these: their time is a gap                           |
| STREAM.state                   | recorder | a request: what does the database have of these sessions?             |
"""

from __future__ import annotations

from typing import TypeVar
from uuid import UUID

import msgspec

from ingestor.model import Micros

STATE_SECONDS = 2.0
"""Time limit of the writer's answer."""


class Committed(msgspec.Struct, frozen=True):
    """The database's record of a session after a commit.

    `messages` counts ticks and rejections. `batches` were written by the commit, with `added` ticks, in `seconds`.
    `missing`: messages that the database lacks.
    """

    last_batch: int
    messages: int = 0
    ticks: int = 0
    duplicates: int = 0
    added: int = 0
    missing: int = 0
    batches: int = 0
    seconds: float = 0.0
    last_message_at: Micros | None = None
    is_ended: bool = False


class Missing(msgspec.Struct, frozen=True):
    """The writer needs all of a session after `last_batch`. The database has `messages` messages of it.

    `read_to` is the sequence up to which the writer has read the stream.
    """

    last_batch: int
    messages: int
    read_to: int


class Gone(msgspec.Struct, frozen=True):
    """The recorder has nothing between `last_batch` and `first_batch` any more."""

    last_batch: int
    first_batch: int


class StateRequest(msgspec.Struct, frozen=True):
    """A question for the last batches of sessions."""

    sessions: tuple[UUID, ...]


class StateReply(msgspec.Struct, frozen=True):
    """The answer by session. `read_to` is the sequence up to which the writer has written or set aside the stream."""

    read_to: int
    sessions: dict[UUID, Committed]


_M = TypeVar("_M", bound=msgspec.Struct)
encode = msgspec.json.Encoder().encode


def decode(body: bytes, kind: type[_M]) -> _M | None:
    """Return a message; None if it is none of this kind."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.MsgspecError:
        return None


def committed_subject(stream: str, session: UUID | str) -> str:
    """Return the subject of `Committed`."""
    return f"{stream}.committed.{session}"


def missing_subject(stream: str, session: UUID | str) -> str:
    """Return the subject of `Missing`."""
    return f"{stream}.missing.{session}"


def gone_subject(stream: str, session: UUID | str) -> str:
    """Return the subject of `Gone`."""
    return f"{stream}.gone.{session}"


def state_subject(stream: str) -> str:
    """Return the subject of `StateRequest`."""
    return f"{stream}.state"
