from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from ingestor.buffer.fifo import Buffer
from ingestor.buffer.spool import Spool
from ingestor.clock import SystemClock
from ingestor.model import Batch, EndReason, Session, SessionEnd
from ingestor.telemetry.events import Telemetry
from tests.clocks import HANG_SECONDS
from tests.disks import fill, small_disk

SESSION = Session(UUID(int=1), "test", "ws://localhost/ws", 0)
OTHER = Session(UUID(int=2), "test", "ws://localhost/ws", 0)
LONG = 3600.0


def batch(number: int, count: int = 1, session: Session = SESSION, **changes: Any) -> Batch:
    return replace(Batch(session, number, rows=b"x" * 100 * count, count=count), **changes)


def in_memory(max_bytes: int = 2**20) -> Buffer:
    return Buffer(memory_max_bytes=max_bytes, clock=SystemClock(), telemetry=Telemetry())


@contextlib.asynccontextmanager
async def on_disk(directory: Path, **changes: Any) -> AsyncIterator[Buffer]:
    """Return a buffer with a spool, whose task is running."""
    defaults = {"memory_max_bytes": 2**20, "spool_max_bytes": 2**30, "spool_after": LONG, "telemetry": Telemetry()}
    buffer = Buffer(spool=Spool(directory), clock=SystemClock(), **{**defaults, **changes})
    await buffer.open()
    task = asyncio.create_task(buffer.run())
    try:
        yield buffer
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await buffer.close()


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(HANG_SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


def blocked(buffer: Buffer) -> EndReason | None:
    return buffer.blocked_by


def inherited(buffer: Buffer) -> bool:
    return buffer.has_inherited


async def numbers(buffer: Buffer, **limits: int) -> list[int]:
    return [each.number for each in await buffer.take(**limits)]


async def drained(buffer: Buffer) -> list[int]:
    """Acknowledge all batches; return their numbers in order."""
    found: list[int] = []
    while buffer.size:
        found += await numbers(buffer)
        await buffer.acknowledge()
    return found


async def test_first_in_first_out() -> None:
    """Batches leave in order of arrival, and only when they are acknowledged."""
    buffer = in_memory()
    batches = [batch(number) for number in range(1, 6)]
    for each in batches:
        buffer.put(each)
    assert await buffer.take(max_rows=3) == tuple(batches[:3])
    assert await buffer.take(max_rows=2) == tuple(batches[:2])
    assert len(buffer.in_memory) == 5
    await buffer.acknowledge()
    assert await buffer.take() == tuple(batches[2:])
    await buffer.acknowledge()
    assert (len(buffer.in_memory), buffer.size) == (0, 0)


async def test_limits_never_hold_back_a_single_batch() -> None:
    """A batch larger than the limits is taken alone."""
    buffer = in_memory()
    buffer.put(batch(1, 100))
    buffer.put(batch(2))
    assert await numbers(buffer, max_rows=10) == [1]
    assert await numbers(buffer, max_bytes=10) == [1]


async def test_take_waits() -> None:
    """`take` waits for the first batch."""
    buffer = in_memory()
    taking = asyncio.create_task(buffer.take())
    await asyncio.sleep(0)
    assert not taking.done()
    buffer.put(batch(1))
    assert [b.number for b in await taking] == [1]


async def test_high_and_low_mark() -> None:
    """A full buffer keeps what it gets, and has space again at 80 %."""
    buffer = in_memory(10 * batch(1).size)
    for number in range(1, 11):
        assert blocked(buffer) is None
        buffer.put(batch(number))
    assert blocked(buffer) is EndReason.BUFFER_FULL
    waiting = asyncio.create_task(buffer.wait_for_room())
    buffer.put(batch(11))
    assert len(buffer.in_memory) == 11
    for expected in (True, True, True, False):
        await buffer.take(max_rows=1)
        await buffer.acknowledge()
        await asyncio.sleep(0)
        assert (blocked(buffer) is not None) is expected
    await waiting


async def test_heartbeats_merge() -> None:
    """A heartbeat replaces the one before it: days without a database take no memory."""
    buffer = in_memory()
    buffer.put(batch(1, 0))  # the beginning of a session is no heartbeat
    for number in range(2, 1000):
        buffer.put(batch(number, 0))
    assert await numbers(buffer) == [1, 999]
    assert buffer.size == 2 * batch(1, 0).size


@pytest.mark.parametrize(
    "other",
    [batch(3), batch(3, 0, OTHER), batch(3, 0, end=SessionEnd(0, EndReason.CLOSED))],
    ids=["ticks", "another session", "an end"],
)
async def test_only_neighbouring_heartbeats_of_a_session_merge(other: Batch) -> None:
    """Only a neighbouring heartbeat of the same session is replaced."""
    buffer = in_memory()
    buffer.put(batch(2, 0))
    buffer.put(other)
    assert len(buffer.in_memory) == 2


async def test_a_heartbeat_being_written_is_followed_by_the_next() -> None:
    """A heartbeat that is being written is kept, and the newer one is written after it."""
    buffer = in_memory()
    buffer.put(batch(2, 0))
    await buffer.take()
    buffer.put(batch(3, 0))
    await buffer.acknowledge()
    assert await numbers(buffer) == [3]


async def test_wait_until_empty() -> None:
    """The buffer is empty when all batches are acknowledged, not when they are taken."""
    buffer = in_memory()
    await buffer.wait_until_empty()
    buffer.put(batch(1))
    waiting = asyncio.create_task(buffer.wait_until_empty())
    await buffer.take()
    await asyncio.sleep(0)
    assert not waiting.done()
    await buffer.acknowledge()
    await waiting


async def test_nothing_is_spooled_while_writes_succeed(tmp_path: Path) -> None:
    """While writes succeed, nothing goes to disk."""
    async with on_disk(tmp_path) as buffer:
        for number in range(1, 50):
            buffer.put(batch(number))
            assert await numbers(buffer) == [number]
            await buffer.acknowledge()
            await asyncio.sleep(0)
        assert buffer.spooled_batches == 0
        assert buffer._spool is not None
        assert buffer._spool.last == 0


async def test_a_failed_write_sends_everything_to_disk(tmp_path: Path) -> None:
    """After a failed write all batches go to disk, later ones too, until a write succeeds; the order is kept."""
    async with on_disk(tmp_path) as buffer:
        buffer.put(batch(1))
        taken = await buffer.take()
        buffer.put(batch(2))
        await asyncio.sleep(0.05)
        assert buffer.spooled_batches == 0
        buffer.write_failed()
        await eventually(lambda: buffer.spooled_batches == 2)
        buffer.put(batch(3))
        await eventually(lambda: buffer.spooled_batches == 3 and not buffer.in_memory)
        await asyncio.wait_for(buffer.wait_until_safe(), HANG_SECONDS)
        assert taken[0].number == 1
        await buffer.acknowledge()
        buffer.put(batch(4))
        await asyncio.sleep(0.05)
        assert [b.number for b in buffer.in_memory] == [4]
        assert await numbers(buffer) == [2, 3]
        await buffer.acknowledge()
        assert buffer.spooled_batches == 0
        assert await numbers(buffer) == [4]


async def test_a_slow_commit_sends_it_to_disk(tmp_path: Path) -> None:
    """A batch that is not committed in time goes to disk, and is removed from it by its commit."""
    async with on_disk(tmp_path, spool_after=0.05) as buffer:
        buffer.put(batch(1))
        await buffer.take()
        await eventually(lambda: buffer.spooled_batches == 1)
        buffer.put(batch(2))
        await buffer.acknowledge()
        assert buffer.spooled_batches == 0
        assert await numbers(buffer) == [2]
        await buffer.acknowledge()
        assert (buffer.spooled_batches, buffer.size) == (0, 0)


async def test_the_bound_of_memory_sends_it_to_disk(tmp_path: Path) -> None:
    """Batches over the limit of memory go to disk."""
    async with on_disk(tmp_path, memory_max_bytes=10 * batch(1).size) as buffer:
        for number in range(1, 10):
            buffer.put(batch(number))
        await asyncio.sleep(0.05)
        assert buffer.spooled_batches == 0
        buffer.put(batch(10))
        await eventually(lambda: buffer.spooled_batches == 10)
        assert blocked(buffer) is None
        assert await drained(buffer) == list(range(1, 11))


async def test_memory_is_bounded_though_the_disk_is_slow(tmp_path: Path) -> None:
    """Memory holds at most twice the limit, for a slow disk; then the stream must wait."""
    async with on_disk(tmp_path, memory_max_bytes=10 * batch(1).size) as buffer:
        for number in range(1, 21):  # without a turn of the spooler
            buffer.put(batch(number))
        assert blocked(buffer) is EndReason.BUFFER_FULL
        await eventually(lambda: blocked(buffer) is None)
        assert buffer.spooled_batches == 20


async def test_ticks_before_the_spool_is_open(tmp_path: Path) -> None:
    """The stream starts before a large spool is scanned; the old batches are written first and alone."""
    async with on_disk(tmp_path) as buffer:
        for number in range(1, 4):
            buffer.put(batch(number))
        assert await buffer.spool_all()
    settings: dict[str, Any] = {"memory_max_bytes": 2**20, "spool_max_bytes": 2**30}
    buffer = Buffer(spool=Spool(tmp_path), clock=SystemClock(), telemetry=Telemetry(), **settings)
    buffer.claim()
    buffer.put(batch(1, session=OTHER))
    buffer.put(batch(2, session=OTHER))
    await buffer.open()
    buffer.put(batch(3, session=OTHER))
    assert inherited(buffer)
    assert await buffer.spool_all()
    assert await numbers(buffer) == [1, 2, 3]
    await buffer.acknowledge()
    assert not inherited(buffer)
    assert await drained(buffer) == [1, 2, 3]
    await buffer.close()


async def test_space_is_given_back(tmp_path: Path) -> None:
    """When a large queue is drained, its file is shrunk during later work."""
    async with on_disk(tmp_path, spool_after=0.05) as buffer:
        for number in range(1, 101):
            buffer.put(batch(number, 2000))
        assert await buffer.spool_all()
        assert (tmp_path / "spool.db").stat().st_size > 10 * 2**20
        await drained(buffer)
        await eventually(lambda: (tmp_path / "spool.db").stat().st_size < 2 * 2**20)


async def test_unawaited_damage_is_reported(tmp_path: Path) -> None:
    """Damage that a cancelled reader found is still reported with the file's name, and counted."""
    telemetry = Telemetry()
    async with on_disk(tmp_path, telemetry=telemetry) as buffer:
        buffer.put(batch(1))
        assert await buffer.spool_all()
        assert buffer._spool is not None
        assert buffer._spool._connection is not None
        buffer._spool._connection.execute("UPDATE batches SET checksum = 0")
        taking = asyncio.create_task(buffer.take())
        await asyncio.sleep(0)  # it waits for the disk now
        while not buffer._spool.set_aside:
            time.sleep(0.001)  # noqa: ASYNC251 - the loop is not to hear of it before the cancellation
        taking.cancel()
    assert telemetry.counts.spools_damaged == 1


async def test_a_disk_that_damages_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the new file is damaged as well, the disk counts as failed: the ticks stay in memory."""
    async with on_disk(tmp_path) as buffer:
        assert buffer._spool is not None

        def append(_entries: object, **_: object) -> None:
            raise buffer._spool._set_aside("as ever")  # type: ignore[union-attr]

        monkeypatch.setattr(buffer._spool, "append", append)
        buffer.put(batch(1))
        assert not await buffer.spool_all()
        assert len(buffer.in_memory) == 1
        assert blocked(buffer) is EndReason.SPOOL_DAMAGED
        monkeypatch.undo()
        assert await buffer.spool_all()
        assert not len(buffer.in_memory)


async def test_a_successor_continues(tmp_path: Path) -> None:
    """The next process writes the spooled batches before any newer one."""
    async with on_disk(tmp_path) as buffer:
        for number in range(1, 4):
            buffer.put(batch(number))
        assert await buffer.spool_all()
    async with on_disk(tmp_path) as buffer:
        assert inherited(buffer)
        buffer.put(batch(1, session=OTHER))
        assert await numbers(buffer, max_rows=2) == [1, 2]
        await buffer.acknowledge()
        assert inherited(buffer)
        assert await numbers(buffer) == [3]
        await buffer.acknowledge()
        assert not inherited(buffer)
        assert [b.session for b in await buffer.take()] == [OTHER]
    async with on_disk(tmp_path) as buffer:
        assert not inherited(buffer)


async def test_heartbeats_merge_on_disk(tmp_path: Path) -> None:
    """A quiet weekend without a database takes one row, however the heartbeats were spooled."""
    async with on_disk(tmp_path) as buffer:
        buffer.write_failed()
        buffer.put(batch(1))
        for number in range(2, 8):
            buffer.put(batch(number, 0))
            await asyncio.wait_for(buffer.wait_until_safe(), HANG_SECONDS)
        assert buffer.spooled_batches == 2
        buffer.put(batch(8))
        buffer.put(batch(9, 0))
        await asyncio.wait_for(buffer.wait_until_safe(), HANG_SECONDS)
        assert await drained(buffer) == [1, 7, 8, 9]


async def test_the_bound_of_the_disk(tmp_path: Path) -> None:
    """At the limit of the spool the stream must stop, and may continue at 80 % of it; all batches are kept."""
    async with on_disk(tmp_path, spool_max_bytes=3000) as buffer:
        buffer.write_failed()
        number = 0
        while not blocked(buffer):
            number += 1
            buffer.put(batch(number))
            await asyncio.wait_for(buffer.wait_until_safe(), HANG_SECONDS)
        assert blocked(buffer) is EndReason.BUFFER_FULL
        assert 3000 <= buffer.spooled_bytes < 3300
        buffer.put(batch(number + 1, end=SessionEnd(0, EndReason.BUFFER_FULL)))
        found = []
        while blocked(buffer):
            assert buffer.spooled_bytes > 2400
            found += await numbers(buffer, max_rows=1)
            await buffer.acknowledge()
        assert buffer.spooled_bytes <= 2400
        assert found + await drained(buffer) == list(range(1, number + 2))


async def test_a_full_disk(tmp_path: Path) -> None:
    """The stream must stop when the ballast is used, and may continue when there is space for it again."""
    with contextlib.ExitStack() as stack:
        try:
            disk = stack.enter_context(small_disk(tmp_path / "disk", 80 * 2**20))
        except PermissionError as error:
            pytest.skip(str(error))
        async with on_disk(disk) as buffer:
            buffer.write_failed()
            buffer.put(batch(1, 60_000))
            await asyncio.wait_for(buffer.wait_until_safe(), HANG_SECONDS)
            filler = fill(disk)
            buffer.put(batch(2, 120_000))
            await eventually(lambda: blocked(buffer) is EndReason.DISK_FULL)
            buffer.put(batch(3, end=SessionEnd(0, EndReason.DISK_FULL)))
            await asyncio.wait_for(buffer.wait_until_safe(), HANG_SECONDS)
            fill(disk)
            buffer.put(batch(4, 10_000))  # larger than the free space
            await asyncio.sleep(0.1)
            assert [b.number for b in buffer.in_memory] == [4]
            assert blocked(buffer) is EndReason.DISK_FULL
            filler.unlink()
            await eventually(lambda: blocked(buffer) is None)
            assert await drained(buffer) == [1, 2, 3, 4]


async def test_a_full_disk_is_harmless_while_writes_succeed(tmp_path: Path) -> None:
    """With everything acknowledged the stream may continue although the disk is still full."""
    with contextlib.ExitStack() as stack:
        try:
            disk = stack.enter_context(small_disk(tmp_path / "disk", 80 * 2**20))
        except PermissionError as error:
            pytest.skip(str(error))
        async with on_disk(disk, spool_after=0.05) as buffer:
            fill(disk)
            buffer.put(batch(1, 60_000))
            await eventually(lambda: blocked(buffer) is EndReason.DISK_FULL)
            fill(disk)
            assert await drained(buffer) == [1]
            assert blocked(buffer) is None
            buffer.put(batch(2))
            assert blocked(buffer) is None
            assert await drained(buffer) == [2]


async def test_a_spool_that_breaks_with_all_that_there_was(tmp_path: Path) -> None:
    """If a damaged spool held all batches, the next batch is the next one to write."""
    async with on_disk(tmp_path) as buffer:
        buffer.write_failed()
        buffer.put(batch(1, end=SessionEnd(0, EndReason.CLOSED)))
        await asyncio.wait_for(buffer.wait_until_safe(), HANG_SECONDS)
        assert buffer._spool is not None
        assert buffer._spool._connection is not None
        buffer._spool._connection.execute("UPDATE batches SET checksum = 0")
        taking = asyncio.create_task(buffer.take())
        await asyncio.wait_for(buffer.wait_until_empty(), HANG_SECONDS)
        assert blocked(buffer) is None
        buffer.put(batch(1, session=OTHER, covered_until=50))
        assert [b.covered_until for b in await asyncio.wait_for(taking, HANG_SECONDS)] == [50]
        await buffer.acknowledge()
        assert await drained(buffer) == []


async def test_a_spool_that_breaks_before_an_append(tmp_path: Path) -> None:
    """A batch that is appended while the damage is being found covers nothing either."""
    async with on_disk(tmp_path) as buffer:
        buffer.put(batch(1, covered_until=10))
        assert await buffer.spool_all()
        assert buffer._spool is not None
        assert buffer._spool._connection is not None
        buffer._spool._connection.execute("UPDATE batches SET checksum = 0")
        buffer.put(batch(2, covered_until=20))
        taking = asyncio.create_task(buffer.take())
        assert await asyncio.create_task(buffer.spool_all())
        assert [b.covered_until for b in await asyncio.wait_for(taking, HANG_SECONDS)] == [None]
        assert [e.batch.covered_until for e in buffer._spool.read(0, 10, 10**6)] == [None]


async def test_a_spool_that_breaks(tmp_path: Path) -> None:
    """The batches of a damaged spool are lost, so the session covers nothing more, keeps its ticks, and ends."""
    async with on_disk(tmp_path) as buffer:
        buffer.write_failed()
        buffer.put(batch(1, covered_until=10))
        await asyncio.wait_for(buffer.wait_until_safe(), HANG_SECONDS)
        assert buffer._spool is not None
        assert buffer._spool._connection is not None
        buffer._spool._connection.execute("UPDATE batches SET checksum = 0")
        buffer.put(batch(2, covered_until=20))
        taking = asyncio.create_task(buffer.take())
        await eventually(lambda: blocked(buffer) is EndReason.SPOOL_DAMAGED)
        buffer.put(batch(3, covered_until=30))
        buffer.put(batch(4, covered_until=40, end=SessionEnd(41, EndReason.SPOOL_DAMAGED)))
        assert blocked(buffer) is None
        buffer.put(batch(1, session=OTHER, covered_until=50))
        found = list(await taking)
        await buffer.acknowledge()
        while buffer.size:
            found += await buffer.take()
            await buffer.acknowledge()
    coverage = {(b.session.id.int, b.number): b.covered_until for b in found if b.number > 1 or b.session == OTHER}
    assert coverage in (
        {(1, 2): None, (1, 3): None, (1, 4): None, (2, 1): 50},
        {(1, 3): None, (1, 4): None, (2, 1): 50},
    )
    assert len(list(tmp_path.glob("spool-damaged-*.db"))) == 1
