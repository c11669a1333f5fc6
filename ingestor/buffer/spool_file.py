"""The spool's file: create, open, verify and rename it, and tell damage from other failures.

A file gets its name when it is complete, so every file of that name was complete once.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from dataclasses import replace
from pathlib import Path

from ingestor.buffer.spool_format import TABLES, FileDamagedError, QueueState, state_of, state_row

LOG_LIMIT = 4 * 2**20
"""Bytes of the write-ahead log that SQLite keeps for the next transactions."""

_LOGS = ("-wal", "-journal", "-shm")
"""Suffixes of the files that SQLite keeps beside its file. It would apply a leftover one to the next file."""

_MAYBE_NOT_THE_FILE = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_AUTH,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_NOLFS,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_INTERRUPT,
}
_SURELY_NOT_THE_FILE = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}

FAILURES = (sqlite3.Error, sqlite3.Warning, OSError, MemoryError, UnicodeDecodeError)
"""The errors of SQLite and of the disk. Their messages quote the file, so decoding them may fail too."""


def is_damage(error: Exception) -> bool:
    """Return whether only damage can cause a failure, since our statements never change."""
    return not isinstance(error, OSError | MemoryError) and _code(error) not in (
        _MAYBE_NOT_THE_FILE | _SURELY_NOT_THE_FILE
    )


def may_be_damage(path: Path, error: Exception) -> bool:
    """Return whether damage may cause a failure that has other causes too: a damaged header fails in the same way.

    A lock of another process and a missing permission are no damage.
    """
    if isinstance(error, PermissionError) or _code(error) in _SURELY_NOT_THE_FILE:
        return False
    found = [each for each in _files(path) if os.access(each, os.F_OK)]
    return bool(found) and all(os.access(each, os.R_OK | os.W_OK) for each in found)


def connect(path: Path) -> sqlite3.Connection:
    """Open the file in autocommit mode; fail at once if it is locked."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0)
    # A damaged file may hold text that can't be decoded.
    connection.text_factory = bytes
    return connection


def create(path: Path) -> None:
    """Create an empty queue; replace an existing file."""
    draft = path.with_suffix(".new")
    for each in _files(draft):
        each.unlink(missing_ok=True)
    draft.touch(mode=0o600)
    with contextlib.closing(connect(draft)) as connection:
        # The order matters: `auto_vacuum` can be set only before the first table.
        for statement in ("PRAGMA auto_vacuum = INCREMENTAL", "PRAGMA synchronous = FULL", "BEGIN", *TABLES.values()):
            connection.execute(statement).fetchall()
        write_state(connection, QueueState.new())
        connection.execute("COMMIT")
        connection.execute("PRAGMA journal_mode = WAL").fetchall()
    draft.replace(path)
    _sync_directory(path.parent)


def leftover(path: Path) -> Path | None:
    """Return a log that is left without its file, if there is one."""
    found = (each for each in _files(path)[1:] if each.exists() and each.stat().st_size)
    return next(found, None)


def verify(connection: sqlite3.Connection) -> QueueState:
    """Configure the connection, verify the whole file before any change to it, and return its state.

    Raises FileDamagedError, and NewerFormatError if a newer version wrote it.
    """
    for setting in ("locking_mode = EXCLUSIVE", "cell_size_check = ON", "mmap_size = 0", "cache_size = -2000"):
        connection.execute(f"PRAGMA {setting}").fetchall()
    state = read_state(connection)
    schema = connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
    if schema != sorted((name.encode(), statement.encode()) for name, statement in TABLES.items()):
        raise FileDamagedError("its tables differ from those that were created")
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != b"ok":
        raise FileDamagedError(verdict.decode(errors="replace"))
    for setting in ("journal_mode = WAL", "synchronous = FULL", f"journal_size_limit = {LOG_LIMIT}"):
        connection.execute(f"PRAGMA {setting}").fetchall()
    found = connection.execute(
        "SELECT count(*), coalesce(sum(length(body)), 0), coalesce(min(position), 0), coalesce(max(position), 0) "
        "FROM batches"
    ).fetchone()
    depth, size, first, last = found
    if (depth, size) != (state.depth, state.size) or (depth and not state.forgotten < first <= last == state.last):
        raise FileDamagedError(f"it should hold {state.depth} batches up to number {state.last}, but holds {found}")
    return state


def read_state(connection: sqlite3.Connection) -> QueueState:
    """Return the state in the file. Raises FileDamagedError and NewerFormatError."""
    return state_of(connection.execute("SELECT format, content, checksum FROM queue WHERE id = 1").fetchone())


def write_state(connection: sqlite3.Connection, state: QueueState) -> None:
    """Replace the state in the file."""
    connection.execute("REPLACE INTO queue VALUES (1, ?, ?, ?)", state_row(state))


def remove(connection: sqlite3.Connection, state: QueueState, where: str, values: tuple[object, ...]) -> QueueState:
    """Delete batches and return the new state. Raises FileDamagedError if there were more than the state counts."""
    count, size = connection.execute(
        f"SELECT count(*), coalesce(sum(length(body)), 0) FROM batches WHERE {where}",  # noqa: S608 - our constants
        values,
    ).fetchone()
    connection.execute(f"DELETE FROM batches WHERE {where}", values)  # noqa: S608
    left = replace(state, depth=state.depth - count, size=state.size - size)
    if left.depth < 0 or left.size < 0:
        raise FileDamagedError(f"it holds {count} batches instead of {state.depth}")
    return left


def remove_newest(
    connection: sqlite3.Connection, state: QueueState, first: int, replaced: int | None
) -> tuple[QueueState, int]:
    """Delete the batches from position `first` on and the one at `replaced`; return state and previous position.

    The previous position is the recorded one, even if its batch is missing: reading finds that.
    """
    where, values = "position >= ? OR position = ?", (first, replaced)
    row = connection.execute(
        f"SELECT previous FROM batches WHERE {where} ORDER BY position LIMIT 1",  # noqa: S608
        values,
    ).fetchone()
    if row is None:
        return state, state.last
    if not isinstance(row[0], int):
        raise FileDamagedError("a batch has no predecessor")
    return remove(connection, state, where, values), row[0]


def free_and_used_pages(connection: sqlite3.Connection) -> tuple[int, int]:
    """Return the numbers of free and of used pages."""
    (free,) = connection.execute("PRAGMA freelist_count").fetchone()
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    return free, pages - free


def rename(path: Path, target: Path) -> None:
    """Rename a file and its logs."""
    for old, new in zip(_files(path), _files(target), strict=True):
        with contextlib.suppress(FileNotFoundError):
            old.rename(new)


def unlink(path: Path) -> None:
    """Remove a file and its logs, the logs first."""
    for each in reversed(_files(path)):
        each.unlink(missing_ok=True)


def largest(path: Path) -> int:
    """Return the size in bytes of the file or of its logs, the largest."""
    sizes = [0]
    for each in _files(path):
        with contextlib.suppress(OSError):
            sizes.append(each.stat().st_size)
    return max(sizes)


def _files(path: Path) -> list[Path]:
    return [path, *(path.with_name(path.name + suffix) for suffix in _LOGS)]


def _code(error: Exception) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
