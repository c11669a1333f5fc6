"""The event loop as the driver is given it: no error of an operation that was cancelled is reported as a stray one."""

from __future__ import annotations

import asyncio
from typing import Any, cast


class _DriverLoop:
    """The running loop, except that an unread error of the driver's futures is not logged.

    A caller who waits for the driver gets the error in any case. If the caller is cancelled, the driver closes its
    transport, which then sets an error in a future without a waiter (`TLSUpgradeProto.on_data`, for
    example). asyncio would log it as "Future exception was never retrieved", beside the true cause of the stop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def create_future(self) -> asyncio.Future[Any]:
        """Return a future whose error counts as known. Called by the driver."""
        future = self._loop.create_future()
        future.add_done_callback(_retrieve)
        return future


def driver_loop() -> asyncio.AbstractEventLoop:
    """Return the running loop for the driver."""
    return cast("asyncio.AbstractEventLoop", _DriverLoop(asyncio.get_running_loop()))


def _retrieve(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()
