"""A few connections that read the record for many clients."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from ingestor.store.connect import connect
from ingestor.store.connection import GuardedConnection
from ingestor.store.record import Record


class RecordPool:
    """Lends connections, at most `size` at once, each for one short transaction of at most `timeout` seconds."""

    def __init__(self, url: str, *, size: int = 4, timeout: float = 60.0) -> None:
        self._url = url
        self._timeout = timeout
        self._slots = asyncio.Semaphore(size)
        self._idle: list[GuardedConnection] = []

    @contextlib.asynccontextmanager
    async def record(self) -> AsyncIterator[Record]:
        """Lend a connection. Raises StoreError if there is none, or it breaks while it is used."""
        async with self._slots:
            guarded = await self._connection()
            try:
                yield Record(guarded)
            finally:
                if guarded.connection.is_closed():
                    guarded.connection.terminate()
                else:
                    self._idle.append(guarded)

    async def close(self) -> None:
        """Close the connections that are not lent."""
        while self._idle:
            await self._idle.pop().close()

    async def _connection(self) -> GuardedConnection:
        while self._idle:
            guarded = self._idle.pop()
            if not guarded.connection.is_closed():
                return guarded
        connection = await connect(self._url, application_name="ingestor relay reader", read_write=True)
        return GuardedConnection(connection, self._timeout)
