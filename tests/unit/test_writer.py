from __future__ import annotations

import asyncio
import socket
from uuid import UUID

from ingestor.buffer.fifo import Buffer
from ingestor.model import Batch, Session
from ingestor.service.writer import Writer
from ingestor.store.ticks import TickStore
from ingestor.telemetry.events import Telemetry
from tests.clocks import HANG_SECONDS, ManualClock

SESSION = Session(UUID(int=1), "test", "ws://localhost/ws", 0)


class CountedClock(ManualClock):
    """Records how long it was asked to sleep."""

    def __init__(self) -> None:
        super().__init__()
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0)
        await super().sleep(seconds)


async def test_an_unavailable_database_is_retried_without_limit() -> None:
    """The first retry comes within a second, later ones every five seconds at most, without an end."""
    with socket.create_server(("127.0.0.1", 0)) as reader:
        port = reader.getsockname()[1]
    firsts: list[float] = []
    longest = 0.0
    for _ in range(5):
        clock, telemetry = CountedClock(), Telemetry()
        buffer = Buffer(memory_max_bytes=2**20, clock=clock, telemetry=telemetry)
        buffer.put(Batch(SESSION, 1))
        store = TickStore(f"postgresql://none@127.0.0.1:{port}/none", write_timeout=5, clock=clock)
        writer = Writer(store, buffer=buffer, clock=clock, telemetry=telemetry, instance="test")
        task = asyncio.create_task(writer.run())
        async with asyncio.timeout(HANG_SECONDS):
            while len(clock.slept) < 40:
                await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert telemetry.counts.write_failures >= 40
        assert len(buffer.in_memory) == 1
        firsts.append(clock.slept[0])
        longest = max(longest, *clock.slept)
    assert max(firsts) < 1
    assert 3 < longest <= 5
