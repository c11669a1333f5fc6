"""Says for which lock of the database this process waits, who holds it, and what to do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import asyncpg

from ingestor.errors import StoreError
from ingestor.redaction import outside_text
from ingestor.store.connect import connect, own_backends
from ingestor.store.queries import QUERIES
from ingestor.store.refusal import DRIVER_ERRORS

SOON = 2.0
"""Seconds of a wait before it is said. It is said again after twice as long each time."""

LOCK_QUERY_SECONDS = 5.0
"""Seconds for the look itself."""

NAME = "ingestor watch"

Tell: TypeAlias = Callable[[str], None]

_log = logging.getLogger("ingestor.locks")


@dataclass(frozen=True, slots=True)
class LockWait:
    """A lock that a connection of this process has waited for, for so many `seconds`, in words."""

    backend: int
    lock: str
    holders: str
    first: int
    seconds: float

    def __str__(self) -> str:
        """Return one line, with what to do."""
        end = f"; to end it: SELECT pg_terminate_backend({self.first})" if self.first else ""
        return (
            f"Waiting for {self.seconds:.0f} s for {self.lock}, which is held by {self.holders}. "
            f"It goes on when that transaction ends{end}."
        )


def warn(line: str) -> None:
    """Say a line on standard error, or in the log where there is one."""
    _log.warning("%s", line)


class LockWatch:
    """Looks, over a connection of its own, at what the others of this process wait for, from `start` until `stop`."""

    def __init__(self, url: str, tell: Tell = warn) -> None:
        self._url = url
        self._tell = tell
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._reported: dict[tuple[int, str], float] = {}

    def start(self) -> None:
        """Look from `SOON` on: what is quicker costs nothing but a timer."""
        self.stop()
        self._timer = asyncio.get_running_loop().call_later(SOON, self._begin)

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
        self._timer = self._task = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look within a block."""
        self.start()
        try:
            yield
        finally:
            self.stop()

    def _begin(self) -> None:
        self._task = asyncio.create_task(self._look_on(), name="lock watch")

    async def _look_on(self) -> None:
        while True:
            if any(own_backends()):  # without a connection there is nothing to wait for
                with contextlib.suppress(StoreError, TimeoutError, *DRIVER_ERRORS):
                    await self._look()
            await asyncio.sleep(SOON / 2)

    async def _look(self) -> None:
        """Look once. Between two looks no connection is kept: a server, or a role, may allow only one."""
        connection = await connect(self._url, timeout=LOCK_QUERY_SECONDS, application_name=NAME)
        try:
            async with asyncio.timeout(LOCK_QUERY_SECONDS), connection.transaction(isolation="read_committed"):
                waits = await lock_waits(connection)
            self._say(waits)
            await connection.close(timeout=1.0)
        finally:
            connection.terminate()

    def _say(self, waits: list[LockWait]) -> None:
        reported, self._reported = self._reported, {}
        for wait in waits:
            key = (wait.backend, wait.lock)
            again = reported.get(key, SOON)
            if wait.seconds >= again:
                self._tell(str(wait))
                again = 2 * wait.seconds
            self._reported[key] = again


async def lock_waits(connection: asyncpg.Connection) -> list[LockWait]:
    """Return what the connections of this process wait for. Those to a pooler are known by their names alone."""
    backends, names = own_backends()
    rows = await connection.fetch(QUERIES["lock_waits"], backends, names)
    return [
        LockWait(row["pid"], outside_text(row["lock"]), outside_text(row["holders"]), row["first"], row["seconds"])
        for row in rows
    ]
