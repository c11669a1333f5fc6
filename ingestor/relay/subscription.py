"""One client's stream: what is on record, then the log, then live; and back to the log when the client is slow."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from itertools import count
from typing import Protocol, TypeVar

from websockets.asyncio.server import ServerConnection
from websockets.protocol import State

from ingestor.batch import Row, unpack_rows
from ingestor.clock import Clock
from ingestor.errors import IngestorError, StoreError
from ingestor.model import SECOND, Duration, Micros
from ingestor.relay.budget import ReadBudget
from ingestor.relay.coverage import coverage_messages
from ingestor.relay.deflate import deflated
from ingestor.relay.encoder import Encoder, message
from ingestor.relay.gaps import GapMarks
from ingestor.relay.hub import SLICE, Hub
from ingestor.relay.options import Filter, Options, cursor_text
from ingestor.store.record import CoverageStatement, LogPosition, Place, Progress, Record, Step, Window
from ingestor.store.record_pool import RecordPool

PACED_PAGE = 500
"""Ticks of the record that are read at once for a client that asked for a speed: they wait in memory."""

BYTES_PER_TICK = 100
"""A tick of the log is hardly ever longer."""

FIRST_SPAN: Duration = 60 * SECOND
SHORTEST_SPAN: Duration = SECOND // 100
LONGEST_SPAN: Duration = 60 * 86_400 * SECOND
"""Arrivals that are read at once: few at first, then as many as fill a page."""

END_GRACE: Duration = 2 * SECOND
"""A stream with `to` ends so long after it: ticks that arrived before it are committed by then."""

PACE_SECONDS = 0.01
"""Ticks that are due within this time are sent together."""

LONGEST_WAIT = 60.0
"""Seconds to wait for a tick to be due. Then the log is read again, which holds about an hour."""

_BACKOFF = (0.1, 0.5, 1.0, 2.0, 5.0)
"""Seconds between attempts to read while the database fails; the last is repeated."""

RESTARTED = "The relay's log of commits began again. Connect again, with from."


_Answer = TypeVar("_Answer")


class StreamEnd(IngestorError):  # noqa: N818 - not always an error
    """The end of a stream that the relay decides: a close code, and a text if an error message is sent before."""

    def __init__(self, code: int, text: str = "") -> None:
        super().__init__(text)
        self.code = code


class Counters(Protocol):
    """Counts what clients get."""

    def sent(self, ticks: int) -> None:
        """Count ticks that were sent."""
        ...

    def fell_back(self) -> None:
        """Count a client that became too slow to be live."""
        ...

    def read_failed(self, detail: str) -> None:
        """Report a read of the database that failed, and is tried again."""
        ...


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts that all streams of a relay share. A client must accept bytes within `stuck_after` seconds."""

    hub: Hub
    pool: RecordPool
    encoder: Encoder
    clock: Clock
    counters: Counters
    stuck_after: float = 60.0
    budget: ReadBudget = field(default_factory=ReadBudget)


class Subscription:
    """The stream of one client. Runs until the client leaves, or StreamEnd or CursorError is raised."""

    def __init__(self, connection: ServerConnection, options: Options, parts: Parts) -> None:
        self._connection = connection
        self._options = options
        self._parts = parts
        self._hub = parts.hub
        self._mark = parts.hub.mark
        self._span = FIRST_SPAN
        self._left = asyncio.Event()
        self._is_restarted = False
        self._is_checked = options.resume is None  # a cursor may be of another log
        self._has_lagged = False
        self._paced_from: tuple[float, Micros] | None = None
        self._gaps = GapMarks([])
        self._statement: CoverageStatement | None = None  # until the client has the log up to its end
        self._stated_at = math.inf  # when the client's own statement was complete; older ones are out of date
        self.stated_until = options.coverage
        self._ticks_since: datetime | None = None
        self.ticks_sent = 0
        self.progress = self._start()

    @property
    def filter(self) -> Filter:
        """Which ticks the client gets."""
        return self._options.filter

    def _start(self) -> Progress:
        since = self._options.since
        start = None if since is None else Place(since - 1)
        if self._options.resume is None:
            return Progress(self._hub.position, start)
        self._mark, progress = self._options.resume.mark, self._options.resume.progress
        if self._options.coverage is None or start is None:
            return progress
        if progress.place is not None and progress.place.received_at <= start.received_at:
            return progress
        return Progress(progress.position, start)  # what is behind the cursor, and the table again from there on

    def accept(self, frames: bytes, ticks: int, after: LogPosition) -> None:
        """Send what the hub hands out. If the client is slow, it leaves the hub."""
        if after <= self.progress.position:
            return
        self.progress = Progress(after, None)
        if self._connection.state is not State.OPEN:
            self._leave()
            return
        if frames:
            self._write(frames, ticks)
            if self._connection.paused:
                self._parts.counters.fell_back()
                self._leave()
        self._settle_statement()

    def state(self, statement: CoverageStatement) -> None:
        """Tell the client when the record is complete, unless it has a newer statement, or waits for it."""
        if self._options.coverage is not None and statement.began >= self._stated_at:
            self._write_coverage(statement)

    def restart(self) -> None:
        """End the stream, because the log has begun again."""
        self._is_restarted = True
        self._left.set()

    async def run(self) -> None:
        """Send everything that the options name."""
        if self._options.gaps:
            await self._find_gaps()
        try:
            while True:
                self._left.clear()
                if self._options.coverage is not None and self._is_checked and self.progress.place is None:
                    await self._read_coverage()
                if self._is_checked and self._hub.join(self):
                    self._settle_statement()
                    await self._stay()
                    self._stated_at = math.inf
                    await self._drain()
                    self._report_lag()
                else:
                    with self._parts.budget.share() as ticks:
                        await self._catch_up(ticks)
        finally:
            self._hub.leave(self)

    # Live.

    def _leave(self) -> None:
        self._hub.leave(self)
        self._left.set()

    async def _stay(self) -> None:
        """Wait until the client leaves the hub, or its time is over."""
        self._write(self._gaps.rest(), 0)
        try:
            async with asyncio.timeout(self._time_left()):
                await self._left.wait()
        except TimeoutError:
            self._hub.leave(self)
            raise StreamEnd(1000) from None
        if self._is_restarted:
            raise StreamEnd(1013, RESTARTED)

    def _time_left(self) -> float | None:
        until = self.filter.until
        return None if until is None else max(0.0, (until + END_GRACE - self._parts.clock.wall()) / SECOND)

    def _report_lag(self) -> None:
        if self._options.gaps and not self._has_lagged:
            self._has_lagged = True
            text = "The client is slower than the stream; it gets everything, later."
            self._write(message("lagging", {"message": text}), 0)

    # From the database.

    async def _catch_up(self, ticks: int) -> None:
        """Send the next step of the record, of about so many ticks. Raises StreamEnd behind the last one of all."""
        before = self.progress
        window, step = await self._read(partial(self._step, ticks))
        self._is_checked = True
        for entry in step.entries:
            rows = list(unpack_rows(entry.rows))
            late = [index for index in range(entry.skip, len(rows)) if self._is_late(rows[index], before.place)]
            await self._send([rows[index] for index in late], partial(_late_progress, entry.id, late, before.place))
        self._note_retention(step, before.place)
        self.progress = await self._send_page(step, before.place, is_full=len(step.rows) == window.rows)
        if self.progress is not step.progress:
            return
        if step.is_complete and before.place is not None:
            self._adapt(step.rows, window)
            until = self.filter.until
            if until is not None and step.progress.place == Place(until - 1):
                if until + END_GRACE <= self._parts.clock.wall():
                    self._write(self._gaps.rest(), 0)
                    raise StreamEnd(1000)
                self.progress = Progress(step.progress.position, None)

    def _is_late(self, row: Row, place: Place | None) -> bool:
        """Return whether a logged tick is sent now: it passes the filter, and the table was read beyond it."""
        return self.filter.matches(row) and (place is None or place.covers(row))

    def _window(self, ticks: int) -> Window:
        """Return the window of the next step: the last one has no end but that of the options."""
        rows = ticks if self._options.speed is None else min(ticks, PACED_PAGE)
        log_bytes = ticks * BYTES_PER_TICK
        if self.progress.place is None:
            return Window(None, rows, log_bytes)
        end = self.progress.place.received_at + 1 + self._span
        until = None if end > self._parts.clock.wall() else end
        bound = self.filter.until
        if bound is not None and (until is None or until > bound):
            until = bound
        return Window(until, rows, log_bytes)

    def _adapt(self, found: Sequence[Row], window: Window) -> None:
        """Choose the span of the next window, so that it fills a page. The server reads and sorts all of a window."""
        if len(found) == window.rows:
            self._span = max(2 * (found[-1][1] - found[0][1]), SHORTEST_SPAN)
        elif len(found) < window.rows // 4:
            self._span = min(self._span * 4, LONGEST_SPAN)

    async def _read(self, ask: Callable[[Record], Awaitable[_Answer]]) -> _Answer:
        """Ask the record, again and again while the database fails, each time for less."""
        for attempt in count():
            try:
                async with self._parts.pool.record() as record:
                    return await ask(record)
            except StoreError as error:
                self._parts.counters.read_failed(error.message)
                self._span = max(self._span // 4, SHORTEST_SPAN)
                await self._parts.clock.sleep(_BACKOFF[min(attempt, len(_BACKOFF) - 1)])
        raise AssertionError

    async def _read_coverage(self) -> None:
        """Find out once, before the client is live, when the record is complete."""
        if self._statement is None and self._stated_at == math.inf:
            since, clock = self._options.coverage, self._parts.clock
            assert since is not None
            self._statement = await self._read(lambda record: record.coverage(since, clock.monotonic()))
            self._stated_at = clock.monotonic()

    async def _step(self, ticks: int, record: Record) -> tuple[Window, Step]:
        window = self._window(ticks)
        return window, await record.step(self.progress, window, self._options.symbols, self._mark)

    async def _find_gaps(self) -> None:
        place = self.progress.place
        if place is not None:
            since = place.received_at + 1
            gaps = await self._read(lambda record: record.gaps(since, self.filter.until))
            self._gaps = GapMarks.of(gaps)

    def _note_retention(self, step: Step, place: Place | None) -> None:
        """Mark what retention has dropped, perhaps while the client was reading, as a gap."""
        if not self._options.gaps or not step.is_complete or place is None:
            return
        if step.ticks_since != self._ticks_since:
            self._ticks_since = step.ticks_since
            since = place.received_at + 1
            self._gaps.add_dropped(since, step.ticks_since)
            self._write(self._gaps.until(since), 0)

    # Sending.

    async def _send_page(self, step: Step, place: Place | None, *, is_full: bool) -> Progress:
        """Send the ticks of the table that are due; return the progress behind them. `place` is that before them."""
        begin = 0
        while begin < len(step.rows):
            received_at = step.rows[begin][1]
            if not await self._is_due(received_at):
                behind = _page_progress(step, is_full, 0, begin - 1) if begin else step.progress
                return Progress(behind.position, behind.place if begin else place)
            self._write(self._gaps.until(received_at), 0)
            end = self._end_of_piece(step.rows, begin)
            await self._send(step.rows[begin:end], partial(_page_progress, step, is_full, begin))
            begin = end
        return step.progress

    def _end_of_piece(self, rows: Sequence[Row], begin: int) -> int:
        """Return the end of the ticks that are sent at once: a gap divides them, and so does the pace."""
        end = min(begin + SLICE, len(rows))
        latest = math.inf
        if self._options.speed is not None:
            latest = rows[begin][1] + self._options.speed * PACE_SECONDS * SECOND
        for index in range(begin + 1, end):
            if rows[index][1] > latest or self._gaps.divides(rows[index][1]):
                return index
        return end

    async def _is_due(self, received_at: Micros) -> bool:
        """Wait for a tick to be due at the speed that the client asked for; return whether it is, after a while."""
        if self._options.speed is None:
            return True
        clock = self._parts.clock
        if self._paced_from is None:
            since = self.filter.since
            self._paced_from = clock.monotonic(), received_at if since is None else since
        started, first = self._paced_from
        seconds = started + (received_at - first) / SECOND / self._options.speed - clock.monotonic()
        if seconds > 0:
            await clock.sleep(min(seconds, LONGEST_WAIT))
        return seconds <= LONGEST_WAIT

    async def _send(self, rows: Sequence[Row], progress: Callable[[int], Progress]) -> None:
        """Send ticks in slices, each once the client has accepted enough of what was sent before."""
        for start in range(0, len(rows), SLICE):
            piece = rows[start : start + SLICE]
            cursor = None
            if self.filter.meta:

                def cursor(index: int, start: int = start) -> str:
                    return cursor_text(self._mark, progress(start + index))

            frames = self._parts.encoder.frames(piece, cursor)
            self._write(deflated(frames) if self.filter.compress else frames, len(piece))
            await self._drain()
            await asyncio.sleep(0)

    def _write(self, frames: bytes, ticks: int) -> None:
        """Write frames past the library, which would encode them again for each client."""
        if frames and self._connection.state is State.OPEN:
            self._connection.transport.write(frames)
            self._parts.counters.sent(ticks)
            self.ticks_sent += ticks

    def _settle_statement(self) -> None:
        statement, progress = self._statement, self.progress
        if statement is not None and progress.place is None and progress.position >= statement.end:
            self._statement = None
            self._write_coverage(statement)

    def _write_coverage(self, statement: CoverageStatement) -> None:
        since = self._options.coverage
        assert since is not None
        assert self.stated_until is not None
        self._write(b"".join(coverage_messages(statement.spans, since, self.stated_until)), 0)
        self.stated_until = max((end for _, end in statement.spans), default=since)

    async def _drain(self) -> None:
        """Wait until the client has accepted most of what was sent. Raises StreamEnd if it accepts nothing."""
        while self._connection.paused and self._connection.state is State.OPEN:
            before = self._connection.transport.get_write_buffer_size()
            try:
                async with asyncio.timeout(self._parts.stuck_after):
                    await self._connection.drain()
            except TimeoutError:
                if self._connection.transport.get_write_buffer_size() >= before:
                    raise StreamEnd(1013) from None


def _late_progress(entry: int, late: Sequence[int], place: Place | None, index: int) -> Progress:
    """Return what a client has behind a tick of the log. `late` are the places in the entry of those that it gets."""
    return Progress(LogPosition(entry, late[index] + 1), place)


def _page_progress(step: Step, is_full: bool, begin: int, index: int) -> Progress:
    """Return what a client has behind a tick of the table: all of an instant's ticks, or those up to this one."""
    at = begin + index
    row = step.rows[at]
    is_end = at + 1 == len(step.rows)
    has_all = not is_full if is_end else step.rows[at + 1][1] != row[1]
    return Progress(step.progress.position, Place(row[1], None if has_all else row))
