"""Hands the commits of the log to the clients that are live, encoded once for all clients of the same filter."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from ingestor.batch import Row, unpack_rows
from ingestor.model import SECOND, Duration, Micros
from ingestor.relay.deflate import deflated
from ingestor.relay.encoder import Encoder
from ingestor.relay.options import Filter, cursor_text
from ingestor.store.record import CoverageStatement, Entry, LogPosition, LogState, Progress

SLICE = 1000
"""Ticks that are encoded and handed out at once, before other tasks of the loop continue."""


COVERAGE_OVERLAP: Duration = 3600 * SECOND
"""Coverage is stated again from so long before its last end on: an earlier time may have been completed since."""


class Subscriber(Protocol):
    """A client that is live, or may become so.

    `stated_until` is the end of the coverage that was reported to it; None if it did not ask for that.
    """

    progress: Progress
    stated_until: Micros | None

    @property
    def filter(self) -> Filter:
        """Which ticks it gets."""
        ...

    def accept(self, frames: bytes, ticks: int, after: LogPosition) -> None:
        """Send frames, after which the client has the log up to `after`. Never waits."""
        ...

    def state(self, statement: CoverageStatement) -> None:
        """Report to the client when the record is complete. Never waits."""
        ...

    def restart(self) -> None:
        """End the stream, because the log has begun again."""
        ...


class Hub:
    """The live clients. `position` is the place in the log up to which they have everything.

    A client joins only behind that position, without a moment between the check and the join, so no tick is missing;
    and each accepts only what is behind its own progress, so none comes twice.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._live: set[Subscriber] = set()
        self.position = LogPosition(0)
        self.mark = ""
        self._statement: CoverageStatement | None = None  # until all live clients have the log up to its end
        self.is_ready = asyncio.Event()
        """Set once the log is followed."""

    @property
    def live(self) -> int:
        """The number of live clients."""
        return len(self._live)

    @property
    def coverage_since(self) -> Micros | None:
        """From when on the coverage of live clients must be read; None if none asks for it."""
        stated = [each.stated_until for each in self._live if each.stated_until is not None]
        return min(stated) - COVERAGE_OVERLAP if stated else None

    def state(self, statement: CoverageStatement) -> None:
        """Report to live clients when the record is complete, once they have the log as far as it was read for that."""
        if self._statement is None:
            self._statement = statement
            self._state()

    def _state(self) -> None:
        if self._statement is not None and self.position >= self._statement.end:
            statement, self._statement = self._statement, None
            for subscriber in list(self._live):
                subscriber.state(statement)

    def follow(self, state: LogState) -> None:
        """Go on with the log, or begin at its end if it is another one, which ends the streams of all clients."""
        if state.mark == self.mark and state.complete_after < self.position.entry <= state.end.entry:
            return
        self.restart(state)

    def restart(self, state: LogState) -> None:
        """Begin at the end of a log."""
        for subscriber in list(self._live):
            self.leave(subscriber)
            subscriber.restart()
        self.mark, self.position, self._statement = state.mark, state.end, None
        self.is_ready.set()

    def join(self, subscriber: Subscriber) -> bool:
        """Add a client that has everything up to here; return whether it has."""
        if subscriber.progress.place is not None or subscriber.progress.position < self.position:
            return False
        self._live.add(subscriber)
        return True

    def leave(self, subscriber: Subscriber) -> None:
        """Remove a client, if it is live."""
        self._live.discard(subscriber)

    async def publish(self, entries: Sequence[Entry]) -> None:
        """Hand out commits, in slices."""
        for entry in entries:
            rows = list(unpack_rows(entry.rows))
            for start in range(entry.skip, len(rows), SLICE):
                end = min(start + SLICE, len(rows))
                after = LogPosition(entry.id, end) if end < len(rows) else LogPosition(entry.id + 1)
                self._publish(entry.id, start, rows[start:end], after)
                await asyncio.sleep(0)
            self.position = LogPosition(entry.id + 1)
            self._state()

    def _publish(self, entry: int, start: int, rows: Sequence[Row], after: LogPosition) -> None:
        arrivals = [row[1] for row in rows]
        first, last = min(arrivals), max(arrivals)
        encoded: dict[Filter, tuple[bytes, int]] = {}
        for subscriber in list(self._live):
            wanted = subscriber.filter.within(first, last)
            if wanted not in encoded:
                encoded[wanted] = self._encode(wanted, entry, start, rows)
            subscriber.accept(*encoded[wanted], after)
        self.position = after

    def _encode(self, wanted: Filter, entry: int, start: int, rows: Sequence[Row]) -> tuple[bytes, int]:
        """Return the frames of those ticks that pass a filter, and their number."""
        chosen: Sequence[int] = range(len(rows))
        passed = rows
        if not wanted.is_open:
            chosen = [index for index in chosen if wanted.matches(rows[index])]
            passed = [rows[index] for index in chosen]

        def cursor(index: int) -> str:
            return cursor_text(self.mark, Progress(LogPosition(entry, start + chosen[index] + 1), None))

        frames = self._encoder.frames(passed, cursor if wanted.meta else None)
        return deflated(frames) if wanted.compress else frames, len(passed)
