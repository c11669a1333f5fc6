"""A backup of the database that can be restored under the daemons, without any later commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg

from ingestor.store.connect import connect
from ingestor.store.queries import QUERIES

_LOCK_TIMEOUT = "2s"
_DISCONNECT = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE application_name = 'ingestor' AND datname = current_database() AND pid <> pg_backend_pid()
"""
_LOCK = f"{QUERIES['lock_ticks']}; LOCK TABLE ingest.stream_sessions IN EXCLUSIVE MODE"
# The last statement is the step for relays of docs/how-to/operate.md.
_RESTORE = """
DELETE FROM market.ticks WHERE xmin::text::bigint > {transaction};
DELETE FROM ingest.rejected_messages WHERE xmin::text::bigint > {transaction};
DELETE FROM ingest.stream_sessions;
INSERT INTO ingest.stream_sessions SELECT * FROM pg_temp.sessions_then;
DELETE FROM ingest.tick_log WHERE xmin::text::bigint > {transaction};
UPDATE ingest.tick_log_state SET identity = gen_random_uuid()
"""


@dataclass(frozen=True)
class Backup:
    """The sessions' rows and the transaction that read them while writers waited.

    So every row of a later transaction was written after the backup, and every other row before it.
    """

    transaction: int
    sessions: Sequence[asyncpg.Record]

    @classmethod
    async def take(cls, url: str) -> Backup:
        """Read what a restore needs, as a superuser."""
        connection = await connect(url, application_name="chaos")
        try:
            async with connection.transaction():
                await _lock(connection)
                transaction = await connection.fetchval("SELECT pg_current_xact_id()::text::bigint")
                return cls(transaction, await connection.fetch("SELECT * FROM ingest.stream_sessions"))
        finally:
            connection.terminate()

    async def restore(self, url: str) -> None:
        """Restore the database, and end its clients' connections, as a real restore does."""
        connection = await connect(url, application_name="chaos")
        try:
            async with connection.transaction():
                await _lock(connection)
                await connection.execute(_DISCONNECT)
                await connection.execute(
                    "CREATE TEMPORARY TABLE sessions_then (LIKE ingest.stream_sessions) ON COMMIT DROP"
                )
                await connection.copy_records_to_table("sessions_then", records=map(tuple, self.sessions))
                await connection.execute(_RESTORE.format(transaction=self.transaction))
        finally:
            connection.terminate()


async def _lock(connection: asyncpg.Connection[Any]) -> None:
    """Let the writers wait. If one holds its locks on a dead connection, end that connection first.

    The writers' own lock comes first: behind a pooler a writer has a transaction id before it locks its session, and
    its rows would be taken for older ones.
    """
    await connection.execute(f"SET lock_timeout = '{_LOCK_TIMEOUT}'")
    try:
        async with connection.transaction():
            await connection.execute(_LOCK)
    except asyncpg.LockNotAvailableError:
        await connection.execute(_DISCONNECT)
        await connection.execute(_LOCK)
