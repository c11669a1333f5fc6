"""Publishing and reading with real NATS servers: each message has its place, and is read once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest

from ingestor.clock import SystemClock
from ingestor.jetstream.link import Link
from ingestor.jetstream.outlet import Outlet, SequenceError
from ingestor.jetstream.reader import Received, StreamReader
from ingestor.jetstream.setup import prepare_stream
from ingestor.model import Batch, Session
from ingestor.settings import Settings
from tests.clocks import HANG_SECONDS
from tests.nats_servers import Cluster, api, buffer_settings, connected, running_cluster


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """Yield one server."""
    async with running_cluster(tmp_path / "nats") as cluster:
        yield cluster


@contextlib.asynccontextmanager
async def linked(settings: Settings) -> AsyncIterator[Link]:
    """Yield a link with a prepared stream."""
    link = Link(settings, name="test", on_change=lambda _: None)
    running = asyncio.create_task(link.run())
    try:
        assert await link.wait(HANG_SECONDS)
        await prepare_stream(link, settings)
        yield link
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def new_session() -> Session:
    return Session(uuid4(), "test", "ws://localhost/ws", 5)


def batch(session: Session, number: int, *, before: int | None = None, size: int = 100) -> Batch:
    return Batch(session, number, b"r" * size, 1, messages_before=number - 1 if before is None else before)


async def read_all(reader: StreamReader, count: int) -> list[Received]:
    """Read so many messages."""
    found: list[Received] = []
    async with asyncio.timeout(HANG_SECONDS):
        while len(found) < count:
            found += await reader.read(0.5)
    return found


async def test_batches_are_read_as_published(cluster: Cluster) -> None:
    """Batches come out in order, equal to what was published, large ones too."""
    settings = buffer_settings(cluster)
    async with linked(settings) as link:
        outlet, reader = Outlet(link, "ingestor"), StreamReader(link, "ingestor", SystemClock())
        session = new_session()
        outlet.expect(session.id, 0)
        batches = [batch(session, 1), batch(session, 2, size=3 * 2**20), batch(session, 3)]
        for each in batches:
            await outlet.publish([each])
        found = await read_all(reader, 3)
        assert [each.batches for each in found] == [(each,) for each in batches]
        assert (await outlet.last_message(session.id)).batch == 3
        assert (await reader.state()).last == reader.position > 3


async def test_a_message_out_of_order_is_refused(cluster: Cluster) -> None:
    """A message that does not follow the session's last one is refused; a repeated one is not stored again."""
    settings = buffer_settings(cluster)
    async with linked(settings) as link:
        outlet = Outlet(link, "ingestor")
        session = new_session()
        outlet.expect(session.id, 0)
        first = await outlet.publish([batch(session, 1)])
        outlet.expect(session.id, 0)
        with contextlib.suppress(SequenceError):  # servers without a cluster look at the order first
            assert await outlet.publish([batch(session, 1)]) == first
        outlet.expect(session.id, first + 7)
        with pytest.raises(SequenceError):
            await outlet.publish([batch(session, 2)])
        last = await outlet.last_message(session.id)
        assert (last.batch, last.sequence) == (1, first)
        async with connected(cluster) as client:
            assert (await api(client, "STREAM.INFO.ingestor"))["state"]["messages"] == 1
