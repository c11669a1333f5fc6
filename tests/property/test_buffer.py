from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from uuid import UUID

from hypothesis import given, settings
from hypothesis import strategies as st

from ingestor.buffer.fifo import Buffer
from ingestor.buffer.spool import Spool
from ingestor.clock import SystemClock
from ingestor.model import Batch, Session
from ingestor.telemetry.events import Telemetry

SESSION = Session(UUID(int=1), "test", "ws://localhost/ws", 0)
STEPS = st.sampled_from(["put", "put", "put", "take", "done", "fail", "secure", "die", "stop"])


async def opened(directory: Path) -> Buffer:
    buffer = Buffer(
        spool=Spool(directory),
        memory_max_bytes=2**30,
        spool_max_bytes=2**30,
        clock=SystemClock(),
        telemetry=Telemetry(),
    )
    await buffer.open()
    return buffer


async def check(directory: Path, steps: list[tuple[str, int]]) -> None:
    """Run the steps against a list of the uncommitted batches, of which only the spooled ones survive a crash."""
    buffer = await opened(directory)
    waiting: list[int] = []
    secured = taken = number = 0
    for step, size in steps:
        match step:
            case "put":
                number += 1
                buffer.put(Batch(SESSION, number, rows=b"x" * size, count=size))
                waiting.append(number)
            case "take" if waiting:
                found = [batch.number for batch in await buffer.take(max_rows=3 * size)]
                assert found == waiting[: len(found)]
                taken = len(found)
            case "done" if taken:
                await buffer.acknowledge()
                waiting, secured, taken = waiting[taken:], max(0, secured - taken), 0
            case "fail":
                buffer.write_failed()
            case "secure":
                assert await buffer.spool_all()
                secured = len(waiting)
            case "die" | "stop":
                if step == "stop":
                    assert await buffer.spool_all()
                    secured = len(waiting)
                await buffer.close()
                waiting, taken = waiting[:secured], 0
                buffer = await opened(directory)
                assert buffer.has_inherited is bool(waiting)
                assert buffer.spooled_batches == len(waiting)
    left: list[int] = []
    while buffer.size:
        left += [batch.number for batch in await buffer.take()]
        await buffer.acknowledge()
    assert left == waiting
    await buffer.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(STEPS, st.integers(1, 50)), max_size=40))
def test_order_through_failures(steps: list[tuple[str, int]]) -> None:
    """Through failures, spooling and crashes, batches come once and in order, and no spooled batch is missing."""
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(check(Path(directory), steps))
