"""The writer's side of the replicated buffer: reads the stream in order, commits, and then says so.

A message of the stream is skipped if the database has its batches. If the database lacks earlier messages of the
session, the session is set aside: its recorder is asked to publish again what is missing, and only if that is not
possible, the hole is declared, so that its time is a gap.
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict, deque
from collections.abc import Collection
from dataclasses import dataclass, field
from uuid import UUID

from tenacity import RetryCallState, wait_random_exponential

from ingestor.clock import Clock
from ingestor.errors import (
    BufferUnavailableError,
    ConfigurationError,
    DatabaseAccessError,
    HoleError,
    StandbyError,
    StoreError,
)
from ingestor.jetstream.feedback import (
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
from ingestor.jetstream.link import Link, Message
from ingestor.jetstream.message import MessageDamagedError, session_of
from ingestor.jetstream.reader import Received, StreamReader
from ingestor.jetstream.setup import prepare_stream
from ingestor.model import SECOND, Batch
from ingestor.settings import Settings
from ingestor.store.retry import RetryAction, classify
from ingestor.store.ticks import Position, TickStore, WriteResult
from ingestor.telemetry.buffer_events import BufferEvents, BufferState
from ingestor.telemetry.events import Telemetry
from ingestor.telemetry.liveness import LivenessDeadline

TURN_SECONDS = 1.0
"""Time between two attempts of a standby to become the active writer, and between two signs of life of that one."""

WAIT_SECONDS = 0.5
"""Time for which the writer waits for messages, before it looks after everything else."""

RELEASE_SECONDS = 4.0
"""A writer without a connection to NATS for so long lets another one take over."""

HOLE_SECONDS = 300.0
"""Time for which a recorder has to publish again what the stream lost, before the hole is declared."""

ASK_SECONDS = 1.0
STATE_SECONDS = 2.0
PURGE_SECONDS = 5.0

KEEP_SECONDS = 300.0
KEEP_BYTES = 64 * 2**20
"""Committed messages stay in the stream for so long, and up to so many bytes, in case the database loses them: a
standby that takes over may lag behind."""

MAX_SESSIONS = 1024
"""Sessions that are remembered."""

MAX_WAIT = 5.0
"""The most seconds between two attempts to write."""


@dataclass(slots=True)
class _Hole:
    """Messages of a session that are missing: behind a batch, found at a message of the stream, at an instant."""

    position: Position
    sequence: int
    since: float
    asked_at: float = -math.inf


@dataclass(slots=True)
class _Kept:
    """Committed messages that the stream still has: up to which sequence, when, and how many bytes."""

    entries: deque[tuple[float, int, int]] = field(default_factory=deque)
    size: int = 0

    def add(self, now: float, sequence: int, size: int) -> None:
        self.entries.append((now, sequence, size))
        self.size += size

    def pop_due(self, now: float) -> int:
        """Return the sequence up to which the stream need not keep anything; 0 if it must keep all."""
        upto = 0
        while self.entries and (now - self.entries[0][0] > KEEP_SECONDS or self.size > KEEP_BYTES):
            _, upto, size = self.entries.popleft()
            self.size -= size
        return upto


class StreamWriter:
    """Writes the stream into the database while it has the turn; else it is a standby.

    `store` must ask this writer's `accepts_hole`, and be one of several.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Clock,
        telemetry: Telemetry,
        events: BufferEvents,
        liveness: LivenessDeadline | None = None,
        hole_seconds: float = HOLE_SECONDS,
    ) -> None:
        self._settings = settings
        self._stream = settings.buffer_stream
        self._clock = clock
        self._telemetry = telemetry
        self._events = events
        self._liveness = liveness or LivenessDeadline(clock)
        self._hole_seconds = hole_seconds
        self.store = TickStore(
            settings.read_database_url(),
            write_timeout=settings.write_timeout,
            clock=clock,
            on_progress=self._liveness.extend,
            on_comparison=telemetry.clocks_compared,
            on_lock_wait=telemetry.lock_waited,
            accepts_hole=self.accepts_hole,
            is_one_of_several=True,
        )
        self.link = Link(settings, name=f"ingestor write {settings.instance}", on_change=self._link_changed)
        self.link.on(state_subject(self._stream), self._on_state)
        self.link.on(gone_subject(self._stream, "*"), self._on_gone)
        self._reader = StreamReader(self.link, self._stream, clock)
        self._is_prepared = self._has_prepared = False
        self._is_active = False
        self._done = 0  # the sequence up to which the stream is written, skipped or set aside
        self._known: dict[UUID, Position] = {}  # what the database has, as far as it was asked or written
        self._written: OrderedDict[UUID, int] = OrderedDict()  # the last batch that the database acknowledged
        self._holes: dict[UUID, _Hole] = {}
        self._accepted: set[UUID] = set()  # sessions whose holes are declared
        self._kept = _Kept()
        self._questions: list[tuple[str, tuple[UUID, ...]]] = []
        self._gone: dict[UUID, int] = {}
        self._connections = 0
        self._turned_at = self._stated_at = self._purged_at = -math.inf
        self._unlinked_since: float | None = None
        self._wait_with_backoff = wait_random_exponential(multiplier=0.25, max=MAX_WAIT)

    @property
    def spooled_batches(self) -> int:
        """Messages that are not committed yet, beyond what is usual while the writer keeps up."""
        return self._reader.pending if self._reader.pending > 100 else 0

    def accepts_hole(self, session: UUID) -> bool:
        """Return whether a session is written although earlier messages of it are missing."""
        return session in self._accepted

    async def run(self) -> None:
        """Write until cancelled. Raises ConfigurationError and DatabaseAccessError if an operator must act."""
        attempt = 0
        while True:
            self._liveness.extend()
            try:
                if await self.store.take_turn():
                    self._telemetry.crashed_sessions_ended(0)  # the database answers
                    attempt = 0
                    await self._work()
                else:
                    self._telemetry.crashed_sessions_ended(0)
                    self._events.turn_lost("another writer is active")
            except StandbyError as error:
                self._events.turn_lost(str(error))
            except StoreError as error:
                if isinstance(error, DatabaseAccessError) and not self.store.has_connected:
                    raise
                self._report_failure(error)
                attempt += 1
            await self._clock.sleep(TURN_SECONDS)

    async def close(self) -> None:
        """Give the turn back and close all connections."""
        await self._reader.close()
        await self.store.close()
        await self.link.close()

    # The turn.

    async def _work(self) -> None:
        """Write while this is the active writer. Raises StandbyError when it is no longer, and StoreError."""
        self._events.turn_taken()
        self._reader.restart(self._done)
        await self._compare_database()
        self._is_active = True
        try:
            while True:
                await self._step()
        finally:
            self._is_active = False
            self._questions.clear()

    async def _step(self) -> None:
        self._liveness.extend()
        try:
            if not self._is_prepared:
                await self._prepare()
            portion = await self._reader.read(WAIT_SECONDS)
        except BufferUnavailableError as error:
            self._events.unavailable(str(error))
            await self._read_failed()
            return
        if self._reader.is_behind_reset:
            self._begin_again()
        if portion:
            await self._write_portion(portion)
        self._events.works()
        self._telemetry.readiness.passes("stream")
        await self._keep_turn()
        await self._answer()
        await self._settle_holes()
        with contextlib.suppress(BufferUnavailableError):
            await self._tend()

    async def _keep_turn(self) -> None:
        """Show the database that this writer lives. Raises StandbyError, and StoreError."""
        if self._clock.monotonic() - self._turned_at < TURN_SECONDS:
            return
        if not await self.store.take_turn():
            raise StandbyError("another writer took over")
        self._turned_at = self._clock.monotonic()
        if self.store.connections != self._connections:
            await self._compare_database()

    async def _read_failed(self) -> None:
        """Wait a moment; let another writer take over if this one cannot reach NATS."""
        self._is_prepared = False  # the stream itself may be gone
        since, now = self._unlinked_since, self._clock.monotonic()
        if since is not None and now - since > RELEASE_SECONDS:
            await self.store.close()
            self._unlinked_since = now
            raise StandbyError("this writer has no connection to NATS")
        await self._keep_turn()
        await self._clock.sleep(0.1)

    def _link_changed(self, problem: str | None) -> None:
        if problem is None:
            self._unlinked_since = None
        elif self._unlinked_since is None:
            self._unlinked_since = self._clock.monotonic()

    async def _prepare(self) -> None:
        """Create the stream if it is missing, and report how it differs."""
        try:
            setup = await prepare_stream(self.link, self._settings)
        except ConfigurationError as error:
            if self._has_prepared:
                raise BufferUnavailableError(str(error)) from error
            raise
        self._is_prepared = True
        if setup.created:
            self._events.stream_created(self._stream, self._settings.buffer_replicas, is_first=not self._has_prepared)
        if not self._has_prepared:
            self._events.stream_differs(self._stream, setup.differences)
        self._has_prepared = True

    # Writing.

    async def _write_portion(self, portion: list[Received]) -> None:
        """Commit what of a portion is new, with retries; then count it as done."""
        attempt = 1
        while True:
            try:
                if attempt > 1:
                    if not await self.store.take_turn():
                        raise StandbyError("another writer took over")
                    if await self._compare_database():
                        return
                await self._write_new(portion)
                break
            except HoleError as error:  # the database lacks commits that it had when it was asked
                self._went_back(error.session, error.last_batch)
                return
            except StoreError as error:
                if isinstance(error, DatabaseAccessError) and not self.store.has_connected:
                    raise
                self._known.clear()
                self._report_failure(error)
                await self._clock.sleep(self._seconds_until_retry(error, attempt))
                attempt += 1
        now = self._clock.monotonic()
        for received in portion:
            self._kept.add(now, received.sequence, received.size)
        self._done = self._reader.needed_from - 1

    async def _write_new(self, portion: list[Received]) -> None:
        await self._learn({received.session for received in portion if received.batches})
        run: list[Batch] = []
        inherited = False
        for received in portion:
            if received.damage:
                self._events.message_damaged(received.sequence, received.damage)
            for batch in received.batches:
                if not self._is_next(batch, received.sequence):
                    continue
                if run and (received.is_inherited != inherited or batch.number == 1):
                    await self._commit(run, inherited=inherited)
                    run = []
                if batch.number == 1 and batch.session.kind == "stream":
                    await self._end_crashed(batch)
                run.append(batch)
                inherited = received.is_inherited
        if run:
            await self._commit(run, inherited=inherited)

    async def _learn(self, sessions: Collection[UUID]) -> None:
        """Ask the database for the positions of sessions that are not known."""
        unknown = [session for session in sessions if session not in self._known]
        if unknown:
            self._known |= await self.store.positions(unknown)
        for session in sessions:
            self._written[session] = max(self._written.get(session, 0), self._known[session].last_batch)
            self._written.move_to_end(session)
        while len(self._written) > MAX_SESSIONS:
            oldest, _ = self._written.popitem(last=False)
            self._known.pop(oldest, None)
            self._accepted.discard(oldest)

    def _is_next(self, batch: Batch, sequence: int) -> bool:
        """Return whether a batch can be written now. Note a hole before it, or the end of one."""
        session = batch.session.id
        known = self._known[session]
        if batch.number <= known.last_batch:
            self._events.counts.redelivered += 1
            return False
        if batch.messages_before > known.messages and session not in self._accepted:
            if session not in self._holes:
                self._holes[session] = _Hole(known, sequence, self._clock.monotonic())
                self._events.hole_found(session, known.last_batch)
            return False
        if self._holes.pop(session, None) is not None:
            self._events.hole_closed(session)
        messages = known.messages + batch.count + len(batch.rejections)
        self._known[session] = Position(batch.number, messages, known.ticks, known.duplicates, batch.end is not None)
        return True

    async def _end_crashed(self, first: Batch) -> None:
        """End the older open sessions of the instance whose new session begins: all they have published is written."""
        own = {first.session.id, *self._holes}
        count = await self.store.end_crashed_sessions(first.session.instance, own)
        self._telemetry.crashed_sessions_ended(count)

    async def _commit(self, batches: list[Batch], *, inherited: bool) -> None:
        began = self._clock.monotonic()
        write = self.store.write_inherited if inherited else self.store.write
        written = await write(batches)
        seconds = self._clock.monotonic() - began
        self._count(batches, written, seconds)
        last = {batch.session.id: batch for batch in batches}
        counts = dict.fromkeys(last, 0)
        for batch in batches:
            counts[batch.session.id] += 1
        for session, batch in last.items():
            tally = written.tallies[session]
            self._written[session] = batch.number
            newest = batch.last_message_at
            await self._tell(
                session,
                Committed(
                    last_batch=batch.number,
                    messages=self._known[session].messages,
                    ticks=tally.ticks,
                    duplicates=tally.duplicates,
                    added=tally.added,
                    missing=tally.missing,
                    batches=counts[session],
                    seconds=seconds,
                    last_message_at=newest,
                    is_ended=batch.end is not None,
                ),
            )

    async def _tell(self, session: UUID, committed: Committed) -> None:
        with contextlib.suppress(BufferUnavailableError):  # the recorder asks for it
            await self.link.publish(committed_subject(self._stream, session), encode(committed))

    def _count(self, batches: list[Batch], written: WriteResult, seconds: float) -> None:
        newest = batches[-1].last_message_at
        self._telemetry.committed(
            tuple(batches),
            written=written.batches,
            ticks=written.ticks,
            tallies=written.tallies,
            seconds=seconds,
            lag=None if newest is None else (self._clock.wall() - newest) / SECOND,
        )
        self._report_size()
        self._telemetry.rows_refused(written.refused)
        for session, tally in written.tallies.items():
            if tally.missing:
                self._telemetry.commits_lost(session, tally.missing)

    def _report_failure(self, error: StoreError) -> None:
        self._liveness.extend()
        self._telemetry.write_failed(str(error), waiting_bytes=0, alert=isinstance(error, DatabaseAccessError))
        self._report_size()

    def _report_size(self) -> None:
        self._telemetry.transactions_sized(self.store.size.max_bytes, is_normal=self.store.size.is_normal)

    def _seconds_until_retry(self, error: StoreError, attempt: int) -> float:
        if error.is_smaller_next:
            return 0.0
        match classify(error):
            case RetryAction.RETRY_SLOWLY:
                return MAX_WAIT
            case RetryAction.MAKE_PARTITION | RetryAction.RETRY_AT_ONCE if attempt == 1:
                return 0.0
        state = RetryCallState(None, None, (), {})  # type: ignore[arg-type]  # the wait needs the number only
        state.attempt_number = attempt
        return self._wait_with_backoff(state)

    # Losses of the database and of the stream.

    async def _compare_database(self) -> bool:
        """After a new connection: return whether the database lacks batches that it had acknowledged."""
        self._known.clear()
        self._connections = self.store.connections
        found = await self.store.positions(list(self._written))
        for session, position in found.items():
            if position.last_batch < self._written[session]:
                self._went_back(session, position.last_batch)
                return True
        return False

    def _went_back(self, session: UUID, last_batch: int) -> None:
        """Read the stream again from its beginning: it still has what the database committed last."""
        self._events.database_went_back(session, last_batch)
        self._begin_again()

    def _begin_again(self) -> None:
        """Forget everything about the stream and read it from its beginning."""
        if self._reader.is_behind_reset:
            self._reader.is_behind_reset = False
            self._events.stream_reset()
        self._known.clear()
        self._written.clear()
        self._holes.clear()
        self._kept = _Kept()
        self._done = 0
        self._reader.restart(0)

    async def _settle_holes(self) -> None:
        """Ask for what is missing; declare what no recorder has any more."""
        now = self._clock.monotonic()
        for session, hole in list(self._holes.items()):
            if self._gone.get(session, -1) >= hole.position.last_batch:
                self._declare(session, hole, "its recorder no longer has what is missing")
            elif now - hole.since > self._hole_seconds:
                self._declare(session, hole, "no recorder published again what is missing")
            elif now - hole.asked_at > ASK_SECONDS:
                hole.asked_at = now
                missing = Missing(hole.position.last_batch, hole.position.messages, self._done)
                with contextlib.suppress(BufferUnavailableError):
                    await self.link.publish(missing_subject(self._stream, session), encode(missing))
        self._gone.clear()

    def _declare(self, session: UUID, hole: _Hole, because: str) -> None:
        """Write a session from its hole on, with the hole as a gap."""
        self._events.hole_declared(session, hole.position.last_batch, because)
        self._accepted.add(session)
        del self._holes[session]
        self._done = min(self._done, hole.sequence - 1)
        self._reader.restart(self._done)

    async def _on_gone(self, message: Message) -> None:
        gone = decode(message.data, Gone)
        if gone is not None and self._is_active:
            with contextlib.suppress(MessageDamagedError):
                self._gone[session_of(message.subject)] = gone.last_batch

    # Recorders that ask, the state of the stream, and what it need not keep.

    async def _on_state(self, message: Message) -> None:
        request = decode(message.data, StateRequest)
        if request is not None and self._is_active and message.reply:
            self._questions.append((message.reply, request.sessions))

    async def _answer(self) -> None:
        questions, self._questions = self._questions, []
        for reply, sessions in questions:
            found = await self.store.positions(sessions)
            answer = StateReply(
                self._done,
                {
                    session: Committed(
                        each.last_batch, each.messages, each.ticks, each.duplicates, is_ended=each.is_ended
                    )
                    for session, each in found.items()
                },
            )
            with contextlib.suppress(BufferUnavailableError):
                await self.link.publish(reply, encode(answer))

    async def _tend(self) -> None:
        """Look at the stream, and remove from it what is committed and no longer needed."""
        now = self._clock.monotonic()
        if now - self._stated_at > STATE_SECONDS:
            self._stated_at = now
            state = await self._reader.state()
            if self._reader.is_behind_reset:
                self._begin_again()
                return
            lag = max(0, state.last - self._done)
            self._events.state = BufferState(
                self._clock.wall(), state.messages, state.size, state.replicas, state.lagging, lag
            )
        if now - self._purged_at > PURGE_SECONDS:
            self._purged_at = now
            await self._purge(now)

    async def _purge(self, now: float) -> None:
        upto = self._kept.pop_due(now)
        needed = min([self._done + 1, self._reader.needed_from, *(hole.sequence for hole in self._holes.values())])
        if upto:
            await self.link.api(f"STREAM.PURGE.{self._stream}", {"seq": min(upto + 1, needed)})
