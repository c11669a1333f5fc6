"""A connection that is given up when the server does not answer, with the driver's errors translated."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from types import TracebackType

import asyncpg

from ingestor.store.connect import is_pooled
from ingestor.store.refusal import DRIVER_ERRORS, translated
from ingestor.store.retry import RetryAction, classify
from ingestor.store.waiting import LockWatch

TERMINATE_GRACE_SECONDS = 0.5
"""Seconds after `terminate` in which the driver should have noticed."""

CLOSE_TIMEOUT_SECONDS = 1.0
"""Seconds for the server to close the connection."""


class GuardedConnection:
    """A connection to be used within `async with`, each time for `seconds` from the beginning or the last `renew`.

    `terminate` is the only way out of a connection whose peer is gone: cancelling would first ask the server to
    cancel, and a rollback would wait for it again. A COPY that waits for the peer to read does not notice that
    either, so it is cancelled then; the driver takes that badly, for it has no transport to say so to.

    `on_progress` is called at each beginning and `renew`; `watch` says for which lock it waits meanwhile. Raises
    StoreError for everything that the driver raises; the connection is closed where it can't be used again.
    """

    def __init__(
        self,
        connection: asyncpg.Connection,
        seconds: float,
        on_progress: Callable[[], None] | None = None,
        watch: LockWatch | None = None,
    ) -> None:
        self.connection = connection
        self._seconds = seconds
        self._on_progress = on_progress
        self._watch = watch
        self._deadline = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None
        self._given_up = False
        self._left = asyncio.Event()
        self._left.set()
        self._is_lost = False
        connection.add_termination_listener(self._lose)

    @property
    def is_pooled(self) -> bool:
        """Whether each transaction may have another session of the server."""
        return is_pooled(self.connection)

    def renew(self) -> None:
        """Restart the time limit: it is for a server that hangs, not for one that works."""
        if self._on_progress is not None:
            self._on_progress()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._expire)

    async def close(self) -> None:
        """Close the connection, at once if the server does not answer."""
        with contextlib.suppress(*DRIVER_ERRORS):
            await self.connection.close(timeout=CLOSE_TIMEOUT_SECONDS)
        self.connection.terminate()

    async def give_up(self) -> None:
        """Let go of the connection now, if it is in use, and wait until its user knows."""
        if not self._left.is_set():
            self._expire()
            await self._left.wait()

    def _expire(self) -> None:
        self._given_up = True
        self.connection.terminate()
        self._deadline.reschedule(asyncio.get_running_loop().time() + TERMINATE_GRACE_SECONDS)

    def _lose(self, _: object) -> None:
        """Give the user of a lost connection a moment to notice: a COPY that waits for the server to read does not."""
        if not self._given_up and not self._left.is_set() and not self._deadline.expired():
            self._is_lost = True
            self._deadline.reschedule(asyncio.get_running_loop().time() + TERMINATE_GRACE_SECONDS)

    async def __aenter__(self) -> asyncpg.Connection:
        """Begin to count."""
        self._deadline = asyncio.timeout(None)
        self._left.clear()
        await self._deadline.__aenter__()
        self.renew()
        if self._watch is not None:
            self._watch.start()
        return self.connection

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop counting, and translate."""
        if self._timer is not None:
            self._timer.cancel()
        if self._watch is not None:
            self._watch.stop()
        try:
            await self._deadline.__aexit__(kind, error, traceback)
        except TimeoutError as late:
            error = asyncpg.ConnectionDoesNotExistError() if self._is_lost else late
        finally:
            self._left.set()
        match error:
            case asyncio.CancelledError():  # the driver asks a server that may hang to cancel: let go of that too
                self.connection.terminate()
            case AttributeError() if self._given_up:  # the driver misses what `terminate` took from it
                raise translated(TimeoutError("the server was given up")) from error
            case asyncpg.PostgresError():
                refusal = translated(error)
                if classify(refusal) is RetryAction.RECONNECT:
                    self.connection.terminate()
                raise refusal from error
            case Exception() if isinstance(error, DRIVER_ERRORS):
                self.connection.terminate()
                raise translated(error) from error
