"""The part of the buffer on disk: a queue of batches in one SQLite file, owned by one process.

Every call waits for the disk, so all calls belong into one thread of their own. Appended batches survive a power loss
(WAL with `synchronous=FULL`).

| failure                        | error                   | the next call           |
|--------------------------------|-------------------------|-------------------------|
| the disk accepts nothing now   | `SpoolUnavailableError` | tries again             |
| the file is damaged            | `SpoolDamagedError`     | starts an empty one     |
| a newer version wrote the file | `ConfigurationError`    | fails again             |
"""

from __future__ import annotations

import contextlib
import errno
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec

from ingestor.buffer import spool_file
from ingestor.buffer.lock import DirectoryLock
from ingestor.buffer.reserve import Reserve
from ingestor.buffer.spool_format import FileDamagedError, NewerFormatError, QueueState, body_of, row_of
from ingestor.buffer.watermark import Watermark
from ingestor.errors import ConfigurationError, IngestorError
from ingestor.model import Batch
from ingestor.redaction import outside_text

CHECKPOINT_PAGES = 1000
"""SQLite's default: the write-ahead log is copied into the file after so many pages of 4 KiB."""

VACUUM_PAGES = 256
"""Up to so many free pages of 4 KiB are not worth returning to the disk."""

VACUUM_STEP = 4096
"""Pages returned in one step, so that a batch never waits long for the disk."""

MAX_SET_ASIDE = 16
"""Damaged files that are kept per day. A disk that damages more counts as unavailable, so that they don't fill it."""

_NOTHING = QueueState(0)
_T = TypeVar("_T")


class SpoolUnavailableError(IngestorError):
    """The disk accepts nothing now, most likely because it is full. Batches written before are still there.

    `may_be_damage` is True if the file itself may be the reason.
    """

    def __init__(self, message: str, *, may_be_damage: bool = False) -> None:
        super().__init__(message, hint="Make sure that its disk has room and can be written to.")
        self.may_be_damage = may_be_damage


class SpoolDamagedError(IngestorError):
    """The file can't be read; it was set aside as `path`, and an empty one replaces it."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"The spool was damaged ({why}) and set aside as {path}.")
        self.path = path
        self.why = why


@dataclass(frozen=True, slots=True)
class Entry:
    """A batch and its position in the queue. Positions rise, with possible gaps."""

    position: int
    batch: Batch


class Spool:
    """The queue on disk, in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "spool.db"
        self.is_full = False
        """Whether the disk was full and has had no room for the ballast since."""
        self.is_slack = False
        """Whether most of the file is free, so that `shrink` has work."""
        self.damages: list[SpoolDamagedError] = []
        """The damaged files found so far."""
        self._state = _NOTHING
        self._reserve = Reserve(directory)
        self._watermark = Watermark(directory / "watermark")
        self._lock = DirectoryLock(directory)
        self._connection: sqlite3.Connection | None = None
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Batch).decode

    @property
    def size(self) -> int:
        """Bytes of the bodies in the queue."""
        return self._state.size

    @property
    def depth(self) -> int:
        """Batches in the queue."""
        return self._state.depth

    @property
    def last(self) -> int:
        """The position of the newest batch that this file ever held; 0 if there was none."""
        return self._state.last

    @property
    def forgotten(self) -> int:
        """The position up to which batches have left this file; `last` if it is empty."""
        return self._state.forgotten

    @property
    def set_aside(self) -> list[Path]:
        """The new names of the damaged files found so far."""
        return [each.path for each in self.damages]

    def claim(self) -> None:
        """Claim the directory. Raises ConfigurationError if another process owns it, and SpoolUnavailableError."""
        try:
            self._lock.claim()
        except OSError as error:
            raise self._unavailable(error) from error

    def open(self) -> None:
        """Claim the directory if needed, and verify the whole file, which may take seconds.

        A damaged file is set aside. Raises ConfigurationError if a newer version wrote the file, and
        SpoolUnavailableError if the disk does not accept even an empty queue.
        """
        if not self._lock.is_ours:
            self.claim()
        try:
            self._attempt(self._ensure_connected)
        except SpoolDamagedError:
            try:
                self._attempt(self._ensure_connected)
            except SpoolDamagedError as error:  # the new file is damaged too, so the disk is at fault
                raise self._unavailable(error) from error
        self.restore_reserve()

    def close(self) -> None:
        """Close the file and release the directory."""
        self._disconnect()
        self._watermark.close()
        self._lock.release()

    def restore_reserve(self) -> None:
        """Make the ballast if it is missing and the disk has room for twice as much, and end the state "full"."""
        if self._reserve.restore():
            self._set_full(False)

    def append(self, entries: Sequence[Entry], *, replaced: int | None = None) -> None:
        """Append batches, all or none, and delete the one at `replaced`.

        An append of unknown outcome can be repeated: it first deletes all batches from its first position on.
        """
        first = entries[0].position

        def change(connection: sqlite3.Connection, state: QueueState) -> QueueState:
            state, previous = spool_file.remove_newest(connection, state, first, replaced)
            state = replace(state, forgotten=min(state.forgotten, first - 1))
            previous, size = min(previous, first - 1), state.size
            for entry in entries:
                body = self._encode(entry.batch)
                row = row_of(state.file, entry.position, previous, body)
                connection.execute("INSERT INTO batches VALUES (?, ?, ?, ?)", row)
                previous, size = entry.position, size + len(body)
            return replace(state, last=previous, depth=state.depth + len(entries), size=size)

        self._attempt(partial(self._commit, change), needs=2 * sum(entry.batch.size for entry in entries))

    def read(self, after: int, max_rows: int, max_bytes: int) -> list[Entry]:
        """Return the oldest batches behind position `after`, up to the limits, at least one if any exists."""
        return self._attempt(partial(self._read, after, max_rows, max_bytes), writes=False)

    def forget(self, upto: int) -> None:
        """Delete the batches up to a position, after they were committed."""
        if self.is_full and upto >= self.last:
            self._renew()
            return

        def change(connection: sqlite3.Connection, state: QueueState) -> QueueState:
            state = spool_file.remove(connection, state, "position <= ?", (upto,))
            return replace(state, forgotten=max(state.forgotten, min(upto, state.last)))

        self._attempt(partial(self._commit, change))
        with self._connected() as connection:
            self.is_slack = _is_slack(connection)

    def shrink(self) -> None:
        """Return one step of the file's free space to the disk. Does nothing on a full disk: it needs space first."""
        self.is_slack = False
        if self.is_full:
            return
        with self._connected() as connection:
            before = sum(spool_file.free_and_used_pages(connection))
            connection.executescript(f"PRAGMA incremental_vacuum({VACUUM_STEP}); PRAGMA wal_checkpoint(TRUNCATE)")
            shrank = sum(spool_file.free_and_used_pages(connection)) < before
            self.is_slack = shrank and _is_slack(connection)

    def _read(self, after: int, max_rows: int, max_bytes: int) -> list[Entry]:
        found: list[Entry] = []
        rows = size = 0
        with self._connected() as connection, contextlib.closing(connection.cursor()) as cursor:
            state = self._current(connection)
            reached = max(after, state.forgotten)
            cursor.execute(
                "SELECT coalesce(length(body), 0), position, previous, checksum, body FROM batches "
                "WHERE position > ? ORDER BY position",
                (reached,),
            )
            for length, *row in cursor:
                size += length
                if found and size > max_bytes:
                    return found
                body = body_of(state.file, row)
                position, previous, *_ = row
                if previous != reached if found else previous > reached:
                    raise FileDamagedError(f"batch {previous} is missing")
                batch = self._decoded(body)
                rows += batch.count
                if found and rows > max_rows:
                    return found
                found.append(Entry(position, batch))
                reached = position
            if reached < state.last:
                raise FileDamagedError(f"the batches from {reached + 1} to {state.last} are missing")
        return found

    def _decoded(self, body: bytes) -> Batch:
        try:
            return self._decode(body)
        except Exception as error:  # with a correct checksum: another version wrote it, or we have a bug
            raise FileDamagedError(f"a batch cannot be read: {outside_text(error)}") from error

    def _commit(self, change: Callable[[sqlite3.Connection, QueueState], QueueState]) -> None:
        """Commit a change to batches and state in one transaction."""
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                state = change(connection, self._current(connection))
                if not state.is_consistent:
                    raise FileDamagedError("its counts do not agree with what is in it")
                spool_file.write_state(connection, state)
                connection.execute("COMMIT")
            finally:
                self._roll_back(connection)
            self._state = state
            self._watermark.write(state)

    def _current(self, connection: sqlite3.Connection) -> QueueState:
        """Return the state in the file, which is ahead of ours if the outcome of a commit was unknown."""
        state = spool_file.read_state(connection)
        if state.file != self._state.file or state.last < self._state.last:
            raise FileDamagedError("the state of the queue is an older one")
        self._state = state
        return state

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error:
            self._disconnect()

    def _renew(self) -> None:
        """Replace an empty queue's file by a new one, the surest way to free its space."""
        self._disconnect()
        with self._translated():
            # If a crash restores the file in an older state, without its log, none of its batches count as missing.
            self._watermark.write(replace(self._state, forgotten=self.last, depth=0, size=0))
            spool_file.unlink(self.path)
        self._state = _NOTHING
        self._attempt(self._ensure_connected)

    def _ensure_connected(self) -> None:
        with self._connected():
            pass

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        if self._connection is None:
            try:
                with self._translated():
                    self._connect()
            except (SpoolUnavailableError, ConfigurationError):  # the connection may be half verified
                self._disconnect()
                raise
        assert self._connection is not None
        with self._translated():
            yield self._connection

    def _connect(self) -> None:
        mark = self._watermark.read()
        self._make_file(mark)
        self._connection = spool_file.connect(self.path)
        self._state = spool_file.verify(self._connection)
        if mark is not None and mark.file == self._state.file and mark.depth and mark.last > self._state.last:
            raise FileDamagedError(f"the batches from {self._state.last + 1} to {mark.last} are missing")
        self._watermark.write(self._state)
        self._set_full(self.is_full)

    def _make_file(self, mark: QueueState | None) -> None:
        """Make the file if it is missing or empty. Raises FileDamagedError if there should be one."""
        if self.path.exists() and (not self.path.is_file() or self.path.stat().st_size):
            return
        if mark is not None and mark.depth:
            self.path.touch(mode=0o600)
            raise FileDamagedError(f"it is empty, and should hold {mark.depth} batches")
        if (log := spool_file.leftover(self.path)) is not None:
            self.path.touch(mode=0o600)
            raise FileDamagedError(f"it is empty, and {log.name} is not")
        spool_file.create(self.path)

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def _attempt(self, call: Callable[[], _T], *, writes: bool = True, needs: int = 1) -> _T:
        """Run a call; if the disk refuses it, remove the ballast and run it again.

        If the disk refuses again, accepts `needs` bytes in another file, and refuses a third time, the file is at fault
        and is set aside.
        """
        try:
            return call()
        except SpoolUnavailableError:
            if writes:
                self._set_full(True)
                self._reserve.release()
        try:
            return call()
        except SpoolUnavailableError as error:
            if not (error.may_be_damage and self._disk_accepts(needs)):
                raise
        try:
            return call()
        except SpoolUnavailableError as error:
            if not error.may_be_damage:
                raise
            raise self._set_aside(f"SQLite reports {error.__cause__}, and the disk accepts other files") from error

    def _disk_accepts(self, size: int) -> bool:
        return self._reserve.disk_accepts(size, spool_file.largest(self.path))

    def _set_full(self, full: bool) -> None:
        """Record whether the disk is full. If so, turn off checkpoints, which write the log's content again."""
        self.is_full = full
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute(f"PRAGMA wal_autocheckpoint = {0 if full else CHECKPOINT_PAGES}").fetchall()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Translate errors: a damaged file is set aside, other failures mean that the disk is unavailable."""
        try:
            yield
        except NewerFormatError:
            raise ConfigurationError(
                f"{self.path} was written by a newer version of ingestor; start that version."
            ) from None
        except FileDamagedError as error:
            raise self._set_aside(outside_text(error)) from error
        except spool_file.FAILURES as error:
            if spool_file.is_damage(error):
                raise self._set_aside(outside_text(error)) from error
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> SpoolUnavailableError:
        return SpoolUnavailableError(
            f"The spool {self.path} cannot be written: {outside_text(error)}.",
            may_be_damage=spool_file.may_be_damage(self.path, error),
        )

    def _set_aside(self, why: str) -> SpoolDamagedError:
        """Rename the damaged file, so that its content is kept. The next call makes a new one."""
        now = datetime.now(UTC)
        target = self._name_aside(now)
        try:
            since = self._name_aside(now - timedelta(days=1)).name
            recent = [each for each in self.path.parent.glob(self._name_aside(None).name) if each.name > since]
            if len(recent) >= MAX_SET_ASIDE:
                raise SpoolUnavailableError(
                    f"The spool {self.path} is damaged ({why}), after {len(recent)} others within a day."
                )
            # Rename before closing, because closing merges the log into the file and removes it.
            spool_file.rename(self.path, target)
        except OSError as error:
            raise SpoolUnavailableError(
                f"The spool {self.path} is damaged ({why}) and can't be set aside: {outside_text(error)}."
            ) from error
        finally:
            self._disconnect()
        self._watermark.clear()
        self.is_slack = False
        self._state = _NOTHING
        damage = SpoolDamagedError(target, why)
        self.damages.append(damage)
        return damage

    def _name_aside(self, at: datetime | None) -> Path:
        """Return the name of a file that was set aside at an instant; without one, the pattern of all such names."""
        return self.path.with_name(f"spool-damaged-{'*' if at is None else f'{at:%Y%m%dT%H%M%S.%fZ}'}.db")


def prepare_state_directory(directory: Path) -> None:
    """Make the directory of the daemon's own files, if needed. Raises ConfigurationError if it can't be written to."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        (directory / "accepted").touch(mode=0o600)
    except OSError as error:
        if error.errno == errno.ENOSPC:  # may pass without an operator, so a service manager may retry
            raise IngestorError(f"The disk of {directory} is full.", hint="Make room on it.") from None
        raise ConfigurationError(
            f"INGESTOR_SPOOL_DIR: {directory} is not a directory that can be written to: {error.strerror}."
        ) from None


def _is_slack(connection: sqlite3.Connection) -> bool:
    """Return whether most of the file is free, and enough of it to be worth the work."""
    free, used = spool_file.free_and_used_pages(connection)
    # While much of it is in use, vacuuming would only move the used pages to the front again and again.
    return free > VACUUM_PAGES and free > used
