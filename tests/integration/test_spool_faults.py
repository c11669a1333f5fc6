"""A bit of the spool is flipped between two processes: real processes, real signals, a real database."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ingestor.model import Micros, Tick
from ingestor.simulator.server import TOKEN, Simulator
from tests.clocks import HANG_SECONDS
from tests.processes import DaemonProcess
from tests.recording import COUNT, NOW, Market, received, recording, until
from tests.servers import TestServer, query
from tests.spools import ALL_FLIPS

NOWHERE = "postgresql://ingestor@127.0.0.1:9/market"
PAGE = 4096
COVERS = "ended_at IS NULL AND covered_until > authenticated_at"
NEW = 1_000_000
"""Volumes from here on belong to ticks that the second process receives."""


@dataclass(frozen=True)
class Leftovers:
    """The spools of two processes without a database: one was stopped, one killed. Both received the same `ticks`."""

    directory: Path
    sent_at: dict[int, Micros]
    """When each tick was sent; its volume identifies it."""


def process_of(simulator: Simulator, database: str, directory: Path, **changes: Any) -> DaemonProcess:
    settings = {
        "stream_url": simulator.stream_url,
        "token": TOKEN,
        "database_url": database,
        "exchange_calendar": "always",
        "spool_dir": directory,
        "instance": "daemon",
        "reconnect_max_delay": "100ms",
        "heartbeat": "100ms",
        "ping_interval": "100ms",
        "log_format": "json",
    }
    return DaemonProcess(directory.with_suffix(".log"), **{**settings, **changes})


async def leave(directory: Path) -> Leftovers:
    async with Simulator(port=0, rate=0, record=True, max_streams=2) as simulator:
        daemons = {name: process_of(simulator, NOWHERE, directory / name) for name in ("stopped", "killed")}
        try:
            for daemon in daemons.values():
                daemon.start()
            await simulator.wait_connected(2)
            market = Market(simulator)
            for _ in range(10):
                market.trade(50)
                await asyncio.sleep(0.06)
            async with asyncio.timeout(HANG_SECONDS):
                while not all((directory / name / "spool.db-wal").exists() for name in daemons):
                    await asyncio.sleep(0.05)
            await asyncio.sleep(0.5)
            daemons["killed"].kill()
            daemons["stopped"].signal(signal.SIGTERM)
            assert await asyncio.to_thread(daemons["stopped"].wait) == 0
        finally:
            for daemon in daemons.values():
                daemon.end()
        account = simulator.accounts[0]
        return Leftovers(directory, {tick.volume: at for tick, at in zip(account.ticks, account.sent_at, strict=True)})


@pytest.fixture(scope="module")
def leftovers(tmp_path_factory: pytest.TempPathFactory) -> Leftovers:
    """Make both spools, to be copied."""
    return asyncio.run(leave(tmp_path_factory.mktemp("leftovers")))


@dataclass(frozen=True)
class Flip:
    """A bit in a file of one of the spools. With `unavailable` the database becomes available only after the start."""

    state: str
    name: str
    offset: int | bytes
    """An offset, or a text of which the middle occurrence is damaged."""
    bit: int
    kept: bool = False
    unavailable: bool = False

    def do(self, directory: Path) -> None:
        content = bytearray((directory / self.name).read_bytes())
        offset = self.offset
        if isinstance(offset, bytes):
            places = [found.start() for found in re.finditer(offset, content)]
            offset = places[len(places) // 2]
        content[offset] ^= 1 << self.bit
        (directory / self.name).write_bytes(content)


FLIPS: dict[str, Flip] = {
    "read-only by its header, without a database": Flip("stopped", "spool.db", 18, 6, unavailable=True),
    "schema format": Flip("stopped", "spool.db", 47, 3),
    "first page of the log": Flip("killed", "spool.db-wal", 500, 3),
    "a batch": Flip("stopped", "spool.db", b"AIR.NZ", 5),
}
MORE_FLIPS: dict[str, Flip] = {
    "magic": Flip("stopped", "spool.db", 3, 0),
    "page size": Flip("stopped", "spool.db", 16, 1),
    "read version": Flip("stopped", "spool.db", 19, 7, unavailable=True),
    "pages": Flip("stopped", "spool.db", 28, 7),
    "version of the application": Flip("stopped", "spool.db", 60, 0, kept=True),
    "encoding": Flip("stopped", "spool.db", 59, 1),
    "tables": Flip("stopped", "spool.db", PAGE - 20, 7),
    "state of the queue": Flip("stopped", "spool.db", 4 * PAGE - 20, 0),
    "header of the log": Flip("killed", "spool.db-wal", 9, 0, unavailable=True),
    "middle of the log": Flip("killed", "spool.db-wal", 10 * (PAGE + 24) + 700, 2),
    "watermark": Flip("killed", "watermark", 9, 2, kept=True),
}
ALL = FLIPS | MORE_FLIPS


@pytest.fixture
def ended() -> Iterator[list[DaemonProcess]]:
    """Yield a list of processes that are ended after the test."""
    processes: list[DaemonProcess] = []
    yield processes
    for each in processes:
        each.end()


@pytest.mark.parametrize("name", ALL if ALL_FLIPS else FLIPS)
async def test_a_flipped_bit(
    name: str,
    leftovers: Leftovers,
    writer_url: str,
    database: str,
    server: TestServer,
    tmp_path: Path,
    ended: list[DaemonProcess],
) -> None:
    """The daemon sets the file aside with a log line, records, and covers nothing that was lost."""
    flip = ALL[name]
    directory = tmp_path / "spool"
    shutil.copytree(leftovers.directory / flip.state, directory)
    flip.do(directory)
    allow = f"ALTER DATABASE {database.rpartition('/')[2]} ALLOW_CONNECTIONS"
    if flip.unavailable:
        await server.run(f"{allow} false")
    async with Simulator(port=0, rate=0) as simulator:
        daemon = process_of(simulator, writer_url, directory)
        ended.append(daemon)
        daemon.start()
        await simulator.wait_connected()
        simulator.send([Tick("AIR.NZ", NOW, 0.5, NEW + number) for number in range(100)])
        if flip.unavailable:
            await asyncio.sleep(0.3)
            await server.run(f"{allow} true")
        await until(database, f"SELECT count(*) FROM market.ticks WHERE volume >= {NEW}", 100)
        # The session in which the damage was found covers nothing; the next one does.
        await until(database, f"SELECT count(*) > 0 FROM ingest.stream_sessions WHERE {COVERS}", True)
        daemon.signal(signal.SIGTERM)
        assert await asyncio.to_thread(daemon.wait) == 0
    lines = [json.loads(line) for line in daemon.log.read_text().splitlines()]
    damaged = [Path(line["set_aside_as"]) for line in lines if line["event"] == "spool_damaged"]
    assert damaged == list(directory.glob("spool-damaged-*.db"))
    assert len(damaged) == (not flip.kept)
    stored = {volume for (volume,) in await query(database, "SELECT volume FROM market.ticks")}
    lost = leftovers.sent_at.keys() - stored
    if flip.kept and flip.state == "stopped":
        assert not lost
    claimed = await query(
        database,
        "SELECT (extract(epoch FROM authenticated_at) * 1000000)::bigint, "
        "(extract(epoch FROM covered_until) * 1000000)::bigint FROM ingest.stream_sessions "
        "WHERE authenticated_at IS NOT NULL AND covered_until IS NOT NULL",
    )
    assert claimed
    assert not [
        at for volume, at in leftovers.sent_at.items() if volume in lost and any(a <= at <= b for a, b in claimed)
    ]


async def test_damage_while_recording(writer_url: str, database: str, server: TestServer) -> None:
    """From the damage on the running session covers nothing and keeps its ticks; the next session covers again."""
    name = database.rpartition("/")[2]
    async with recording(writer_url) as (market, daemon):
        market.trade()
        await until(database, COUNT, market.sent)
        await server.run(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        await server.run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        traded_at: list[datetime] = []
        for _ in range(3):
            spooled = daemon.buffer.spooled_batches
            traded_at.append(datetime.now(UTC))
            market.trade()
            async with asyncio.timeout(HANG_SECONDS):
                while daemon.buffer.spooled_batches == spooled:
                    await asyncio.sleep(0.02)
        # The writer holds the oldest batch already.
        remains = "SELECT min(position) FROM batches"
        daemon.buffer._spool._connection.execute(f"DELETE FROM batches WHERE position > ({remains})")
        before = daemon.telemetry.counts.messages
        market.trade()
        await received(daemon, before + 100)
        await server.run(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        await until(database, "SELECT count(*) FROM ingest.stream_sessions WHERE end_reason = 'spool_damaged'", 1)
        await until(database, "SELECT count(*) FROM ingest.stream_sessions WHERE covered_until IS NOT NULL", 2)
        assert daemon.telemetry.counts.spools_damaged == 1
    stored = {volume // 100 for (volume,) in await query(database, "SELECT volume FROM market.ticks")}
    lost = {1, 2, 3} - stored
    assert lost >= {2, 3}
    ends = await query(database, "SELECT end_reason, covered_until FROM ingest.stream_sessions ORDER BY connected_at")
    assert [reason for reason, _ in ends] == ["spool_damaged", "stopped"]
    assert ends[0][1] < traded_at[min(lost) - 1]
