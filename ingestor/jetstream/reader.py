"""Reads the stream in its order, each message once, from any place on.

The reader keeps its place itself. JetStream's own record of what was delivered and acknowledged is not used: messages
that it delivers again come behind newer ones, and it may lose that record. So each reader has a consumer in one
server's memory (what NATS calls an ordered consumer), and a new one from the last message on whenever messages are
missing, a server stops, or nothing arrives. See docs/decisions/0029.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections import deque
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from ingestor.clock import Clock, from_datetime
from ingestor.errors import BufferUnavailableError
from ingestor.jetstream.link import Link
from ingestor.jetstream.message import Assembler, Label, MessageDamagedError, read_label, session_of, unpack
from ingestor.model import Batch, Micros
from ingestor.redaction import outside_text

PULL_BYTES = 4 * 2**20
PULL_MESSAGES = 1000
"""The most that a server sends ahead of the writer."""

PULL_SECONDS = 5.0
"""Life of a request for messages."""

HEARTBEAT_SECONDS = 1.0
SILENCE_SECONDS = 3.0
"""A consumer that sends nothing, not even a heartbeat, for so long is gone."""

_NANOSECOND = 1_000_000_000
_HEARTBEAT, _NO_MESSAGES, _EXPIRED, _CONFLICT = "100", "404", "408", "409"
_GOES_ON = ("batch completed", "message size exceeds", "exceeded max")
"""Beginnings of the descriptions of 409 after which the consumer is still there."""


@dataclass(frozen=True, slots=True)
class Received:
    """A complete message: batches of one session. `sequence` is that of its last part.

    `published_at` is the server's time. A message that cannot be read has a `damage` instead of batches.
    """

    sequence: int
    session: UUID
    batches: tuple[Batch, ...]
    size: int
    published_at: Micros
    is_inherited: bool = False
    damage: str = ""


@dataclass(frozen=True, slots=True)
class StreamState:
    """The state of the stream by its leader: `lagging` of its `replicas` are not in step (0 of 1 without a cluster)."""

    created: str
    first: int
    last: int
    messages: int
    size: int
    replicas: int
    lagging: int


class StreamReader:
    """Reads complete messages in order. `position` is the sequence of the last one; reading goes on behind it."""

    def __init__(self, link: Link, stream: str, clock: Clock) -> None:
        self._link = link
        self._stream = stream
        self._clock = clock
        self._created = ""
        self._client: Client | None = None
        self._subscription: Subscription | None = None
        self._consumer = ""
        self._consumed = 0  # the consumer's own count, without a gap
        self._raw_position = 0  # of the last message, complete or not
        self._credit = 0  # bytes that were asked for and have not come
        self._asked_at = self._received_at = 0.0
        self._assembler = Assembler()
        self._arrived: deque[Msg] = deque()
        self._news = asyncio.Event()
        self.position = 0
        self.pending = 0
        """Messages behind the last one that was read, when it was sent."""
        self.opened = 0
        """How often a consumer was made."""
        self.is_behind_reset = False
        """Whether the stream was found to begin again; the caller resets it."""

    @property
    def needed_from(self) -> int:
        """The sequence from which the stream must keep its messages: parts of incomplete batches are needed again."""
        oldest = self._assembler.oldest
        return self._raw_position + 1 if oldest is None else oldest

    def restart(self, position: int) -> None:
        """Go on behind another place."""
        self._forget()
        self.position = self._raw_position = max(position, 0)
        self._assembler = Assembler()

    async def state(self) -> StreamState:
        """Ask the leader for the state of the stream; read it from its beginning if it is another one or went back.

        Raises BufferUnavailableError.
        """
        state = await stream_state(self._link, self._stream)
        if self._created and (state.created != self._created or state.last < self._raw_position):
            self.restart(state.first - 1)
            self.is_behind_reset = True
        self._created = state.created
        return state

    async def read(self, seconds: float, max_bytes: int = PULL_BYTES) -> list[Received]:
        """Return the next messages; none if there are none for so many seconds. Raises BufferUnavailableError."""
        await self._ensure_open()
        found: list[Received] = []
        size = 0
        deadline = self._clock.monotonic() + seconds
        while size < max_bytes:
            await self._ask()
            left = deadline - self._clock.monotonic()
            if not self._arrived:
                if found or left <= 0:
                    break
                await self._wait(min(left, HEARTBEAT_SECONDS))
                continue
            received = self._take(self._arrived.popleft())
            if received is not None:
                found.append(received)
                size += received.size
            if not self._is_open:  # something is missing; what came before it is good
                break
        return found

    async def close(self) -> None:
        """Remove the consumer, if its server answers."""
        client, consumer = self._client, self._consumer
        self._forget()
        if client is not None and client is self._link.client and consumer:
            try:
                await self._link.api(f"CONSUMER.DELETE.{self._stream}.{consumer}")
            except BufferUnavailableError:
                return  # it ends by itself

    async def _wait(self, seconds: float) -> None:
        """Wait for a message. Raises BufferUnavailableError if the consumer or the connection is gone."""
        self._news.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()
                return
        if self._client is not self._link.client or self._clock.monotonic() - self._received_at > SILENCE_SECONDS:
            self._forget()
            raise BufferUnavailableError("The server that sends the stream's messages is silent.")

    @property
    def _is_open(self) -> bool:
        return self._subscription is not None

    def _forget(self) -> None:
        self._client = self._subscription = None
        self._arrived = deque()

    async def _ensure_open(self) -> None:
        client = self._link.current()
        if self._subscription is not None and self._client is client:
            return
        await self.state()
        self._consumer = f"reader-{secrets.token_hex(6)}"
        self._raw_position = self.position
        self._assembler = Assembler()
        config: dict[str, Any] = {
            "name": self._consumer,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": self.position + 1,
            "ack_policy": "none",
            "replay_policy": "instant",
            "inactive_threshold": 60 * _NANOSECOND,
            "num_replicas": 1,
            "mem_storage": True,
        }
        call = f"CONSUMER.CREATE.{self._stream}.{self._consumer}"
        await self._link.api(call, {"stream_name": self._stream, "config": config, "action": "create"})
        self._arrived = arrived = deque[Msg]()

        async def arrive(message: Msg) -> None:
            arrived.append(message)
            self._received_at = self._clock.monotonic()
            self._news.set()

        try:
            self._subscription = await client.subscribe(client.new_inbox(), cb=arrive)
        except (NatsError, OSError) as error:
            raise BufferUnavailableError(f"Reading the stream failed: {outside_text(error)}.") from error
        self._client = client
        self._consumed = self._credit = 0
        self._received_at = self._asked_at = self._clock.monotonic()
        self.opened += 1

    async def _ask(self) -> None:
        """Ask for more messages when half of what was asked for has come, or the request has expired."""
        now = self._clock.monotonic()
        if self._subscription is None or (self._credit > PULL_BYTES // 2 and now - self._asked_at < PULL_SECONDS + 1):
            return
        request = {
            "batch": PULL_MESSAGES,
            "max_bytes": PULL_BYTES,
            "expires": round(PULL_SECONDS * _NANOSECOND),
            "idle_heartbeat": round(HEARTBEAT_SECONDS * _NANOSECOND),
        }
        self._credit, self._asked_at = PULL_BYTES, now
        await self._link.publish(
            f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._consumer}",
            json.dumps(request).encode(),
            reply=self._subscription.subject,
        )

    def _take(self, message: Msg) -> Received | None:
        """Note a message; return its batches if it completes some."""
        status = (message.headers or {}).get("Status")
        if status is not None and not message.reply.startswith("$JS.ACK"):
            self._status(status, (message.headers or {}).get("Description", ""))
            return None
        metadata = message.metadata
        sequence, consumed = metadata.sequence.stream, metadata.sequence.consumer
        self._credit -= len(message.data) + 512
        if consumed != self._consumed + 1 or sequence <= self._raw_position:  # a message was lost on its way
            self._forget()
            return None
        self._consumed, self._raw_position = consumed, sequence
        self.pending = metadata.num_pending
        received = self._assembled(message, sequence)
        if self._assembler.oldest is None:
            self.position = sequence
        return received

    def _assembled(self, message: Msg, sequence: int) -> Received | None:
        at = from_datetime(message.metadata.timestamp)
        session = UUID(int=0)
        try:
            session = session_of(message.subject)
            label: Label = read_label(message.headers)
            body = self._assembler.add(label, session, message.data, sequence)
            if body is None:
                return None
            batches = unpack(label, body, session)
        except MessageDamagedError as error:
            return Received(sequence, session, (), len(message.data), at, damage=str(error))
        return Received(sequence, session, batches, len(body), at, label.is_inherited)

    def _status(self, status: str, description: str) -> None:
        if status == _HEARTBEAT:
            return
        self._credit = 0
        if status in {_NO_MESSAGES, _EXPIRED}:
            return
        if status == _CONFLICT and description.lower().startswith(_GOES_ON):
            return
        self._forget()  # the consumer or its server is gone


async def stream_state(link: Link, stream: str) -> StreamState:
    """Return the state of the stream. Raises BufferUnavailableError."""
    info = await link.api(f"STREAM.INFO.{stream}")
    state, others = info["state"], (info.get("cluster") or {}).get("replicas") or []
    return StreamState(
        created=str(info.get("created", "")),
        first=int(state["first_seq"]),
        last=int(state["last_seq"]),
        messages=int(state["messages"]),
        size=int(state["bytes"]),
        replicas=1 + len(others),
        lagging=sum(not each.get("current", False) or bool(each.get("offline", False)) for each in others),
    )
