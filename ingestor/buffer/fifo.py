"""A FIFO queue of batches: the newest in memory, the older ones in a spool on disk.

While the database keeps up, nothing goes to the disk. While it does not, everything does, so that a crash of this
process loses one second at most.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar
from uuid import UUID

from ingestor.buffer.memory import Memory, merges, without_coverage
from ingestor.buffer.spool import Entry, Spool, SpoolDamagedError, SpoolUnavailableError
from ingestor.clock import Clock
from ingestor.model import Batch, EndReason
from ingestor.telemetry.events import Telemetry

MAX_ROWS = 50_000
MAX_BYTES = 4 * 2**20
"""The most ticks and bytes in one transaction."""

LOW_MARK = 0.8
"""A full buffer accepts ticks again when it has drained to this share of its bounds."""

DISK_RETRY_SECONDS = 1.0
"""Time between two attempts to use a disk that failed."""

_T = TypeVar("_T")


BLOCK_MESSAGES = {
    EndReason.BUFFER_FULL: "The buffer is full.",
    EndReason.DISK_FULL: "The spool's disk is full.",
    EndReason.SPOOL_DAMAGED: "The spool was damaged.",
    EndReason.COMMITS_LOST: "The database lost batches that it had acknowledged.",
}


class Buffer:
    """Holds batches from when they are closed until they are committed. For one event loop.

    | state               | flag                            | effect                                                |
    |---------------------|---------------------------------|-------------------------------------------------------|
    | normal              | none                            | batches are committed out of memory                   |
    | spooling            | `_database_failed`, or          | batches go to the spool, which is committed before    |
    |                     | `_spooled` above `_committed`   | memory                                                |
    | disk full           | `_disk_full`                    | batches stay in memory; the stream must stop          |
    | session invalidated | `_invalid_session`              | its batches lose their coverage; it must end          |
    | blocked             | `blocked_by`: one of the two    | the stream must stop                                  |
    |                     | above, or a bound is reached    |                                                       |

    `run` spools everything in memory when a write failed (until one succeeds), when the oldest batch was closed
    `spool_after` seconds ago, and when memory holds `memory_max_bytes`. Without a spool everything stays in memory,
    for a source that can be read again.

    The bounds are `spool_max_bytes` of bodies on disk and, if the disk is slow, twice `memory_max_bytes` in memory.
    At a bound `blocked_by` holds the reason to stop the stream until the buffer has drained to `LOW_MARK` of it.
    Batches that are put while it is blocked are kept.
    """

    def __init__(
        self,
        *,
        memory_max_bytes: int,
        clock: Clock,
        telemetry: Telemetry,
        spool: Spool | None = None,
        spool_max_bytes: int = 0,
        spool_after: float = 1.0,
    ) -> None:
        self._memory_max = memory_max_bytes
        self._clock = clock
        self._telemetry = telemetry
        self._spool = spool
        self._spool_max = spool_max_bytes
        self._spool_after = spool_after
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="spool")
        self._appending = asyncio.Lock()

        self._memory = Memory()
        # Positions rise in the order of the queue.
        self._newest = self._committed = self._taken = 0
        self._spooled = 0  # the newest on disk
        self._inherited = 0  # the newest that an earlier process left
        self._spooled_heartbeat: Entry | None = None  # the newest entry on disk, if it is a heartbeat
        self._database_failed = False  # the last write failed
        self._disk_full = False  # the disk refused an append, or accepted it only without the ballast
        self._open_session: UUID | None = None
        self._invalid_session: UUID | None = None
        self._invalid_because = EndReason.SPOOL_DAMAGED
        self._spools_started = 0  # how often an empty spool replaced a damaged one
        self._damage_reported = 0  # how many damaged files were reported

        self.blocked_by: EndReason | None = None
        """The reason to stop the stream; None while it may go on."""
        self.added = asyncio.Event()
        """Set when a batch was put; for one reader that goes ahead of the commits, and clears it."""
        self._room, self._filled, self._emptied = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._wake, self._safe, self._opened = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._update_state()

    def claim(self) -> None:
        """Claim the spool; batches may be put from now on. Raises ConfigurationError and SpoolUnavailableError."""
        if self._spool is not None:
            self._spool.claim()

    async def open(self) -> None:
        """Open the spool, and put the batches that an earlier process left before those put meanwhile.

        Retries without end if the disk fails. Raises ConfigurationError if a newer version wrote the spool.
        """
        if self._spool is None:
            self._opened.set()
            return
        while not self._opened.is_set():
            try:
                await self._on_disk(self._spool.open)
                self._opened.set()
            except SpoolUnavailableError as error:
                self._disk_failed(error)
                await self._clock.sleep(DISK_RETRY_SECONDS)
        self._report_damage()
        self._newest += self._spool.last
        self._memory.shift(self._spool.last)
        self._spooled = self._inherited = self._spool.last
        self._committed = self._spool.forgotten
        if self._spool.depth:
            self._telemetry.spool_found(batches=self._spool.depth, size=self._spool.size)
        self._update_state()

    async def wait_until_open(self) -> None:
        """Wait until the spool is open."""
        await self._opened.wait()

    async def close(self) -> None:
        """Release the spool; its batches stay on disk."""
        if self._spool is not None:
            await self._on_disk(self._spool.close)
            self._report_damage()
        self._thread.shutdown()

    @property
    def size(self) -> int:
        """Bytes waiting in memory and on disk."""
        return self._memory.size + self.spooled_bytes

    @property
    def spooled_bytes(self) -> int:
        """Bytes waiting on disk."""
        return self._spool.size if self._spool is not None and self._spooled > self._committed else 0

    @property
    def spooled_batches(self) -> int:
        """Batches waiting on disk."""
        return self._spool.depth if self._spool is not None and self._spooled > self._committed else 0

    @property
    def spool_max_bytes(self) -> int:
        """Bytes on disk at which the stream must stop."""
        return self._spool_max

    @property
    def in_memory(self) -> tuple[Batch, ...]:
        """The batches that are in memory only."""
        return tuple(entry.batch for entry in self._memory)

    @property
    def committed(self) -> int:
        """The position up to which batches are committed."""
        return self._committed

    @property
    def has_inherited(self) -> bool:
        """Whether an earlier process left a batch that is not committed yet."""
        return self._committed < self._inherited

    def put(self, batch: Batch) -> None:
        """Add the newest batch without waiting. A heartbeat replaces its session's heartbeat directly before it."""
        session = batch.session.id
        if session == self._invalid_session:
            batch = without_coverage(batch)
            if batch.end is not None:
                self._invalid_session = None
        self._open_session = None if batch.end is not None else session
        self._newest += 1
        self._memory.add(Entry(self._newest, batch), self._clock.monotonic())
        self.added.set()
        self._update_state()

    async def take(self, max_rows: int = MAX_ROWS, max_bytes: int = MAX_BYTES) -> tuple[Batch, ...]:
        """Wait for a batch, then return the oldest ones up to the limits, at least one.

        They stay in the buffer until `acknowledge`. Batches of an earlier process and of this one are never returned
        together.
        """
        entries: list[Entry] = []
        while not entries:
            await self._filled.wait()
            entries = await self.read(self._committed, max_rows, max_bytes)
        if self.has_inherited:
            entries = [entry for entry in entries if entry.position <= self._inherited] or entries
        self._taken = entries[-1].position
        return tuple(entry.batch for entry in entries)

    async def read(self, after: int, max_rows: int = MAX_ROWS, max_bytes: int = MAX_BYTES) -> list[Entry]:
        """Return the oldest batches behind position `after`, up to the limits; none if there are none now."""
        after = max(after, self._committed)
        if self._spool is None or self._spooled <= after:
            return self._memory.oldest(max_rows, max_bytes, after)
        try:
            entries = await self._on_disk(partial(self._spool.read, after, max_rows, max_bytes))
        except SpoolDamagedError:
            self._start_new_spool()
            return []
        except SpoolUnavailableError as error:
            self._telemetry.spool_write_failed(str(error))
            await self._clock.sleep(DISK_RETRY_SECONDS)
        else:
            self._report_working_disk()
            return entries
        return []

    def is_inherited(self, position: int) -> bool:
        """Return whether an earlier process left the batch at a position."""
        return position <= self._inherited

    async def acknowledge(self) -> None:
        """Remove the batches taken last, after their transaction was committed."""
        await self.acknowledge_to(self._taken)

    async def acknowledge_to(self, position: int) -> None:
        """Remove the batches up to a position, after they were committed."""
        self._committed = max(self._committed, position)
        self._database_failed = False
        self._memory.drop(self._committed)
        self._update_state()
        if self._spool is not None and self._spool.depth:
            await self._forget(self._spool)

    def invalidate_session(self, session: UUID) -> None:
        """Invalidate the open session, because the database lost batches of it that it had acknowledged.

        The store accepts no more coverage of this session, so it must end; the next one is covered again. Does nothing
        if the session is not the open one.
        """
        if session == self._open_session and session != self._invalid_session:
            self._invalid_session = session
            self._invalid_because = EndReason.COMMITS_LOST
            self._update_state()

    def write_failed(self) -> None:
        """Record a failed write: spool everything until a write succeeds."""
        self._database_failed = True
        self._update_state()

    def write_works(self) -> None:
        """Record that batches are accepted again, though not committed yet."""
        if self._database_failed:
            self._database_failed = False
            self._update_state()

    async def run(self) -> None:
        """Move batches to the disk when they must not wait in memory; runs until cancelled."""
        while self._spool is not None:
            seconds = self._seconds_to_spool()
            if seconds > 0:
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    # Before Python 3.12, `wait_for` loses a cancellation that comes together with the event.
                    async with asyncio.timeout(seconds):
                        await self._wake.wait()
            elif not await self.spool_all():
                await self._clock.sleep(DISK_RETRY_SECONDS)
            if self._spool.is_full:
                await self._on_disk(self._spool.restore_reserve)
                self._report_working_disk()
                self._update_state()
            if self._spool.is_slack:
                await self._tidy(self._spool.shrink)

    async def spool_all(self) -> bool:
        """Move everything from memory to the disk; return False if that was not possible."""
        if self._spool is None or not self._opened.is_set():
            return not self._memory
        async with self._appending:
            try:
                await self._append_or_start_new_spool(self._spool)
            except (SpoolUnavailableError, SpoolDamagedError) as error:
                self._disk_failed(error)
                return False
            finally:
                self._update_state()
        return True

    async def wait_for_room(self) -> None:
        """Wait until the stream may go on."""
        await self._room.wait()

    async def wait_until_empty(self) -> None:
        """Wait until everything is committed."""
        await self._emptied.wait()

    async def wait_until_safe(self) -> None:
        """Wait until everything is on disk while the database fails."""
        await self._safe.wait()

    def _disk_failed(self, error: SpoolUnavailableError | SpoolDamagedError) -> None:
        """Record that the disk of the spool failed."""
        self._disk_full = True
        self._telemetry.spool_write_failed(str(error))
        self._update_state()

    def _report_working_disk(self) -> None:
        if self._spool is not None and not self._spool.is_full:
            self._telemetry.disk_works()

    async def _append_or_start_new_spool(self, spool: Spool) -> None:
        """Append to the spool, or to a new one if the file is damaged."""
        try:
            await self._append(spool)
        except SpoolDamagedError:
            self._start_new_spool()
            await self._append(spool)

    async def _append(self, spool: Spool) -> None:
        entries = list(self._memory)
        if not entries:
            return
        heartbeat = self._spooled_heartbeat
        replaces = heartbeat is not None and merges(heartbeat.batch, entries[0].batch)
        was_empty, spools_started = not self.spooled_batches, self._spools_started
        await self._on_disk(
            partial(spool.append, entries, replaced=heartbeat.position if heartbeat and replaces else None)
        )
        # Before this append another call found damage, so the new spool holds batches with coverage that is lost.
        if spools_started != self._spools_started:
            await self._append(spool)
            return
        self._disk_full = spool.is_full
        self._report_working_disk()
        self._spooled = entries[-1].position
        self._spooled_heartbeat = entries[-1] if entries[-1].batch.is_heartbeat else None
        self._memory.drop(self._spooled)
        if was_empty:
            self._telemetry.spooling(database_failed=self._database_failed)
        if self._committed >= entries[0].position:  # committed during the append
            await self._forget(spool)

    async def _forget(self, spool: Spool) -> None:
        """Delete committed batches from the disk. If that fails, the next process writes them again, which is safe."""
        await self._tidy(partial(spool.forget, self._committed))
        if not spool.depth:
            self._telemetry.spool_drained()
        self._update_state()

    async def _tidy(self, call: Callable[[], None]) -> None:
        """Run a call of the spool whose failure loses nothing, and log the failure."""
        try:
            await self._on_disk(call)
        except SpoolDamagedError:
            self._start_new_spool()
        except SpoolUnavailableError as error:
            self._telemetry.spool_write_failed(str(error))

    def _start_new_spool(self) -> None:
        """Continue with an empty spool after the old one was damaged and set aside.

        Its batches are lost, so no batch behind them may claim to cover their time. The open session keeps its ticks,
        loses its coverage from here on, and must end.
        """
        self._report_damage()
        self._spools_started += 1
        self._spooled = self._committed
        self._inherited = 0
        self._spooled_heartbeat = None
        self._memory.withdraw_coverage()
        self._invalid_session = self._open_session
        self._invalid_because = EndReason.SPOOL_DAMAGED
        self._update_state()

    def _report_damage(self) -> None:
        """Log the damaged files that were not logged yet, even if the call that found one was cancelled."""
        if self._spool is not None:
            found, self._damage_reported = self._spool.damages[self._damage_reported :], len(self._spool.damages)
            for damage in found:
                self._telemetry.spool_damaged(damage.path, damage.why)

    def _seconds_to_spool(self) -> float:
        """Return how many seconds memory's batches may stay there; 0 if they must go to the disk now."""
        if not self._memory:
            return 0.0 if self._spool is not None and self._spool.is_slack else self._spool_after
        if self._database_failed or self._memory.size >= self._memory_max:
            return 0.0
        return max(0.0, self._memory.oldest_since + self._spool_after - self._clock.monotonic())

    def _update_state(self) -> None:
        """Derive the events that others wait for, and `blocked_by`, from the flags."""
        waiting = bool(self._memory) or self._spooled > self._committed
        for event, state in (
            (self._filled, waiting),
            (self._emptied, not waiting),
            (self._safe, self._database_failed and not self._memory),
        ):
            (event.set if state else event.clear)()
        if self._memory and (self._database_failed or self._memory.size >= self._memory_max):
            self._wake.set()
        if not waiting or (self._spool is not None and not self._spool.is_full):
            self._disk_full = False
        self.blocked_by = self._reason_to_block(1.0 if self.blocked_by is None else LOW_MARK)
        (self._room.set if self.blocked_by is None else self._room.clear)()

    def _reason_to_block(self, share: float) -> EndReason | None:
        memory_bound = self._memory_max * (1 if self._spool is None else 2)
        if self._invalid_session is not None:
            return self._invalid_because
        if self._disk_full:
            return EndReason.DISK_FULL
        if self._memory.size >= memory_bound * share or self.spooled_bytes >= max(self._spool_max * share, 1):
            return EndReason.BUFFER_FULL
        return None

    async def _on_disk(self, call: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)
