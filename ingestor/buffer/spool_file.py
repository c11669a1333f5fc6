"""The spool's file as a whole: made, opened, verified, and given another name. It knows what is damage and what is not.

A file gets its name when it is complete, so whatever bears it was complete once.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from dataclasses import replace
from pathlib import Path

from ingestor.buffer.spool_format import TABLES, FileDamagedError, QueueState, state_of, state_row

LOG_LIMIT = 4 * 2**20
"""Bytes of the write-ahead log that are kept for the next transactions."""

_LOGS = ("-wal", "-journal", "-shm")
"""What SQLite keeps beside a file. It would take one that is left over for that of the next file."""

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
"""All that SQLite, or the disk under it, raises. Its messages quote the file, which need not be text any more."""


def is_damage(error: Exception) -> bool:
    """Whether a failure can only come from what is in the file: our statements are always the same."""
    return not isinstance(error, OSError | MemoryError) and _code(error) not in (
        _MAYBE_NOT_THE_FILE | _SURELY_NOT_THE_FILE
    )


def may_be_damage(path: Path, error: Exception) -> bool:
    """Whether the file may be the reason of a failure that can have others: a header that is changed says so, too.

    That another process holds it, or that we are not permitted to use it, is no damage.
    """
    if isinstance(error, PermissionError) or _code(error) in _SURELY_NOT_THE_FILE:
        return False
    found = [each for each in _files(path) if os.access(each, os.F_OK)]
    return bool(found) and all(os.access(each, os.R_OK | os.W_OK) for each in found)


def connect(path: Path) -> sqlite3.Connection:
    """Open the file for this process alone."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0)
    # No text is read that could turn out not to be any.
    connection.text_factory = bytes
    return connection


def create(path: Path) -> None:
    """Make an empty queue. Anything in its place is replaced."""
    draft = path.with_suffix(".new")
    for each in _files(draft):
        each.unlink(missing_ok=True)
    draft.touch(mode=0o600)
    with contextlib.closing(connect(draft)) as connection:
        # The order matters: the way of vacuuming can be chosen only before the first table.
        for statement in ("PRAGMA auto_vacuum = INCREMENTAL", "PRAGMA synchronous = FULL", "BEGIN", *TABLES.values()):
            connection.execute(statement).fetchall()
        write_state(connection, QueueState.new())
        connection.execute("COMMIT")
        connection.execute("PRAGMA journal_mode = WAL").fetchall()
    draft.replace(path)
    _sync_directory(path.parent)


def leftover(path: Path) -> Path | None:
    """Return a log that lies there without its file."""
    found = (each for each in _files(path)[1:] if each.exists() and each.stat().st_size)
    return next(found, None)


def verify(connection: sqlite3.Connection) -> QueueState:
    """Prepare the connection, look through the whole file, and return what is in it. Nothing is changed before that.

    Raises FileDamagedError, and NewerFormatError where a newer version wrote it.
    """
    for setting in ("locking_mode = EXCLUSIVE", "cell_size_check = ON", "mmap_size = 0", "cache_size = -2000"):
        connection.execute(f"PRAGMA {setting}").fetchall()
    state = read_state(connection)
    schema = connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
    if schema != sorted((name.encode(), statement.encode()) for name, statement in TABLES.items()):
        raise FileDamagedError("its tables are not those that were made")
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
        raise FileDamagedError(f"it should hold {state.depth} batches up to number {state.last}, and holds {found}")
    return state


def read_state(connection: sqlite3.Connection) -> QueueState:
    """Return the state in the file. Raises FileDamagedError and NewerFormatError."""
    return state_of(connection.execute("SELECT format, content, checksum FROM queue WHERE id = 1").fetchone())


def write_state(connection: sqlite3.Connection, state: QueueState) -> None:
    """Put a state in the place of the one in the file."""
    connection.execute("REPLACE INTO queue VALUES (1, ?, ?, ?)", state_row(state))


def remove(connection: sqlite3.Connection, state: QueueState, where: str, values: tuple[object, ...]) -> QueueState:
    """Delete batches; return the state with what is left. Raises FileDamagedError where more is gone than was there."""
    count, size = connection.execute(
        f"SELECT count(*), coalesce(sum(length(body)), 0) FROM batches WHERE {where}",  # noqa: S608 - our constants
        values,
    ).fetchone()
    connection.execute(f"DELETE FROM batches WHERE {where}", values)  # noqa: S608
    left = replace(state, depth=state.depth - count, size=state.size - size)
    if left.depth < 0 or left.size < 0:
        raise FileDamagedError(f"{count} batches were found where {state.depth} should be")
    return left


def remove_newest(
    connection: sqlite3.Connection, state: QueueState, first: int, replaced: int | None
) -> tuple[QueueState, int]:
    """Delete the batches from position `first` on, and the one at `replaced`; return the position that is before them.

    It is the one that was written down, there or not: a batch that is missing is found when the next one is read.
    """
    where, values = "position >= ? OR position = ?", (first, replaced)
    row = connection.execute(
        f"SELECT previous FROM batches WHERE {where} ORDER BY position LIMIT 1",  # noqa: S608
        values,
    ).fetchone()
    if row is None:
        return state, state.last
    if not isinstance(row[0], int):
        raise FileDamagedError("a batch follows none")
    return remove(connection, state, where, values), row[0]


def free_and_used_pages(connection: sqlite3.Connection) -> tuple[int, int]:
    """Return how many pages of the file are free, and how many are not."""
    (free,) = connection.execute("PRAGMA freelist_count").fetchone()
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    return free, pages - free


def rename(path: Path, target: Path) -> None:
    """Give a file and its logs another name."""
    for old, new in zip(_files(path), _files(target), strict=True):
        with contextlib.suppress(FileNotFoundError):
            old.rename(new)


def unlink(path: Path) -> None:
    """Remove a file and its logs, the logs first."""
    for each in reversed(_files(path)):
        each.unlink(missing_ok=True)


def largest(path: Path) -> int:
    """Return the bytes of the file, or of its log, whichever are more."""
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
