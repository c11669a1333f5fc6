"""The recorder's side of the replicated buffer: publishes batches, and keeps them until the database has them.

| what is known of a batch        | where it is                                             |
|---------------------------------|---------------------------------------------------------|
| nothing                         | in the buffer, behind `_next`                           |
| the stream acknowledged it      | in the buffer (a second later on disk), and in `_sent`  |
| the database committed it       | no longer in the buffer                                 |

The stream may lose what it acknowledged. Then the writer misses it, or `_watch` finds that the database does not get
it, and everything that is not committed is published again, from the oldest batch on.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
from collections import OrderedDict, deque
from typing import NamedTuple
from uuid import UUID

from ingestor.buffer.fifo import Buffer
from ingestor.buffer.spool import Entry
from ingestor.clock import Clock
from ingestor.errors import BufferUnavailableError, ConfigurationError
from ingestor.jetstream.feedback import (
    STATE_SECONDS,
    Committed,
    Gone,
    Missing,
    StateReply,
    StateRequest,
    committed_subject,
    decode,
    encode,
    gone_subject,
    missing_subject,
    state_subject,
)
from ingestor.jetstream.link import CONNECT_SECONDS, Link, Message
from ingestor.jetstream.message import MessageDamagedError, session_of
from ingestor.jetstream.outlet import Outlet, SequenceError
from ingestor.jetstream.reader import stream_state
from ingestor.jetstream.setup import prepare_stream
from ingestor.model import SECOND, Tally
from ingestor.settings import Settings
from ingestor.telemetry.buffer_events import BufferEvents, BufferState
from ingestor.telemetry.events import Telemetry
from ingestor.telemetry.liveness import LivenessDeadline

JOINED_ROWS = 20_000
JOINED_BYTES = 512 * 2**10
"""The most of consecutive batches in one message."""

MAX_SENT = 1024
"""Messages that are remembered until their commit is known. Beyond, every other one is enough."""

MAX_SESSIONS = 256
"""Sessions for which this process answers the writer."""

WATCH_SECONDS = 1.0
LATE_SECONDS = 3.0
"""A message that was not committed so long after it was published is asked for."""

AGAIN_SECONDS = 10.0
"""Time for which a writer that misses batches has to read them, before they are published once more."""

STATE_REPORT_SECONDS = 5.0
SETUP_SECONDS = 2.0
"""Time between two looks for a stream that no server serves."""

_BACKOFF = (0.05, 0.1, 0.25, 0.5, 1.0)


class _Sent(NamedTuple):
    """A published message: the buffer's position, number and session of its last batch, and the stream's sequence."""

    position: int
    session: UUID
    number: int
    sequence: int
    at: float


class Publisher:
    """Publishes the buffer's batches in its order, one message at a time, and drops them after their commit."""

    def __init__(
        self,
        settings: Settings,
        *,
        buffer: Buffer,
        clock: Clock,
        telemetry: Telemetry,
        liveness: LivenessDeadline | None = None,
    ) -> None:
        self._settings = settings
        self._stream = settings.buffer_stream
        self._buffer = buffer
        self._clock = clock
        self._telemetry = telemetry
        self._liveness = liveness or LivenessDeadline(clock)
        self.events = BufferEvents(clock, telemetry.readiness, "database")
        self._link = Link(settings, name=f"ingestor run {settings.instance}", on_change=self._link_changed)
        self._link.on(committed_subject(self._stream, "*"), self._on_committed)
        self._link.on(missing_subject(self._stream, "*"), self._on_missing)
        self._outlet = Outlet(self._link, self._stream)
        self._next = 0  # the position up to which batches are published
        self._sent: deque[_Sent] = deque()
        self._numbers: OrderedDict[UUID, int] = OrderedDict()  # the newest published batch of each session
        self._committed: dict[UUID, int] = {}  # the newest committed batch of each session
        self._requests: dict[UUID, Missing] = {}  # what the writer misses
        self._republished: dict[UUID, tuple[float, float]] = {}  # sequence of the first batch published again, and when
        self._attempt = ""  # part of the ids of messages that are published again
        self._in_doubt: set[UUID] = set()  # sessions of which the stream has lost something
        self._is_prepared = self._has_prepared = False
        self._prepared_at = -math.inf
        self._wake = asyncio.Event()
        self._drop = asyncio.Event()
        self._drop_to = 0
        self.published_all = asyncio.Event()
        """Set while the stream has acknowledged everything."""

    async def run(self) -> None:
        """Publish until cancelled. Raises ConfigurationError if an operator must act."""
        tasks = [
            asyncio.create_task(work, name=name)
            for name, work in (
                ("link", self._link.run()),
                ("publish", self._publish_all()),
                ("drop", self._drop_committed()),
                ("watch_buffer", self._watch()),
            )
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in tasks:
            if not task.cancelled():
                task.result()

    async def wait_until_published(self) -> None:
        """Wait until the stream has acknowledged everything, and the writer had a moment to commit it."""
        await self.published_all.wait()
        await self._clock.sleep(LATE_SECONDS)

    # Publishing.

    async def _publish_all(self) -> None:
        self._next = self._buffer.committed
        await self._link.wait(CONNECT_SECONDS)
        while True:
            self._liveness.extend()
            await self._answer_requests()
            self._buffer.added.clear()
            entries = await self._buffer.read(self._next, JOINED_ROWS, JOINED_BYTES)
            portion = self._portion(entries)
            if portion:
                self.published_all.clear()
                await self._publish(portion)
            elif entries:  # all are committed
                self._skip(entries, 0)
            else:
                self.published_all.set()
                self._liveness.clear()
                await self._wait_for_news()

    async def _wait_for_news(self) -> None:
        if self._wake.is_set() or self._buffer.added.is_set():
            self._wake.clear()
            return
        waiting = [asyncio.create_task(self._wake.wait()), asyncio.create_task(self._buffer.added.wait())]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
        self._wake.clear()

    def _portion(self, entries: list[Entry]) -> list[Entry]:
        """Return the first entries that go into one message: of one session and process, and not committed yet."""
        if not entries:
            return []
        first = entries[0]
        session, inherited = first.batch.session.id, self._buffer.is_inherited(first.position)
        found = []
        for entry in entries:
            if entry.batch.session.id != session or self._buffer.is_inherited(entry.position) != inherited:
                break
            if entry.batch.number > self._committed.get(session, 0):
                found.append(entry)
        return found

    async def _publish(self, portion: list[Entry]) -> None:
        """Publish one message, with retries until the stream has it or something of it is missing there."""
        session = portion[0].batch.session.id
        batches = [entry.batch for entry in portion]
        inherited = self._buffer.is_inherited(portion[0].position)
        attempt = 0
        while not self._requests:
            self._liveness.extend()
            try:
                if not self._is_prepared:
                    await self._prepare()
                if not self._outlet.knows(session) and not await self._locate(session, portion):
                    return
                began = self._clock.monotonic()
                sequence = await self._outlet.publish(batches, attempt=self._attempt, is_inherited=inherited)
            except SequenceError:
                self._outlet.forget(session)
                attempt += 1
                if attempt > len(_BACKOFF):  # a leader that is none any more may answer; do not ask it in a loop
                    await self._clock.sleep(_BACKOFF[-1])
            except BufferUnavailableError as error:
                await self._failed(error, attempt)
                attempt += 1
            else:
                self.events.published(self._clock.monotonic() - began)
                self._buffer.write_works()
                self._note(portion, sequence)
                return

    def _note(self, portion: list[Entry], sequence: int) -> None:
        """Remember a published message until its commit is known."""
        last = portion[-1]
        session, number = last.batch.session.id, last.batch.number
        self._next = last.position
        self._numbers[session] = number
        self._numbers.move_to_end(session)
        while len(self._numbers) > MAX_SESSIONS:
            oldest, _ = self._numbers.popitem(last=False)
            for known in (self._committed, self._republished):
                known.pop(oldest, None)
            self._outlet.forget(oldest)
        if session in self._in_doubt:
            self._in_doubt.discard(session)
            self._republished[session] = (sequence, self._clock.monotonic())
        self._sent.append(_Sent(last.position, session, number, sequence, self._clock.monotonic()))
        if len(self._sent) > MAX_SENT:
            self._thin()
        self._release()

    def _thin(self) -> None:
        """Drop every other one of the remembered messages: the next one of its session stands for it."""
        kept: deque[_Sent] = deque()
        for index, sent in enumerate(self._sent):
            following = self._sent[index + 1] if index + 1 < len(self._sent) else None
            if following is None or following.session != sent.session or index % 2:
                kept.append(sent)
        self._sent = kept

    def _skip(self, entries: list[Entry], sequence: int) -> None:
        """Note batches that need not be published: the stream or the database has them."""
        for entry in entries:
            if entry.batch.session.id != entries[0].batch.session.id:
                break
            self._note([entry], sequence)

    async def _locate(self, session: UUID, portion: list[Entry]) -> bool:
        """Find out what the stream has of a session; return whether the portion is next to be published."""
        last = await self._outlet.last_message(session)
        self._outlet.expect(session, last.sequence)
        if session in self._in_doubt:
            return True
        needed = max(self._committed.get(session, 0), 0)
        published = self._numbers.get(session, 0)
        if last.batch < published and published > needed:
            self._lost(session, needed)
            return False
        there = [entry for entry in portion if entry.batch.number <= last.batch]
        if there:
            self._skip(there, last.sequence)
        return not there

    def _lost(self, session: UUID, after: int) -> None:
        """Publish everything again that is not committed, because the stream has lost some of a session."""
        self.events.republishing(session, after)
        self._attempt = secrets.token_hex(4)
        self._next = self._buffer.committed
        self._sent.clear()
        self._numbers.pop(session, None)
        self._numbers[session] = after
        self._in_doubt.add(session)
        self._republished[session] = (math.inf, self._clock.monotonic())
        self._outlet.forget(session)

    async def _failed(self, error: BufferUnavailableError, attempt: int) -> None:
        self.events.unavailable(str(error), waiting_bytes=self._buffer.size)
        self._buffer.write_failed()
        if error.is_unserved and self._clock.monotonic() - self._prepared_at > SETUP_SECONDS:
            self._is_prepared = False
        await self._clock.sleep(_BACKOFF[min(attempt, len(_BACKOFF) - 1)])
        if self._link.client is None:
            await self._link.wait(_BACKOFF[-1])

    async def _prepare(self) -> None:
        """Create the stream if it is missing."""
        is_first = not self._has_prepared
        self._prepared_at = self._clock.monotonic()
        try:
            setup = await prepare_stream(self._link, self._settings)
        except ConfigurationError as error:
            if self._has_prepared:
                raise BufferUnavailableError(str(error)) from error
            raise
        self._is_prepared = self._has_prepared = True
        if setup.created:
            self.events.stream_created(self._stream, self._settings.buffer_replicas, is_first=is_first)
        if is_first:
            self.events.stream_differs(self._stream, setup.differences)

    def _link_changed(self, problem: str | None) -> None:
        if problem is not None:
            self.events.unavailable(problem, waiting_bytes=self._buffer.size)
            self._buffer.write_failed()

    # The database's commits.

    async def _on_committed(self, message: Message) -> None:
        committed = decode(message.data, Committed)
        if committed is not None and (session := _session(message)) in self._numbers and session is not None:
            self._note_committed(session, committed)

    def _note_committed(self, session: UUID, committed: Committed) -> None:
        if committed.last_batch <= self._committed.get(session, 0):
            return
        self._committed[session] = committed.last_batch
        at = committed.last_message_at
        self._telemetry.committed_elsewhere(
            session,
            Tally(committed.ticks, committed.duplicates, committed.added, committed.missing),
            batches=committed.batches,
            seconds=committed.seconds,
            lag=None if at is None else (self._clock.wall() - at) / SECOND,
            is_ended=committed.is_ended,
        )
        if committed.missing:
            self._telemetry.commits_lost(session, committed.missing)
            self._buffer.invalidate_session(session)
        self._release()

    def _release(self) -> None:
        """Let go of the oldest messages whose commit is known."""
        while self._sent and self._committed.get(self._sent[0].session, 0) >= self._sent[0].number:
            self._drop_to = self._sent.popleft().position
            self._drop.set()

    async def _drop_committed(self) -> None:
        while True:
            await self._drop.wait()
            self._drop.clear()
            await self._buffer.acknowledge_to(self._drop_to)

    # Losses of the stream.

    async def _on_missing(self, message: Message) -> None:
        missing = decode(message.data, Missing)
        if missing is not None and (session := _session(message)) in self._numbers and session is not None:
            self._requests[session] = missing
            self._wake.set()

    async def _answer_requests(self) -> None:
        """Publish again what the writer misses, or tell it that this is not possible."""
        requests, self._requests = self._requests, {}
        for session, missing in requests.items():
            if self._is_on_its_way(session, missing.read_to):
                continue
            first = await self._first_behind(session, missing.last_batch)
            if first is not None and first.batch.messages_before <= missing.messages:
                self._lost(session, missing.last_batch)
                continue
            self.events.batches_gone(session, missing.last_batch)
            gone = Gone(missing.last_batch, first.batch.number if first is not None else 0)
            with contextlib.suppress(BufferUnavailableError):  # the writer asks again
                await self._link.publish(gone_subject(self._stream, session), encode(gone))

    def _is_on_its_way(self, session: UUID, read_to: int) -> bool:
        """Return whether the writer has not read yet what was published again a moment ago."""
        sequence, at = self._republished.get(session, (0, -math.inf))
        return sequence > read_to and self._clock.monotonic() - at < AGAIN_SECONDS

    async def _first_behind(self, session: UUID, number: int) -> Entry | None:
        """Return the oldest batch of a session behind a number that the buffer still has."""
        position = self._buffer.committed
        while entries := await self._buffer.read(position, JOINED_ROWS, JOINED_BYTES):
            for entry in entries:
                if entry.batch.session.id == session and entry.batch.number > number:
                    return entry
            position = entries[-1].position
        return None

    async def _watch(self) -> None:
        """Ask for messages whose commit is late, and look at the stream now and then."""
        reported_at = asked_at = -math.inf
        while True:
            await self._clock.sleep(WATCH_SECONDS)
            now = self._clock.monotonic()
            try:
                if self._sent and now - max(self._sent[0].at, asked_at) > LATE_SECONDS:
                    asked_at = now
                    await self._ask(self._sent[0])
                if now - reported_at > STATE_REPORT_SECONDS:
                    reported_at = now
                    await self._report_state()
            except BufferUnavailableError:
                continue  # the publisher reports it

    async def _ask(self, sent: _Sent) -> None:
        """Find out whether a message whose commit is late is lost."""
        reply = None
        with contextlib.suppress(BufferUnavailableError):  # there may be no active writer
            answer = await self._link.request(
                state_subject(self._stream),
                encode(StateRequest((sent.session,))),
                timeout=STATE_SECONDS,
                is_of_server=False,
            )
            reply = decode(answer, StateReply)
        if reply is not None and (found := reply.sessions.get(sent.session)) is not None:
            self._note_committed(sent.session, found)
            if found.last_batch < sent.number and sent.sequence and reply.read_to >= sent.sequence:
                self._request(sent.session, Missing(found.last_batch, found.messages, reply.read_to))
                return
        if self._sent and self._sent[0] == sent:
            last = await self._outlet.last_message(sent.session)
            if last.batch < sent.number:
                self._request(sent.session, Missing(self._committed.get(sent.session, 0), 2**62, 2**62))

    def _request(self, session: UUID, missing: Missing) -> None:
        self._requests[session] = missing
        self._wake.set()

    async def _report_state(self) -> None:
        state = await stream_state(self._link, self._stream)
        self.events.state = BufferState(self._clock.wall(), state.messages, state.size, state.replicas, state.lagging)


def _session(message: Message) -> UUID | None:
    try:
        return session_of(message.subject)
    except MessageDamagedError:
        return None
