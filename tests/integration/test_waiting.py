"""A command that waits for a database lock names the lock, its holder and the remedy."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import asyncpg
import pytest
import structlog

from ingestor.admin.maintenance import maintain
from ingestor.admin.migrate import migrate
from ingestor.settings import load_settings
from ingestor.store import waiting
from ingestor.store.connect import connect
from ingestor.store.gaps import GapStore
from ingestor.store.ticks import TickStore
from tests.clocks import HANG_SECONDS
from tests.integration.test_store import batcher, filled, tick
from tests.pooler import Pooler
from tests.recording import recording, stored
from tests.servers import TestServer


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "SOON", 0.05)


@pytest.fixture
async def holder(database: str) -> AsyncIterator[asyncpg.Connection]:
    """Hold locks in another transaction until the test's end."""
    connection = await connect(database, application_name="a hasty admin")
    await connection.execute("BEGIN")
    yield connection
    await connection.close()


async def work(what: str, owner: str, writer: str) -> None:
    """Run the work by the owner's URL or the writer's."""
    match what:
        case "migrate":
            await migrate(owner, load_settings(), lambda _: None)
        case "maintain":
            await maintain(load_settings(database_url=owner, retention="3650d"), lambda _: None)
        case "write":
            store = TickStore(writer, write_timeout=60)
            await store.write([filled(batcher(), tick())])
            await store.close()
        case "backfill":
            async with GapStore(writer) as gap_store:
                await gap_store.forget_needless()


async def said(
    caplog: pytest.LogCaptureFixture, doing: Awaitable[None], release: Callable[[], Awaitable[object]]
) -> str:
    """Return the first line that is reported during the work; then let the work end."""
    task = asyncio.ensure_future(doing)
    async with asyncio.timeout(HANG_SECONDS):
        while not (lines := [each.getMessage() for each in caplog.records if each.name == "ingestor.locks"]):
            assert not task.done(), task
            await asyncio.sleep(0.01)
        await release()
        await task
    return lines[0]


@pytest.mark.usefixtures("bundled_calendar")
@pytest.mark.parametrize("is_pooled", [False, True], ids=["direct", "pooled"])
@pytest.mark.parametrize(
    ("what", "lock", "words"),
    [
        ("migrate", "SELECT pg_advisory_xact_lock(7306354014)", "the turn to migrate"),
        ("maintain", "SELECT pg_advisory_xact_lock(7306354015)", "the turn to maintain"),
        ("maintain", "LOCK TABLE ingest.trading_sessions", "the table ingest.trading_sessions"),
        (
            "write",
            "SELECT pg_advisory_xact_lock(hashtext('market.ticks'))",
            "s' turn, which",
        ),  # "writer" is a password here
        ("write", "LOCK TABLE market.ticks", "the table market.ticks"),
        ("backfill", "SELECT pg_advisory_xact_lock(hashtext('ingest.backfills'))", "the turn of backfills"),
    ],
)
async def test_a_wait_names_the_lock_and_its_holder(
    database: str,
    server: TestServer,
    holder: asyncpg.Connection,
    caplog: pytest.LogCaptureFixture,
    what: str,
    lock: str,
    words: str,
    is_pooled: bool,
) -> None:
    """One line names the process to end, however the database is reached."""
    caplog.set_level(logging.WARNING)
    await holder.execute(lock)
    pooler = Pooler(server.url, size=4, users={server.prefix: "writer"})
    owner, writer = database, server.writer_url(database)
    try:
        if is_pooled:
            pooler.start()
            owner, writer = pooler.url(owner), pooler.url(writer)
        line = await said(caplog, work(what, owner, writer), lambda: holder.execute("ROLLBACK"))
    finally:
        pooler.close()
    assert words in line  # "writer" is a password here, so it is redacted
    assert f"process {holder.get_server_pid()} (a hasty admin, user " in line
    assert f"SELECT pg_terminate_backend({holder.get_server_pid()})" in line


async def test_the_daemon_logs_a_wait(writer_url: str, database: str, holder: asyncpg.Connection) -> None:
    """The daemon's event names the lock and its holder, and the ticks are stored once the lock is free."""
    with structlog.testing.capture_logs() as lines:
        async with recording(writer_url) as (market, _):
            await holder.execute("LOCK TABLE market.ticks")
            market.trade()
            async with asyncio.timeout(HANG_SECONDS):
                while not (waits := [line for line in lines if line["event"] == "lock_waited"]):
                    await asyncio.sleep(0.02)
            await holder.execute("ROLLBACK")
            await stored(database, market)
    assert waits[0]["log_level"] == "warning"
    assert "the table market.ticks (RowExclusiveLock), which is held by" in waits[0]["detail"]
    assert f"process {holder.get_server_pid()} (a hasty admin, user " in waits[0]["detail"]


def test_a_long_wait_is_logged_at_growing_intervals() -> None:
    """Each interval is twice the last one; another lock is reported at once."""
    lines: list[str] = []
    watch = waiting.LockWatch("", lines.append)
    for seconds in (0.04, 0.06, 0.1, 0.13, 0.2, 0.27):
        watch._say([waiting.LockWait(1, "the turn to migrate", "process 2", 2, seconds)])
    assert len(lines) == 3
    watch._say([waiting.LockWait(1, "the writers' turn", "process 2", 2, 0.06)])
    assert len(lines) == 4
