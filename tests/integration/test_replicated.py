"""Recorder, NATS and writer as real processes, which fail between the stream and the database."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ingestor.service.process import StopRequest
from ingestor.service.write import WriteService
from ingestor.settings import load_settings
from ingestor.simulator.server import TOKEN, Simulator
from ingestor.store.connect import connect
from tests.clocks import HANG_SECONDS
from tests.nats_servers import Cluster, api, connected, running_cluster
from tests.processes import DaemonProcess, WriteProcess
from tests.proxy import Proxy
from tests.recording import COUNT, Market, stored, until
from tests.servers import query


@dataclass
class Site:
    """A market, the servers, and processes that are ended after the test."""

    market: Market
    simulator: Simulator
    cluster: Cluster
    database: str
    writer_url: str
    directory: Path
    processes: list[DaemonProcess]

    def recorder(self, name: str = "recorder", **changes: Any) -> DaemonProcess:
        """Return a recorder, started."""
        settings = self.settings(name) | {
            "stream_url": self.simulator.stream_url,
            "token": TOKEN,
            "spool_dir": self.directory / name,
            "exchange_calendar": "always",
            "reconnect_max_delay": "100ms",
            "heartbeat": "200ms",
            "ping_interval": "200ms",
            "ping_timeout": "2s",
        }
        process = DaemonProcess(self.directory / f"{name}.log", **settings | changes)
        self._start(process)
        return process

    def writer(self, name: str = "writer", **changes: Any) -> WriteProcess:
        """Return a writer, started."""
        process = WriteProcess(self.directory / f"{name}.log", **self.settings(name) | changes)
        self._start(process)
        return process

    def _start(self, process: DaemonProcess) -> None:
        process.start()
        self.processes.append(process)

    def settings(self, name: str) -> dict[str, Any]:
        return {
            "instance": name,
            "database_url": self.writer_url,
            "buffer_url": self.cluster.url,
            "buffer_replicas": len(self.cluster.servers),
            "log_format": "json",
        }


@contextlib.asynccontextmanager
async def site(directory: Path, database: str, writer_url: str, servers: int = 1) -> AsyncIterator[Site]:
    """Run NATS and a market."""
    processes: list[DaemonProcess] = []
    async with running_cluster(directory / "nats", servers) as cluster, Simulator(port=0, rate=0) as simulator:
        try:
            yield Site(Market(simulator), simulator, cluster, database, writer_url, directory, processes)
        finally:
            for each in processes:
                each.end()


async def in_stream(here: Site, batches: int = 1) -> int:
    """Wait until the stream has so many messages, and return how many there are."""
    async with asyncio.timeout(HANG_SECONDS):
        while True:
            with contextlib.suppress(Exception):
                async with connected(here.cluster) as client:
                    found = int((await api(client, "STREAM.INFO.ingestor"))["state"]["messages"])
                    if found >= batches:
                        return found
            await asyncio.sleep(0.05)


async def trade(here: Site, batches: int = 20) -> None:
    """Send batches of ticks that are published one by one."""
    for _ in range(batches):
        here.market.trade()
        await asyncio.sleep(0.06)


async def no_gap_in_any_session(database: str) -> None:
    """Check that each session covers the time until its last message: the database lacks nothing of it."""
    rows = await query(
        database,
        "SELECT covered_until >= last_message_at FROM ingest.stream_sessions WHERE last_message_at IS NOT NULL",
    )
    assert rows
    assert all(row[0] for row in rows)


async def logged(process: DaemonProcess, text: str) -> None:
    """Wait until a process has logged a text."""
    async with asyncio.timeout(HANG_SECONDS):
        while text not in process.log.read_text(encoding="utf-8", errors="replace"):
            await asyncio.sleep(0.02)


async def test_ticks_go_through_the_stream(writer_url: str, database: str, tmp_path: Path) -> None:
    """Each tick has one row, the session ends in order, and recorder and writer stop in order with nothing left."""
    async with site(tmp_path, database, writer_url) as here:
        writer, recorder = here.writer(), here.recorder()
        await here.simulator.wait_connected()
        for _ in range(20):
            here.market.trade()
            await asyncio.sleep(0.02)
        await stored(database, here.market)
        assert await asyncio.to_thread(recorder.stop) == 0, recorder.tail()
        await until(database, "SELECT end_reason FROM ingest.stream_sessions", "stopped")
        assert await asyncio.to_thread(writer.stop) == 0, writer.tail()
        assert "spool_not_empty" not in recorder.log.read_text(encoding="utf-8")


async def test_the_spool_keeps_what_is_not_committed(writer_url: str, database: str, tmp_path: Path) -> None:
    """Without a writer, the recorder keeps everything on its disk although the stream has it; the writer ends that."""
    async with site(tmp_path, database, writer_url) as here:
        recorder = here.recorder()
        await here.simulator.wait_connected()
        await trade(here, 5)
        await in_stream(here, 5)
        assert await asyncio.to_thread(recorder.stop) == 0, recorder.tail()
        assert "spool_not_empty" in recorder.log.read_text(encoding="utf-8")
        assert await query(database, COUNT) == [(0,)]
        here.writer()
        await stored(database, here.market)
        recorder.start()  # finds its batches in the stream and in the database
        await logged(recorder, "spool_drained")


async def test_lost_messages_are_published_again(writer_url: str, database: str, tmp_path: Path) -> None:
    """Messages that the stream loses after it acknowledged them are published again: from the middle, and all."""
    async with site(tmp_path, database, writer_url) as here:
        recorder = here.recorder()
        await here.simulator.wait_connected()
        await trade(here)
        await in_stream(here, 15)
        async with connected(here.cluster) as client:
            for sequence in (1, 7, 8, 12):
                await api(client, "STREAM.MSG.DELETE.ingestor", {"seq": sequence})
        here.writer()
        await stored(database, here.market)
        await logged(recorder, "buffer_republishing")
        await no_gap_in_any_session(database)


async def test_a_lost_stream_is_made_again(writer_url: str, database: str, tmp_path: Path) -> None:
    """A stream that is deleted before the writer read it is created and filled again; a purged one is filled again."""
    async with site(tmp_path, database, writer_url) as here:
        recorder = here.recorder()
        await here.simulator.wait_connected()
        await trade(here, 10)
        await in_stream(here, 8)
        async with connected(here.cluster) as client:
            await api(client, "STREAM.DELETE.ingestor")
        await trade(here, 10)
        await in_stream(here, 8)
        async with connected(here.cluster) as client:
            await api(client, "STREAM.PURGE.ingestor")
        here.writer()
        await trade(here, 5)
        await stored(database, here.market)
        await no_gap_in_any_session(database)
        assert await asyncio.to_thread(recorder.stop) == 0


async def test_the_end_of_a_session_is_published_again(writer_url: str, database: str, tmp_path: Path) -> None:
    """The last messages of a recorder that has stopped, lost by the stream, are published by its next start."""
    async with site(tmp_path, database, writer_url) as here:
        recorder = here.recorder()
        await here.simulator.wait_connected()
        await trade(here, 5)
        await in_stream(here, 5)
        assert await asyncio.to_thread(recorder.stop) == 0
        async with connected(here.cluster) as client:
            last = (await api(client, "STREAM.INFO.ingestor"))["state"]["last_seq"]
            for sequence in range(last - 2, last + 1):
                await api(client, "STREAM.MSG.DELETE.ingestor", {"seq": sequence})
        here.writer()
        recorder.start()
        await stored(database, here.market)
        await until(database, "SELECT count(*) FROM ingest.stream_sessions WHERE end_reason = 'stopped'", 1)
        await no_gap_in_any_session(database)


async def test_a_hole_that_stays_is_a_gap(writer_url: str, database: str, tmp_path: Path) -> None:
    """If no recorder has what the stream lost, the rest is stored, and the session covers nothing from there on."""
    async with site(tmp_path, database, writer_url) as here:
        recorder = here.recorder()
        await here.simulator.wait_connected()
        await trade(here, 10)
        await in_stream(here, 10)
        recorder.kill()
        async with connected(here.cluster) as client:
            await api(client, "STREAM.MSG.DELETE.ingestor", {"seq": 5})
        request = StopRequest()
        configured = load_settings(**here.settings("writer") | {"write_http_port": 0, "http_port": 0})
        service = WriteService(configured, hole_seconds=0.5)
        running = asyncio.create_task(service.run(request))
        await until(database, "SELECT count(*) > 0 FROM market.ticks WHERE volume > 700", True)
        request()
        await running
        assert service.events.counts.holes_declared == 1
        ((covered, last, ticks),) = await query(
            database, "SELECT covered_until, last_message_at, ticks FROM ingest.stream_sessions"
        )
        assert covered < last
        assert 0 < ticks < here.market.sent


async def test_a_writer_takes_over(writer_url: str, database: str, tmp_path: Path) -> None:
    """When the active writer is killed, or frozen, the other one takes over; nothing is lost or stored twice."""
    async with site(tmp_path, database, writer_url) as here:
        first = here.writer("first")
        await logged(first, "_active")
        second = here.writer("second")
        await logged(second, "_standby")
        here.recorder()
        await here.simulator.wait_connected()
        trading = asyncio.create_task(trade(here, 150))
        await until(database, f"SELECT count(*) > 1000 FROM ({COUNT.replace('count(*)', '1')}) t", True)
        first.kill()
        await logged(second, "_active")
        await trading
        await stored(database, here.market)
        first.start()
        second.signal(signal.SIGSTOP)
        await trade(here, 10)
        await stored(database, here.market)
        second.signal(signal.SIGCONT)
        await trade(here, 5)
        await stored(database, here.market)
        await no_gap_in_any_session(database)


async def test_a_recorder_is_killed(writer_url: str, database: str, tmp_path: Path) -> None:
    """Batches that a killed recorder had published are stored once, and its session is ended as crashed."""
    async with site(tmp_path, database, writer_url) as here:
        here.writer()
        recorder = here.recorder()
        await here.simulator.wait_connected()
        for _ in range(3):
            await trade(here, 10)
            await stored(database, here.market)
            recorder.kill()
            await here.simulator.wait_connected(0)
            recorder.start()
            await here.simulator.wait_connected()
        await trade(here, 5)
        await stored(database, here.market)
        await until(database, "SELECT count(*) FROM ingest.stream_sessions WHERE end_reason = 'crashed'", 3)
        await no_gap_in_any_session(database)


async def test_nothing_is_said_before_the_commit(writer_url: str, database: str, tmp_path: Path) -> None:
    """While a commit hangs, the recorder gets no notice of it and keeps everything; then all is stored once."""
    async with site(tmp_path, database, writer_url) as here:
        here.writer()
        recorder = here.recorder()
        await here.simulator.wait_connected()
        await trade(here, 3)
        await stored(database, here.market)
        reported: list[int] = []

        async def note(message: Any) -> None:
            reported.append(json.loads(message.data)["last_batch"])

        locker = await connect(database)
        async with connected(here.cluster) as client:
            async with locker.transaction():
                await locker.execute("LOCK TABLE market.ticks IN ACCESS EXCLUSIVE MODE")
                await client.subscribe("ingestor.committed.*", cb=note)
                await client.flush()
                await trade(here, 3)
                await logged(recorder, "spooling")
                await client.flush()
                ((committed,),) = await query(database, "SELECT last_batch FROM ingest.stream_sessions")
                assert max(reported, default=0) <= committed
            await stored(database, here.market)
        await locker.close()
        await no_gap_in_any_session(database)


@pytest.mark.parametrize("fault", ["kill", "freeze"])
async def test_a_leader_fails(fault: str, writer_url: str, database: str, tmp_path: Path) -> None:
    """When the server that leads the stream is killed or frozen, the other two go on; nothing is lost or twice."""
    async with site(tmp_path, database, writer_url, servers=3) as here:
        here.writer()
        here.recorder()
        await here.simulator.wait_connected()
        await trade(here, 10)
        await stored(database, here.market)
        leader = await here.cluster.leader()
        trading = asyncio.create_task(trade(here, 100))
        if fault == "kill":
            leader.kill()
        else:
            leader.freeze()
        await trading
        await stored(database, here.market)
        if fault == "kill":
            leader.start()
        else:
            leader.thaw()
        await leader.wait_ready()
        await trade(here, 20)
        await stored(database, here.market)
        await no_gap_in_any_session(database)


async def test_partitions(writer_url: str, database: str, tmp_path: Path) -> None:
    """While recorder or writer cannot reach NATS, batches wait; then all are stored once."""
    async with (
        site(tmp_path, database, writer_url) as here,
        Proxy(here.cluster.url) as near,
        Proxy(here.cluster.url) as far,
    ):
        writer = here.writer(buffer_url=near.url)
        recorder = here.recorder(buffer_url=far.url)
        await here.simulator.wait_connected()
        await trade(here, 5)
        await stored(database, here.market)
        for proxy, process in ((near, writer), (far, recorder)):
            proxy.hold()
            proxy.refuses = True
            await trade(here, 10)
            await logged(process, "buffer_unavailable")
            proxy.refuses = False
            proxy.release()
            proxy.cut()
            await stored(database, here.market)
        await no_gap_in_any_session(database)
