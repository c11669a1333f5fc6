"""Writes batches: one transaction, optimistically by COPY, and the same batch never twice."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from functools import partial
from itertools import groupby
from typing import TypeAlias
from uuid import UUID

import asyncpg

from ingestor.clock import UNCOMPARED, Clock, ClockDifference, SystemClock, to_datetime
from ingestor.errors import HoleError, StandbyError, StoreError
from ingestor.model import Batch, Duration, Micros, Rejection, Tally
from ingestor.store.clocks import DatabaseClock
from ingestor.store.connect import connect
from ingestor.store.connection import GuardedConnection
from ingestor.store.copy_in import copy_rows, count_of
from ingestor.store.portion import TransactionSize, part_of
from ingestor.store.proof import proof
from ingestor.store.quarantine import RejectionBudget, insert_without_bad_rows
from ingestor.store.queries import QUERIES
from ingestor.store.retry import RetryAction, classify, may_be_too_large
from ingestor.store.stale import note_delayed, note_stale
from ingestor.store.tick_log import insert_staged, log_batches
from ingestor.store.version import check_schema
from ingestor.store.waiting import LockWatch, Tell, warn

STAY_STAGED = 60.0
"""Seconds for which the writer stays on the staged way after a collision of keys."""

MONTHS_AHEAD = 2
"""Partitions are there this many months before they are needed."""

NO_PARTITION = (
    "It is made now. If that does not help, a detached table has its name, market.ticks_YYYY_MM: attach it "
    "again, or rename it."
)

_Inserted: TypeAlias = tuple[int, Sequence[Rejection]]
"""How many rows are new, and the rows that were refused."""

_Insert: TypeAlias = Callable[[asyncpg.Connection, Sequence[Batch], int, bool], Awaitable[_Inserted]]
"""Inserts the rows of batches, of which the first may be a part: the messages after so many. The flag: log them."""


@dataclass(frozen=True, slots=True)
class WriteResult:
    """The counts of a commit: `duplicates` of the `ticks` were there already.

    `refused` are the reasons of those rejections that were ticks until the database refused them. `tallies` are what
    the database has of each session now, also where everything had been committed before. `is_partial`: a batch
    is not committed to its end.
    """

    batches: int = 0
    ticks: int = 0
    duplicates: int = 0
    rejected: int = 0
    refused: tuple[str, ...] = ()
    tallies: Mapping[UUID, Tally] = field(default_factory=dict, compare=False)
    is_partial: bool = False

    def __add__(self, other: WriteResult) -> WriteResult:
        return WriteResult(
            self.batches + other.batches,
            self.ticks + other.ticks,
            self.duplicates + other.duplicates,
            self.rejected + other.rejected,
            self.refused + other.refused,
            {**self.tallies, **{id_: tally.after(self.tallies.get(id_)) for id_, tally in other.tallies.items()}},
            self.is_partial or other.is_partial,
        )


@dataclass(frozen=True, slots=True)
class Position:
    """The database's record of a session: its last complete batch, all its messages, and the counts of ticks."""

    last_batch: int = 0
    messages: int = 0
    ticks: int = 0
    duplicates: int = 0
    is_ended: bool = False


@dataclass(frozen=True, slots=True)
class _Terms:
    """On what terms batches are written: whether their own process writes them, and how far the clocks are apart.

    `accepts_hole`: whether messages may be written of a session of which earlier ones are missing.
    """

    is_own: bool = True
    clocks: ClockDifference = UNCOMPARED
    accepts_hole: Callable[[UUID], bool] | None = None


class TickStore:
    """The daemon's one connection for writing. Not for concurrent use.

    `on_progress` hears of every step of a write, `on_comparison` how far the clocks of the two machines are apart: at
    each connection, when this one was set, and now and then; `on_lock_wait` for which lock a write waits, in words.

    `accepts_hole` is asked for a session of which the database lacks messages that precede a batch: if it declines,
    `write` raises HoleError and commits nothing of it. Without it, the hole is recorded. `is_one_of_several`: only the
    holder of the turn writes (`take_turn`); the others get StandbyError.

    Every method raises StoreError (SchemaError where `ingestor migrate` is the answer); the connection is then
    in a state from which the next call goes on, or closed and made again by the next call.
    """

    def __init__(
        self,
        url: str,
        *,
        write_timeout: float,
        clock: Clock | None = None,
        on_progress: Callable[[], None] | None = None,
        on_comparison: Callable[[ClockDifference], None] | None = None,
        on_lock_wait: Tell = warn,
        accepts_hole: Callable[[UUID], bool] | None = None,
        is_one_of_several: bool = False,
    ) -> None:
        self._url = url
        self._accepts_hole = accepts_hole
        self._is_one_of_several = is_one_of_several
        self._turn_of: GuardedConnection | None = None
        self.connections = 0
        """How often a connection was made. After a new one the database may be another, which lacks commits."""
        self._watch = LockWatch(url, on_lock_wait)
        self._on_progress = on_progress
        self._write_timeout = write_timeout
        self._clock = clock or SystemClock()
        self._limits = QUERIES["set_limits"].replace("$1", str(round(write_timeout * 1000)))
        self._has_staging = False
        self._staged_until = 0.0
        self._months: set[date] = set()
        self._guarded: GuardedConnection | None = None
        self.has_connected = False
        """Whether the database has let this process in, so that a refusal is its fault and may pass."""
        self._rejection_budget = RejectionBudget()
        self.size = TransactionSize()
        """How much one transaction may hold now."""
        self._unreported = WriteResult()  # committed by a call that failed later on
        self._terms = _Terms()
        self._database_clock = DatabaseClock(self._clock, on_comparison)

    async def open(self) -> GuardedConnection:
        """Connect and look at the schema, if that is not done yet."""
        if self._guarded is None or self._guarded.connection.is_closed():
            self._has_staging = False
            self._months.clear()
            self._guarded = guarded = GuardedConnection(
                await connect(self._url, timeout=self._write_timeout, application_name="ingestor", read_write=True),
                self._write_timeout,
                self._on_progress,
                self._watch,
            )
            self.has_connected = True
            self.connections += 1
            try:
                async with guarded as connection, connection.transaction(isolation="read_committed"):
                    await check_schema(connection)
                    await self._database_clock.compare(connection)
                if not guarded.is_pooled:
                    async with guarded as connection:
                        await connection.execute(self._limits.replace("$2", "SESSION"))
            except BaseException:
                guarded.connection.terminate()
                raise
        return self._guarded

    async def give_up(self) -> None:
        """End the write that is under way, if any, without waiting for the server. Its caller gets StoreError."""
        if self._guarded is not None:
            await self._guarded.give_up()

    async def close(self) -> None:
        """Close the connection, at once if the server does not answer."""
        guarded, self._guarded = self._guarded, None
        if guarded is not None:
            await guarded.close()

    async def take_turn(self) -> bool:
        """Try to become, or to stay, the one that writes; return whether this is it. Call it every two seconds.

        The turn ends with the connection. Behind a pooler a session holds no lock: there every process has the turn,
        which costs time and nothing else, because a batch's number makes it count once.
        """
        guarded = await self.open()
        if guarded.is_pooled:
            self._turn_of = guarded
            return True
        async with guarded as connection:
            if self._turn_of is guarded:
                await connection.execute("SELECT")
            elif await connection.execute(QUERIES["take_turn"]) == "SELECT 1":
                self._turn_of = guarded
        return self._turn_of is guarded

    async def positions(self, sessions: Collection[UUID]) -> dict[UUID, Position]:
        """Return what the database has of sessions, by their ids; of an unknown one the empty position."""
        async with await self.open() as connection:
            rows = await connection.fetch(QUERIES["session_positions"], list(sessions))
        found = {row[0]: Position(*row[1:]) for row in rows}
        return {session: found.get(session, Position()) for session in sessions}

    async def end_crashed_sessions(self, instance: str, own: Collection[UUID] = ()) -> int:
        """End this instance's sessions that never said how they ended, but for this process's own."""
        async with self._turn(await self.open()) as connection:
            status = await connection.execute(QUERIES["end_crashed_sessions"], instance, list(own))
        return count_of(status)

    async def write(self, batches: Sequence[Batch]) -> WriteResult:
        """Commit batches, oldest first, in transactions of the `size` that the server accepts now.

        Each transaction tries, in this order:

        1. COPY into `market.ticks`;
        2. if a row is stored already: COPY into a staging table, and insert the rows that are missing;
        3. if the database refuses a row: quarantine, batch by batch, in which refused rows become rejections;
        4. if a month has no partition: the next call makes it.

        A repeated call changes nothing that is committed, and continues behind it.
        """
        return await self._write_as(batches, is_own=True)

    async def write_inherited(self, batches: Sequence[Batch]) -> WriteResult:
        """Commit what an earlier process left, in the same way: that is no sign of life of its sessions."""
        return await self._write_as(batches, is_own=False)

    async def _write_as(self, batches: Sequence[Batch], *, is_own: bool) -> WriteResult:
        guarded = await self.open()
        if self._is_one_of_several and self._turn_of is not guarded:
            raise StandbyError("The connection that held the turn to write is lost.")
        if self._database_clock.is_due:
            async with guarded as connection, connection.transaction(isolation="read_committed"):
                await self._database_clock.compare(connection)
        self._terms = _Terms(is_own, self._database_clock.difference, self._accepts_hole)
        await self._make_partitions(guarded, batches)
        try:
            await self._write_all(guarded, batches)
        except StoreError as error:
            if classify(error) is RetryAction.MAKE_PARTITION:
                self._months.clear()
                error.hint = NO_PARTITION
            raise
        written, self._unreported = self._unreported, WriteResult()
        return written

    async def _write_all(self, guarded: GuardedConnection, batches: Sequence[Batch]) -> None:
        while batches:
            chosen = self.size.choose(batches)
            written = await self._write_or_quarantine(guarded, chosen)
            if not written.is_partial:
                batches = batches[len(chosen) :]

    async def _write_or_quarantine(self, guarded: GuardedConnection, batches: Sequence[Batch]) -> WriteResult:
        try:
            written = await self._write(guarded, batches)
        except StoreError as error:
            if classify(error) is not RetryAction.QUARANTINE:
                raise
        else:
            self._rejection_budget.note(written.ticks)
            return written
        await self._make_staging(guarded)
        written = WriteResult()
        for batch in batches:
            written = await self._transaction(guarded, [batch], partial(self._quarantine, guarded))
            self._rejection_budget.note(written.ticks + len(written.refused), len(written.refused))
        return written

    async def _write(self, guarded: GuardedConnection, batches: Sequence[Batch]) -> WriteResult:
        """Write by the fast way, or for a while by the staged one, where rows are there already."""
        if self._clock.monotonic() >= self._staged_until:
            try:
                return await self._transaction(guarded, batches, partial(_copy, guarded.renew), staged=False)
            except StoreError as error:
                if classify(error) is not RetryAction.USE_STAGING:
                    raise
                self._staged_until = self._clock.monotonic() + STAY_STAGED
        await self._make_staging(guarded)
        return await self._transaction(guarded, batches, partial(_stage, guarded.renew))

    async def _make_staging(self, guarded: GuardedConnection) -> None:
        if not self._has_staging and not guarded.is_pooled:
            async with guarded as connection:
                await connection.execute(QUERIES["make_staging"])
            self._has_staging = True

    async def _transaction(
        self, guarded: GuardedConnection, batches: Sequence[Batch], insert: _Insert, *, staged: bool = True
    ) -> WriteResult:
        """Commit batches together, or the next part of one. After a failure the next transaction may be smaller."""
        try:
            written = await self._commit(guarded, batches, insert, staged=staged)
        except StoreError as error:
            error.is_smaller_next = may_be_too_large(error) and self.size.failed(batches)
            raise
        self.size.succeeded(batches)
        self._unreported += written
        return written

    async def _commit(
        self, guarded: GuardedConnection, batches: Sequence[Batch], insert: _Insert, *, staged: bool
    ) -> WriteResult:
        written = WriteResult()
        async with self._turn(guarded) as connection:
            if guarded.is_pooled and staged:
                await connection.execute(QUERIES["make_staging_for_now"])
            for _, group in groupby(batches, key=lambda batch: batch.session.id):
                written += await _write_session(connection, list(group), insert, self._terms, self.size.max_bytes)
            await note_delayed(connection, batches, self._clock.wall())
        return written

    @contextlib.asynccontextmanager
    async def _turn(self, guarded: GuardedConnection) -> AsyncIterator[asyncpg.Connection]:
        """Begin a transaction that no other writer of the database is in at the same time."""
        async with guarded as connection, connection.transaction(isolation="read_committed"):
            limits = self._limits.replace("$2", "LOCAL") if guarded.is_pooled else ""
            await connection.execute(limits + QUERIES["lock_ticks"])
            guarded.renew()
            yield connection

    async def _make_partitions(self, guarded: GuardedConnection, batches: Sequence[Batch]) -> None:
        """Make the partitions of the ticks' months and of the months ahead, in transactions of their own."""
        today = to_datetime(self._database_clock.now()).date()
        needed = {month for batch in batches for month in batch.months} | set(months_ahead(today))
        for month in sorted(needed - self._months):
            async with guarded as connection, connection.transaction(isolation="read_committed"):
                await connection.execute(QUERIES["ensure_partition"], month)
            self._months.add(month)

    async def _quarantine(
        self,
        guarded: GuardedConnection,
        connection: asyncpg.Connection,
        batches: Sequence[Batch],
        after: int,
        is_logged: bool,
    ) -> _Inserted:
        """Send one batch's rows through the temporary table, without those that the database refuses."""
        (batch,) = batches

        async def insert(rows: Iterable[bytes]) -> int:
            guarded.renew()
            await connection.execute(QUERIES["empty_staging"])
            await copy_rows(connection, "pg_temp", "ticks_staged", rows, guarded.renew)
            return await insert_staged(connection, batch, is_logged=is_logged)

        most = self._rejection_budget.of(batch.count)
        return await insert_without_bad_rows(batch, insert, connection.transaction, most=most, after=after)


async def _write_session(
    connection: asyncpg.Connection, batches: list[Batch], insert: _Insert, terms: _Terms, max_bytes: int
) -> WriteResult:
    """Write what of one session's batches is not committed yet, inside the caller's transaction.

    Of a batch that is larger than `max_bytes`, it is the next part.
    """
    session = batches[0].session
    known = await connection.fetchrow(QUERIES["lock_session"], session.id)
    if known is None:
        await connection.execute(
            QUERIES["begin_session"],
            session.id,
            session.instance,
            session.endpoint,
            _timestamp(session.connected_at),
            session.kind,
        )
        known = await connection.fetchrow(QUERIES["lock_session"], session.id)
    assert known is not None  # it is there now, and locked
    last_batch, last_messages, ticks_before, duplicates_before, rejected_before, noted_before, is_logged = known
    complete = last_batch if last_messages is None else last_batch - 1
    batches = [batch for batch in batches if batch.number > complete]
    if not batches:
        return WriteResult(tallies={session.id: Tally(ticks_before, duplicates_before, 0)})
    after = last_messages or 0 if batches[0].number == last_batch else 0
    batches[0], until = part_of(batches[0], after, max_bytes)
    if until is not None:  # nothing may be committed before the rest of it
        batches = batches[:1]
    covered_until, missing = proof(batches, ticks_before + rejected_before)
    if missing and terms.accepts_hole is not None and not terms.accepts_hole(session.id):
        raise HoleError(session.id, complete)

    ticks = sum(batch.count for batch in batches)
    inserted, refused = await insert(connection, batches, after, is_logged) if ticks else (0, ())
    await note_stale(connection, batches, noted_before)
    rejections = [(batch.number, rejection) for batch in batches for rejection in batch.rejections]
    rejections += [(batches[-1].number, rejection) for rejection in refused]
    if rejections:
        shift = terms.clocks.shift  # a minute with a rejection in it is in doubt by the clock of the views
        await connection.executemany(
            QUERIES["reject"],
            [
                (session.id, number, r.position, _timestamp(r.received_at, shift), r.reason, r.raw, r.raw_bytes)
                for number, r in rejections
            ],
        )
    ticks -= len(refused)
    reasons = tuple(rejection.reason for rejection in refused)
    duplicates = ticks - inserted
    tally = Tally(ticks_before + ticks, duplicates_before + duplicates, ticks, missing)
    is_partial = until is not None
    complete_batches = len(batches) - is_partial
    written = WriteResult(
        complete_batches, ticks, duplicates, len(rejections), reasons, {session.id: tally}, is_partial
    )
    last = replace(batches[-1], cursor=None) if missing else batches[-1]
    await _advance(connection, last, until, written, covered_until, terms)
    return written


async def _copy(
    on_piece: Callable[[], None], connection: asyncpg.Connection, batches: Sequence[Batch], _: int, is_logged: bool
) -> _Inserted:
    """Send the rows as they are. Fails where one of them is there already."""
    inserted = await copy_rows(connection, "market", "ticks", [batch.rows for batch in batches], on_piece)
    if is_logged:
        await log_batches(connection, batches)
    return inserted, ()


async def _stage(
    on_piece: Callable[[], None], connection: asyncpg.Connection, batches: Sequence[Batch], _: int, is_logged: bool
) -> _Inserted:
    """Send the rows through the temporary table; those that are there already are left."""
    await copy_rows(connection, "pg_temp", "ticks_staged", [batch.rows for batch in batches], on_piece)
    return await insert_staged(connection, batches[-1], is_logged=is_logged), ()


async def _advance(
    connection: asyncpg.Connection,
    last: Batch,
    messages: int | None,
    written: WriteResult,
    covered_until: Micros | None,
    terms: _Terms,
) -> None:
    """Record what is proved, what the last batch says of the session, and the counts.

    `messages` of it are there, where it is not complete; else None.
    If our clock and the database's differ, either may be wrong: time is covered only if it is so by both.
    """
    end = last.end
    await connection.execute(
        QUERIES["advance_session"],
        last.session.id,
        _timestamp(last.authenticated_at, terms.clocks.most_behind),
        _timestamp(covered_until, -terms.clocks.most_ahead),
        _timestamp(last.last_message_at, -terms.clocks.most_ahead),
        _timestamp(last.last_tick_at, -terms.clocks.most_ahead),
        last.number,
        _timestamp(end.at if end else None),
        end.reason if end else None,
        end.close_code if end else None,
        written.ticks,
        written.duplicates,
        written.rejected,
        terms.is_own,
        messages,
        last.cursor,
    )


def months_ahead(today: date) -> Iterator[date]:
    """Yield the first days of this month and of the next `MONTHS_AHEAD`."""
    first = today.replace(day=1)
    for _ in range(MONTHS_AHEAD + 1):
        yield first
        first = (first + timedelta(days=31)).replace(day=1)


def _timestamp(instant: Micros | None, shift: Duration = 0) -> datetime | None:
    return None if instant is None else to_datetime(instant + shift)
