"""Writes batches: one transaction, optimistically by COPY, and the same batch never twice."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import groupby

import asyncpg

from ingestor import __version__
from ingestor.batch import COLUMNS, COPY_HEADER, COPY_TRAILER
from ingestor.clock import Clock, SystemClock
from ingestor.errors import SchemaError, StoreError
from ingestor.model import SECOND, Batch, Micros
from ingestor.store.connect import connect
from ingestor.store.judge import MIGRATE, Remedy, hint, judge
from ingestor.store.queries import QUERIES

SCHEMA_REVISION = "0001"
"""The newest migration that this code was written for. Revisions are numbers, so they compare as text."""

STAY_STAGED = 60.0
"""Seconds for which the writer stays on the staged way after a collision of keys."""

MONTHS_AHEAD = 2
"""Partitions are there this many months before they are needed."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Written:
    """What one commit did, in counts. `ticks` were committed, `duplicates` of them were there already."""

    batches: int = 0
    ticks: int = 0
    duplicates: int = 0
    rejected: int = 0


class Store:
    """The daemon's one connection for writing. Not for concurrent use.

    Every method raises StoreError (SchemaError where `ingestor migrate` is the answer); the connection is then
    in a state from which the next call goes on, or closed and made again by the next call.
    """

    def __init__(self, url: str, *, write_timeout: float, clock: Clock | None = None) -> None:
        self._url = url
        self._write_timeout = write_timeout
        self._clock = clock or SystemClock()
        self._connection: asyncpg.Connection | None = None
        self._has_staging = False
        self._staged_until = 0.0
        self._months: set[date] = set()

    async def open(self) -> asyncpg.Connection:
        """Connect and look at the schema, if that is not done yet."""
        if self._connection is None or self._connection.is_closed():
            self._has_staging = False
            self._months.clear()
            connection = await connect(
                self._url, timeout=self._write_timeout, application_name="ingestor", read_write=True
            )
            try:
                async with self._guarded(connection):
                    await _check_schema(connection)
                    await connection.execute(QUERIES["commit_for_sure"])
            except StoreError:
                connection.terminate()
                raise
            self._connection = connection
        return self._connection

    async def close(self) -> None:
        """Close the connection, at once if the server does not answer."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(
                asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError
            ):
                await connection.close(timeout=1)
            connection.terminate()

    async def end_crashed_sessions(self, instance: str, before: Micros) -> int:
        """End this instance's sessions that began before this process and never said how they ended."""
        connection = await self.open()
        async with self._guarded(connection):
            status = await connection.execute(QUERIES["end_crashed_sessions"], instance, _timestamp(before))
        return _count(status)

    async def write(self, batches: Sequence[Batch]) -> Written:
        """Commit batches, oldest first, in one transaction. To write them again changes nothing."""
        connection = await self.open()
        await self._make_partitions(connection, batches)
        if self._clock.monotonic() >= self._staged_until:
            try:
                return await self._transaction(connection, batches, staged=False)
            except StoreError as error:
                match judge(error):
                    case Remedy.STAGED:
                        self._staged_until = self._clock.monotonic() + STAY_STAGED
                    case Remedy.MAKE_PARTITION:
                        self._months.clear()
                        raise
                    case _:
                        raise
        if not self._has_staging:
            async with self._guarded(connection):
                await connection.execute(QUERIES["make_staging"])
            self._has_staging = True
        return await self._transaction(connection, batches, staged=True)

    async def _transaction(self, connection: asyncpg.Connection, batches: Sequence[Batch], *, staged: bool) -> Written:
        written = Written()
        async with self._guarded(connection), connection.transaction():
            for _, group in groupby(batches, key=lambda batch: batch.session.id):
                part = await _write_session(connection, list(group), staged=staged)
                written = Written(
                    written.batches + part.batches,
                    written.ticks + part.ticks,
                    written.duplicates + part.duplicates,
                    written.rejected + part.rejected,
                )
        return written

    async def _make_partitions(self, connection: asyncpg.Connection, batches: Sequence[Batch]) -> None:
        """Make the partitions of the ticks' months and of the months ahead, in transactions of their own."""
        today = (_EPOCH + timedelta(microseconds=self._clock.wall())).date()
        needed = {month for batch in batches for month in batch.months} | set(months_ahead(today))
        for month in sorted(needed - self._months):
            async with self._guarded(connection):
                await connection.execute(QUERIES["ensure_partition"], month)
            self._months.add(month)

    @contextlib.asynccontextmanager
    async def _guarded(self, connection: asyncpg.Connection) -> AsyncIterator[None]:
        """Translate the driver's errors, and give up a server that does not answer in time.

        `terminate` is the only way out of a connection whose peer is gone: cancelling would first ask the server
        to cancel, and a rollback would wait for it again.
        """
        timer = asyncio.get_running_loop().call_later(self._write_timeout, connection.terminate)
        try:
            yield
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as exc:
            if not isinstance(exc, asyncpg.PostgresError) or connection.is_closed():
                connection.terminate()
            raise _translated(exc) from exc
        finally:
            timer.cancel()


async def _write_session(connection: asyncpg.Connection, batches: Sequence[Batch], *, staged: bool) -> Written:
    """Write what of one session's batches is not committed yet, inside the caller's transaction."""
    session = batches[0].session
    last_batch = await connection.fetchval(QUERIES["lock_session"], session.id)
    if last_batch is None:
        await connection.execute(
            QUERIES["begin_session"],
            session.id,
            session.instance,
            session.endpoint,
            _timestamp(session.connected_at),
            session.kind,
        )
        last_batch = await connection.fetchval(QUERIES["lock_session"], session.id)
    batches = [batch for batch in batches if batch.number > last_batch]
    if not batches:
        return Written()

    ticks = sum(batch.count for batch in batches)
    inserted = await _copy(connection, batches, staged=staged) if ticks else 0
    rejections = [
        (session.id, batch.number, r.position, _timestamp(r.received_at), r.reason, r.raw, r.raw_bytes)
        for batch in batches
        for r in batch.rejections
    ]
    if rejections:
        await connection.executemany(QUERIES["reject"], rejections)
    written = Written(len(batches), ticks, ticks - inserted, len(rejections))
    await _advance(connection, batches[-1], written)
    return written


async def _copy(connection: asyncpg.Connection, batches: Sequence[Batch], *, staged: bool) -> int:
    """Send the rows as they are; return how many of them are new."""
    status = await connection.copy_to_table(
        "ticks_staged" if staged else "ticks",
        schema_name="pg_temp" if staged else "market",
        columns=COLUMNS,
        source=_body(batches),
        format="binary",
    )
    return _count(await connection.execute(QUERIES["insert_staged"]) if staged else status)


async def _body(batches: Sequence[Batch]) -> AsyncIterator[bytes]:
    yield COPY_HEADER
    for batch in batches:
        yield batch.rows
    yield COPY_TRAILER


async def _advance(connection: asyncpg.Connection, last: Batch, written: Written) -> None:
    """Record the last batch's coverage, which contains that of the batches before it, and the counts."""
    end = last.end
    await connection.execute(
        QUERIES["advance_session"],
        last.session.id,
        _timestamp(last.authenticated_at),
        _timestamp(last.covered_until),
        _timestamp(last.last_message_at),
        last.number,
        _timestamp(end.at if end else None),
        end.reason if end else None,
        end.close_code if end else None,
        written.ticks,
        written.duplicates,
        written.rejected,
    )


async def _check_schema(connection: asyncpg.Connection) -> None:
    try:
        revision = await connection.fetchval(QUERIES["schema_revision"])
        minimum = await connection.fetchval(QUERIES["minimum_version"]) if revision else None
    except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError) as exc:
        raise SchemaError("The database has no schema of ingestor yet.", hint=MIGRATE) from exc
    check_revision(revision, minimum)


def check_revision(revision: str | None, minimum_version: str | None) -> None:
    """Raise SchemaError where this version of the daemon can't write to that revision of the schema.

    A newer schema is accepted, unless it names a higher minimum version of the daemon.
    """
    if revision is None:
        raise SchemaError("The database has no schema of ingestor yet.", hint=MIGRATE)
    if revision < SCHEMA_REVISION:
        raise SchemaError(
            f"The database's schema is at {revision}, and this version needs {SCHEMA_REVISION}.", hint=MIGRATE
        )
    if minimum_version is not None and _version(minimum_version) > _version(__version__):
        raise SchemaError(
            f"The database's schema needs ingestor {minimum_version} or newer; this is {__version__}.",
            hint="Upgrade ingestor.",
        )


def months_ahead(today: date) -> Iterator[date]:
    """Yield the first days of this month and of the next `MONTHS_AHEAD`."""
    first = today.replace(day=1)
    for _ in range(MONTHS_AHEAD + 1):
        yield first
        first = (first + timedelta(days=31)).replace(day=1)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _timestamp(instant: Micros | None) -> datetime | None:
    return None if instant is None else _EPOCH + timedelta(seconds=instant // SECOND, microseconds=instant % SECOND)


def _count(status: str) -> int:
    """Return the number at the end of a command's status, such as `COPY 5000` or `INSERT 0 12`."""
    return int(status.rsplit(" ", 1)[1])


def _translated(exc: Exception) -> StoreError:
    if isinstance(exc, asyncpg.PostgresError):
        return StoreError(
            f"The database answered: {exc.args[0] if exc.args else type(exc).__name__} ({exc.sqlstate}).",
            sqlstate=exc.sqlstate,
            constraint=getattr(exc, "constraint_name", None),
            hint=hint(exc.sqlstate),
        )
    return StoreError(f"The connection to the database broke: {str(exc) or type(exc).__name__}")
