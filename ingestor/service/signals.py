"""SIGTERM and SIGINT: the first asks for an orderly stop, the second for an immediate one."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Two events: `stop`, and `hurry` for a person who does not want to wait."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()

    def __call__(self) -> None:
        """Take note of one signal."""
        (self.hurry if self.stop.is_set() else self.stop).set()

    async def pause(self, seconds: float) -> None:
        """Wait so long, or until a stop is asked for."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.stop.wait()


@contextlib.contextmanager
def handled() -> Iterator[StopRequest]:
    """Turn the signals into a `StopRequest` while the block runs."""
    request = StopRequest()
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, request)
    try:
        yield request
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)
