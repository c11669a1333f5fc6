"""Follows the log of commits by a connection of its own, which waits for the notice of each commit."""

from __future__ import annotations

import asyncio
import contextlib
from uuid import UUID

from ingestor.errors import StoreError
from ingestor.store.connect import connect
from ingestor.store.connection import GuardedConnection
from ingestor.store.record import Entry, LogPosition, LogState, entries_after, log_state
from ingestor.store.registry import CHANNEL, prune, register, renew
from ingestor.store.version import check_schema

POLL_SECONDS = 1.0
"""The log is read after this time even without a notice."""

LEAVE_SECONDS = 2.0

POOLED_POLL_SECONDS = 0.05
"""The same behind a pooler, which delivers no notices."""


class LogFollower:
    """One registered relay. Raises StoreError if the connection fails; `open` then connects again."""

    def __init__(self, url: str, *, relay: UUID, instance: str, timeout: float) -> None:
        self._url = url
        self._relay = relay
        self._instance = instance
        self._timeout = timeout
        self._guarded: GuardedConnection | None = None
        self._notice = asyncio.Event()

    async def open(self) -> LogState:
        """Connect, register, listen for notices, and return the state of the log."""
        await self.close()
        connection = await connect(self._url, timeout=self._timeout, application_name="ingestor relay", read_write=True)
        self._guarded = guarded = GuardedConnection(connection, self._timeout)
        try:
            async with guarded as connection:
                async with connection.transaction(isolation="read_committed"):
                    await check_schema(connection)
                    is_registered = await renew(connection, self._relay, 0)
                if not is_registered:
                    await register(connection, self._relay, self._instance)
                connection.add_termination_listener(self._wake)
                if not guarded.is_pooled:
                    await connection.add_listener(CHANNEL, self._wake)
                async with connection.transaction(isolation="read_committed"):
                    return await log_state(connection)
        except BaseException:
            connection.terminate()
            raise

    async def read(self, position: LogPosition, mark: str) -> tuple[Entry, ...]:
        """Return the next entries behind a position. Raises CursorError as `entries_after`."""
        self._notice.clear()
        async with self._open() as connection:
            return await entries_after(connection, position, mark)

    async def wait(self) -> None:
        """Wait for the notice of a commit, or for a while."""
        try:
            async with asyncio.timeout(POOLED_POLL_SECONDS if self._open().is_pooled else POLL_SECONDS):
                await self._notice.wait()
        except TimeoutError:
            return

    async def report(self, clients: int) -> None:
        """Report that the relay is there, and prune the log. Registers again if it was silent for too long."""
        async with self._open() as connection:
            async with connection.transaction(isolation="read_committed"):
                is_registered = await renew(connection, self._relay, clients)
                await prune(connection)
            if not is_registered:
                await register(connection, self._relay, self._instance)

    async def leave(self) -> None:
        """Report that the relay stops and serves no client, if the server answers within `LEAVE_SECONDS`.

        The registration stays: with it the cursors of clients, which come back to a relay that starts meanwhile.
        """
        with contextlib.suppress(StoreError, TimeoutError):
            async with asyncio.timeout(LEAVE_SECONDS), self._open() as connection:
                await renew(connection, self._relay, 0)

    async def close(self) -> None:
        """Close the connection, at once if the server does not answer. The registration lasts for an hour."""
        guarded, self._guarded = self._guarded, None
        if guarded is not None:
            await guarded.close()

    def _open(self) -> GuardedConnection:
        if self._guarded is None or self._guarded.connection.is_closed():
            raise StoreError("The connection to the database is closed.")
        return self._guarded

    def _wake(self, *_: object) -> None:
        self._notice.set()
