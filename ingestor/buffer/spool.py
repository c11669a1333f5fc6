"""The buffer's disk: a queue of batches in one SQLite file, which one process owns.

Everything here waits for the disk, so it belongs into a thread of its own; nothing here is meant for two threads at
once. What `append` has returned for survives a power loss (WAL with `synchronous=FULL`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sqlite3
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, TypeAlias

import msgspec

from ingestor.errors import ConfigurationError, IngestorError
from ingestor.model import Batch

FORMAT = 1
"""`PRAGMA user_version` of the file. Fields that a batch has since gained have defaults, so they need no new one."""

BALLAST = 16 * 2**20
"""Bytes kept in reserve. On a full disk SQLite can't even delete, so this is removed first and made again later."""

CHECKPOINT_PAGES = 1000
"""SQLite's default: after so many pages of 4 KiB the log is brought into the file."""

VACUUM_PAGES = 256
"""Free pages (of 4 KiB) that are not worth the work of giving them back."""

VACUUM_STEP = 4096
"""Pages given back in one step, so that a batch that must go to the disk never waits long."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS batches (
    position INTEGER PRIMARY KEY,
    bytes INTEGER NOT NULL,
    ticks INTEGER NOT NULL,
    checksum INTEGER NOT NULL,
    body BLOB NOT NULL
)
"""
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}

_FILES = ("-wal", "")
"""In the order in which they may go: a log without its file would be taken for that of the next file."""

_Change: TypeAlias = tuple[int, int]
"""By how much the number of batches and the size of their bodies change."""


class SpoolUnavailableError(IngestorError):
    """The disk takes nothing now, for want of space most likely. What was written before is still there."""


class SpoolDamagedError(IngestorError):
    """The file can't be read; it was set aside as `path`, and an empty one took its place."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"The spool was damaged ({why}) and set aside as {path}.")
        self.path = path


@dataclass(frozen=True, slots=True)
class Entry:
    """A batch and its place in the queue; places rise, and may leave out numbers."""

    position: int
    batch: Batch


class Spool:
    """The queue on disk, in `directory`. `size` and `depth` count the bodies and the batches that it holds."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "spool.db"
        self.size = 0
        self.depth = 0
        self.last = 0
        """The position of the newest batch, 0 where there is none."""
        self.is_full = False
        """Whether the disk was full, and has not had room for the ballast since."""
        self.is_slack = False
        """Whether the file is mostly free, so that `shrink` has something to do."""
        self.set_aside: list[Path] = []
        """The damaged files that were found, under their new names."""
        self._ballast = directory / "ballast"
        self._lock_path = directory / "lock"
        self._lock: IO[str] | None = None
        self._connection: sqlite3.Connection | None = None
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Batch).decode

    def claim(self) -> None:
        """Take possession. Raises ConfigurationError where another process owns the directory."""
        file = self._open_lock()
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read(20).strip()
            file.close()
            raise ConfigurationError(
                f"INGESTOR_SPOOL_DIR: {self.path.parent} is in use by another ingestor"
                f"{f' (process {owner})' if owner else ''}. Stop it, or give each one a directory of its own."
            ) from None
        self._lock = file
        with contextlib.suppress(OSError):  # on a full disk it owns the directory without saying its number
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()

    def open(self) -> None:
        """Count what is there; the directory is claimed first, if it was not. Takes seconds: it reads the whole file.

        A damaged file is set aside. Raises ConfigurationError where a newer version wrote the file, and
        SpoolUnavailableError where the disk does not take even an empty queue.
        """
        if self._lock is None:
            self.claim()
        with contextlib.suppress(SpoolDamagedError):
            self._with_reserve(self._connect)
        self.restore_reserve()

    def close(self) -> None:
        """Let go of the file and of the directory."""
        self._disconnect()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def restore_reserve(self) -> None:
        """Make the ballast, if it is not there and the disk has room for twice as much."""
        draft = self._ballast.with_suffix(".new")
        try:
            if not self._ballast.exists():
                if shutil.disk_usage(self.path.parent).free < 2 * BALLAST:
                    return
                with draft.open("wb") as file:
                    file.write(os.urandom(BALLAST))  # random: a file system may keep zeros without using space
                    os.fsync(file.fileno())
                draft.replace(self._ballast)
            self._go_easy(False)
        except OSError:
            with contextlib.suppress(OSError):
                draft.unlink()

    def append(self, entries: Sequence[Entry], *, replaced: int | None = None) -> None:
        """Add batches behind the others, all or none, and drop the one at `replaced`.

        An append of unknown outcome can be repeated: what lies at or behind the first position gives way.
        """

        def change(connection: sqlite3.Connection) -> _Change:
            gone = _remove(connection, "position >= ? OR position = ?", (entries[0].position, replaced))
            size = 0
            for entry in entries:
                body = self._encode(entry.batch)
                row = (entry.position, len(body), entry.batch.count, zlib.crc32(body), body)
                connection.execute("INSERT INTO batches VALUES (?, ?, ?, ?, ?)", row)
                size += len(body)
            return gone[0] + len(entries), gone[1] + size

        self._write(change)
        self.last = entries[-1].position

    def read(self, after: int, max_rows: int, max_bytes: int) -> list[Entry]:
        """Return the oldest batches behind position `after`, up to the limits, at least one if there is any."""
        found: list[tuple[int, bytes, int]] = []
        rows = size = 0
        with self._connected() as connection, contextlib.closing(connection.cursor()) as cursor:
            cursor.execute(
                "SELECT position, body, checksum, ticks FROM batches WHERE position > ? ORDER BY position", (after,)
            )
            for position, body, checksum, ticks in cursor:
                rows, size = rows + ticks, size + len(body)
                if found and (rows > max_rows or size > max_bytes):
                    break
                found.append((position, body, checksum))
        return [Entry(position, self._decoded(body, checksum)) for position, body, checksum in found]

    def forget(self, upto: int) -> None:
        """Delete the batches up to that position: they are committed."""
        if self.is_full and upto >= self.last:
            self._renew()
            return
        self._write(lambda connection: _remove(connection, "position <= ?", (upto,)))
        with self._connected() as connection:
            self.is_slack = _is_slack(connection)

    def shrink(self) -> None:
        """Give a step of the file's free space back to the disk. Not while the disk is full: it takes space first."""
        self.is_slack = False
        if self.is_full:
            return
        with self._connected() as connection:
            connection.executescript(f"PRAGMA incremental_vacuum({VACUUM_STEP}); PRAGMA wal_checkpoint(TRUNCATE)")
            self.is_slack = _is_slack(connection)

    def _renew(self) -> None:
        """Begin a new file in place of one that holds nothing any more: the surest way to free its space."""
        self._disconnect()
        with self._translated():
            for suffix in _FILES:
                Path(f"{self.path}{suffix}").unlink(missing_ok=True)
        self._connect()

    def _open_lock(self) -> IO[str]:
        try:
            return self._lock_path.open("a+", encoding="ascii")
        except OSError as error:
            raise self._unavailable(error) from error

    def _connect(self) -> None:
        try:
            with self._translated():
                self.path.touch(mode=0o600)
                self._connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=0)
                self._prepare(self._connection)
        except (SpoolUnavailableError, ConfigurationError):
            self._disconnect()
            raise

    def _prepare(self, connection: sqlite3.Connection) -> None:
        # The order matters: the way of vacuuming can be chosen only before the first table.
        connection.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > FORMAT:
            raise ConfigurationError(f"{self.path} was written by a newer version of ingestor; start that one.")
        for pragma in (
            "auto_vacuum = INCREMENTAL",
            "journal_mode = WAL",
            "synchronous = FULL",
            f"journal_size_limit = {BALLAST // 4}",
        ):
            connection.execute(f"PRAGMA {pragma}").fetchall()
        if not version:  # a full disk must not keep an existing queue from being read
            connection.execute(_SCHEMA)
            connection.execute(f"PRAGMA user_version = {FORMAT}")
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise self._set_aside(verdict)
        self.depth, self.size, self.last = connection.execute(
            "SELECT count(*), coalesce(sum(bytes), 0), coalesce(max(position), 0) FROM batches"
        ).fetchone()

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def _write(self, change: Callable[[sqlite3.Connection], _Change]) -> None:
        """Commit a change, or nothing of it."""
        self._with_reserve(partial(self._commit, change))

    def _with_reserve(self, attempt: Callable[[], None]) -> None:
        """Try; where the disk is full, try once more without the ballast."""
        try:
            attempt()
        except SpoolUnavailableError as error:
            self._go_easy(True)
            try:
                self._ballast.unlink()
            except OSError:
                raise error from None
            attempt()

    def _go_easy(self, easy: bool) -> None:
        """On a full disk do without checkpoints: each would write again, into the file, what is safe in the log."""
        self.is_full = easy
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute(f"PRAGMA wal_autocheckpoint = {0 if easy else CHECKPOINT_PAGES}").fetchall()

    def _commit(self, change: Callable[[sqlite3.Connection], _Change]) -> None:
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                depth, size = change(connection)
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
        self.depth += depth
        self.size += size

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        if self._connection is None:
            self._connect()
        assert self._connection is not None
        with self._translated():
            yield self._connection

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Tell a damaged file, which is set aside, from a disk that takes nothing now."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:
                raise self._set_aside(str(error)) from error
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> SpoolUnavailableError:
        return SpoolUnavailableError(
            f"The spool {self.path} cannot be written: {error}.",
            hint="See that its disk has room and can be written to.",
        )

    def _decoded(self, body: bytes, checksum: int) -> Batch:
        try:
            if zlib.crc32(body) == checksum:
                return self._decode(body)
            why = "a batch differs from its checksum"
        except msgspec.MsgspecError as error:
            why = f"a batch cannot be read: {error}"
        raise self._set_aside(why)

    def _set_aside(self, why: str) -> SpoolDamagedError:
        """Give the damaged file another name, so that nothing of it is lost, and begin a new one."""
        name = f"spool-damaged-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}.db"
        target = self.path.with_name(name)
        # Renamed before it is closed: closing would merge the log into the file and remove it.
        try:
            for suffix in _FILES:
                with contextlib.suppress(FileNotFoundError):
                    Path(f"{self.path}{suffix}").rename(f"{target}{suffix}")
        except OSError as error:
            raise self._unavailable(error) from error
        self._disconnect()
        self.set_aside.append(target)
        self.is_slack = False
        self.depth = self.size = self.last = 0
        with contextlib.suppress(SpoolUnavailableError):  # then the next call tries again
            self._connect()
        return SpoolDamagedError(target, why)


def _is_slack(connection: sqlite3.Connection) -> bool:
    """Whether most of the file is free, and it is worth the work."""
    (free,) = connection.execute("PRAGMA freelist_count").fetchone()
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    # While much of it is in use, that would only move the pages in use to the front, over and over.
    return bool(free > VACUUM_PAGES and free * 2 > pages)


def _remove(connection: sqlite3.Connection, where: str, values: tuple[object, ...]) -> _Change:
    """Delete batches; return how the counts change by that."""
    count, size = connection.execute(
        f"SELECT count(*), coalesce(sum(bytes), 0) FROM batches WHERE {where}",  # noqa: S608 - the callers' constants
        values,
    ).fetchone()
    connection.execute(f"DELETE FROM batches WHERE {where}", values)  # noqa: S608
    return -count, -size
