"""Publishes messages into the stream: one at a time, each behind the one before it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from ingestor.errors import BufferUnavailableError
from ingestor.jetstream.link import ApiError, Link, checked
from ingestor.jetstream.message import EXPECTED_SEQUENCE, MessageDamagedError, pack, read_label, subject_of
from ingestor.model import Batch

PUBLISH_SECONDS = 2.0
"""Time limit of an acknowledgement: a full message on slow disks takes a fraction of it."""

LARGEST_MESSAGE = 2**20
"""Bytes of a message at most, also if the servers allow more."""

WRONG_SEQUENCE = 10071
NO_MESSAGE = 10037


class SequenceError(BufferUnavailableError):
    """The last message of the session in the stream is not the one that was published last."""


@dataclass(frozen=True, slots=True)
class LastMessage:
    """The newest message of a session in the stream: up to which batch it is complete, and its sequence.

    Without one, both are 0.
    """

    sequence: int = 0
    batch: int = 0


class Outlet:
    """Publishes batches. The stream refuses a message unless it follows the session's last one.

    So a message whose acknowledgement is lost can be published again: the stream takes it, or says `duplicate`, or
    refuses it, and then `last_message` tells whether it is there.
    """

    def __init__(self, link: Link, stream: str) -> None:
        self._link = link
        self._stream = stream
        self._expected: dict[UUID, int] = {}

    @property
    def room(self) -> int:
        """The most bytes of a message."""
        return min(self._link.max_payload, LARGEST_MESSAGE)

    async def publish(self, batches: Sequence[Batch], *, attempt: str = "", is_inherited: bool = False) -> int:
        """Publish consecutive batches of one session; return the stream's sequence.

        Raises SequenceError, and BufferUnavailableError if the outcome is unknown: then call it again with the same
        batches, or ask for the `last_message`.
        """
        session = batches[0].session.id
        sequence = self._expected[session]
        for headers, body in pack(
            batches, stream=self._stream, room=self.room, attempt=attempt, is_inherited=is_inherited
        ):
            sequence = await self._publish(session, headers, body, sequence)
        self._expected[session] = sequence
        return sequence

    async def _publish(self, session: UUID, headers: dict[str, str], body: bytes, after: int) -> int:
        subject = subject_of(self._stream, session)
        answer = await self._link.request(
            subject, body, headers=headers | {EXPECTED_SEQUENCE: str(after)}, timeout=PUBLISH_SECONDS
        )
        try:
            return int(checked(answer)["seq"])
        except ApiError as error:
            if error.code == WRONG_SEQUENCE:
                raise SequenceError(str(error)) from error
            raise

    def knows(self, session: UUID) -> bool:
        """Return whether the place of the session's next message is known."""
        return session in self._expected

    def expect(self, session: UUID, sequence: int) -> None:
        """Set the sequence of the message that the session's next one must follow; 0 for none."""
        self._expected[session] = sequence

    def forget(self, session: UUID) -> None:
        """Forget the place of a session that has ended."""
        self._expected.pop(session, None)

    async def last_message(self, session: UUID) -> LastMessage:
        """Return the newest message of a session, as the stream's leader has it. Raises BufferUnavailableError."""
        try:
            answer = await self._link.api(
                f"STREAM.MSG.GET.{self._stream}", {"last_by_subj": subject_of(self._stream, session)}
            )
        except ApiError as error:
            if error.code == NO_MESSAGE:
                return LastMessage()
            raise
        found = answer["message"]
        sequence = int(found["seq"])
        try:
            label = read_label(_headers(found.get("hdrs", "")))
        except MessageDamagedError:
            return LastMessage(sequence, 0)
        return LastMessage(sequence, label.last if label.is_last_part else label.first - 1)


def _headers(encoded: str) -> dict[str, str]:
    """Return the headers of a stored message: NATS/1.0 and lines as in HTTP, in base64."""
    lines = base64.b64decode(encoded).decode("utf-8", errors="replace").split("\r\n")[1:]
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines) if name}
