"""Recorder, NATS and writer as real processes: faults between the stream and the database, and the rows after them."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from ingestor.clock import SystemClock
from ingestor.errors import BufferUnavailableError
from ingestor.jetstream.reader import StreamReader
from ingestor.service.process import StopRequest
from ingestor.service.write import WriteService
from ingestor.simulator.server import TOKEN, Simulator
from tests.clocks import HANG_SECONDS
from tests.nats_servers import Cluster, api, buffer_settings, connected, linked, running_cluster
from tests.processes import DaemonProcess, WriteProcess
from tests.proxy import Proxy
from tests.recording import COUNT, ENDS, Market, stored, until
from tests.servers import execute_all, query

# The faults are those of NATS and of processes: an edition of the database changes nothing about them.
pytestmark = pytest.mark.parametrize("server", ["plain"], indirect=True)

_P = TypeVar("_P", bound=DaemonProcess)


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
        return self._start(
            DaemonProcess(
                self.directory / f"{name}.log",
                **self._settings(name)
                | {
                    "stream_url": self.simulator.stream_url,
                    "token": TOKEN,
                    "spool_dir": self.directory / name,
                    "exchange_calendar": "always",
                    "reconnect_max_delay": "100ms",
                    "heartbeat": "200ms",
                    "ping_interval": "200ms",
                    "ping_timeout": "2s",
                }
                | changes,
            )
        )

    def writer(self, name: str = "writer", **changes: Any) -> WriteProcess:
        """Return a writer, started."""
        return self._start(WriteProcess(self.directory / f"{name}.log", **self._settings(name) | changes))

    def _start(self, process: _P) -> _P:
        process.start()
        self.processes.append(process)
        return process

    def _settings(self, name: str) -> dict[str, Any]:
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


async def logged(process: DaemonProcess, text: str, *, times: int = 1) -> None:
    """Wait until a process has logged a text. The word `writer` is the login's password here, so the log hides it."""
    async with asyncio.timeout(HANG_SECONDS):
        while process.log.read_text(encoding="utf-8", errors="replace").count(text) < times:
            await asyncio.sleep(0.02)


async def in_stream(here: Site, ticks: int) -> dict[int, int]:
    """Wait until the stream has so many ticks; return the number of ticks of each message, by its sequence."""
    settings = buffer_settings(here.cluster)
    async with asyncio.timeout(HANG_SECONDS), linked(settings) as link:
        found: dict[int, int] = {}
        reader = StreamReader(link, settings.buffer_stream, SystemClock())
        while sum(found.values()) < ticks:
            with contextlib.suppress(BufferUnavailableError):
                found |= {each.sequence: sum(batch.count for batch in each.batches) for each in await reader.read(0.1)}
    return found


async def purge(cluster: Cluster) -> None:
    """Delete every message of the stream, as a leader does that had lost them."""
    async with connected(cluster) as client:
        await api(client, "STREAM.PURGE.ingestor")


async def trade(here: Site, parts: int = 10) -> None:
    """Trade in parts, which become batches of their own."""
    for _ in range(parts):
        here.market.trade()
        await asyncio.sleep(0.06)


async def test_ticks_go_through_the_stream(writer_url: str, database: str, tmp_path: Path) -> None:
    """Each tick has one row, the session ends in order, and recorder and writer stop in order with nothing left."""
    async with site(tmp_path, database, writer_url) as here:
        writer, recorder = here.writer(), here.recorder()
        await here.simulator.wait_connected()
        await trade(here)
        await stored(database, here.market)
        assert await asyncio.to_thread(recorder.stop) == 0, recorder.tail()
        await until(database, ENDS, "stopped")
        assert await asyncio.to_thread(writer.stop) == 0, writer.tail()
        assert "spool_not_empty" not in recorder.log.read_text(encoding="utf-8")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_another_writer_takes_over(
    number: signal.Signals, writer_url: str, database: str, tmp_path: Path
) -> None:
    """If the active writer is killed or frozen, another one commits; one that comes back writes nothing twice."""
    async with site(tmp_path, database, writer_url) as here:
        first = here.writer("first")
        await logged(first, "_active")
        second, _ = here.writer("second"), here.recorder()
        await logged(second, "_standby")
        await here.simulator.wait_connected()
        await trade(here)
        await stored(database, here.market)
        first.signal(number)
        await trade(here)
        await logged(second, "_active")
        await stored(database, here.market)
        if number == signal.SIGSTOP:
            first.signal(signal.SIGCONT)
            await logged(first, "_standby")
        await trade(here)
        await stored(database, here.market)


async def test_a_recorder_that_is_killed(writer_url: str, database: str, tmp_path: Path) -> None:
    """Its successor publishes the rest of the spool, nothing twice, and the writer ends the killed session."""
    async with site(tmp_path, database, writer_url) as here:
        recorder = here.recorder(spool_after="10ms")
        await here.simulator.wait_connected()
        await trade(here)
        await in_stream(here, here.market.sent)
        recorder.kill()
        here.writer()
        recorder.start()
        await logged(recorder, '"authenticated"', times=2)
        await trade(here)
        await stored(database, here.market)
        await until(database, ENDS, "crashed")


@pytest.mark.parametrize("loss", ["purged", "deleted", "wiped"])
async def test_a_stream_that_loses_acknowledged_messages(
    loss: str, writer_url: str, database: str, tmp_path: Path
) -> None:
    """The recorder keeps everything that is not committed, and publishes it again."""
    async with site(tmp_path, database, writer_url) as here:
        recorder = here.recorder()
        await here.simulator.wait_connected()
        await trade(here)
        await in_stream(here, here.market.sent)
        if loss == "purged":
            await purge(here.cluster)
        elif loss == "deleted":
            async with connected(here.cluster) as client:
                await api(client, "STREAM.DELETE.ingestor")
        else:
            (server,) = here.cluster.servers
            server.kill()
            server.wipe()
            server.start()
            await server.wait_ready()
        writer = here.writer()
        await trade(here)
        await stored(database, here.market)
        assert await asyncio.to_thread(recorder.stop) == 0, recorder.tail()
        await until(database, ENDS, "stopped")
        assert "buffer_hole_declared" not in writer.log.read_text(encoding="utf-8")


async def test_single_messages_that_the_stream_loses(writer_url: str, database: str, tmp_path: Path) -> None:
    """The writer finds each hole by the count of messages, and its recorder fills it."""
    async with site(tmp_path, database, writer_url) as here:
        here.recorder()
        await here.simulator.wait_connected()
        await trade(here)
        await in_stream(here, here.market.sent)
        async with connected(here.cluster) as client:
            state = (await api(client, "STREAM.INFO.ingestor"))["state"]
            for sequence in range(state["first_seq"] + 1, state["last_seq"], 3):
                await api(client, "STREAM.MSG.DELETE.ingestor", {"seq": sequence})
        writer = here.writer()
        await stored(database, here.market)
        assert "buffer_hole_found" in writer.log.read_text(encoding="utf-8")
        await trade(here)
        await stored(database, here.market)


async def test_a_loss_that_no_recorder_can_replace(writer_url: str, database: str, tmp_path: Path) -> None:
    """Messages that stream and recorder have lost are declared: the session covers nothing behind them."""
    async with site(tmp_path, database, writer_url) as here:
        recorder = here.recorder()
        await here.simulator.wait_connected()
        await trade(here)
        counts = await in_stream(here, here.market.sent)
        recorder.kill()
        shutil.rmtree(here.directory / "recorder")
        async with connected(here.cluster) as client:
            lost = list(counts)[3:5]
            for sequence in lost:
                await api(client, "STREAM.MSG.DELETE.ingestor", {"seq": sequence})
        settings = buffer_settings(here.cluster, database_url=writer_url, instance="writer")
        request = StopRequest()
        service = WriteService(settings, hole_seconds=0.2)
        running = asyncio.create_task(service.run(request))
        await until(database, COUNT, here.market.sent - sum(counts[sequence] for sequence in lost))
        ((covered, last),) = await query(
            database, "SELECT covered_until, last_tick_at FROM ingest.stream_sessions WHERE ticks > 0"
        )
        assert covered < last
        assert service.events.counts.holes_declared == 1
        request()
        await asyncio.wait_for(running, HANG_SECONDS)


async def test_a_database_that_lost_commits(writer_url: str, database: str, tmp_path: Path) -> None:
    """After a failover to a standby that lags, the writer reads the stream again: no tick is missing."""
    async with site(tmp_path, database, writer_url) as here:
        writer, _ = here.writer(), here.recorder()
        await here.simulator.wait_connected()
        await trade(here)
        await stored(database, here.market)
        await execute_all(
            database,
            "DELETE FROM market.ticks",
            "UPDATE ingest.stream_sessions SET last_batch = 0, ticks = 0, covered_until = authenticated_at",
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()",
        )
        await trade(here, 1)
        await logged(writer, "database_went_back")
        await stored(database, here.market)


@pytest.mark.parametrize("side", ["recorder", "writer"])
@pytest.mark.parametrize("fault", ["refuses", "silent"])
async def test_a_partition(side: str, fault: str, writer_url: str, database: str, tmp_path: Path) -> None:
    """A recorder or a writer that cannot reach NATS goes on where it was."""
    async with site(tmp_path, database, writer_url) as here, Proxy(here.cluster.servers[0].url) as proxy:
        changes = {"buffer_url": proxy.url}
        writer = here.writer(**(changes if side == "writer" else {}))
        recorder = here.recorder(**(changes if side == "recorder" else {}))
        await here.simulator.wait_connected()
        await trade(here)
        await stored(database, here.market)
        if fault == "refuses":
            proxy.refuses = True
            proxy.cut()
        else:
            proxy.hold()
        await trade(here)
        await logged(writer if side == "writer" else recorder, "buffer_unavailable")
        await trade(here)
        if fault == "refuses":
            proxy.refuses = False
        else:
            proxy.release()
        await stored(database, here.market)


@pytest.mark.parametrize("victim", ["leader", "follower"])
@pytest.mark.parametrize("fault", ["killed", "frozen"])
async def test_a_node_that_fails(victim: str, fault: str, writer_url: str, database: str, tmp_path: Path) -> None:
    """With three servers, recording and writing go on without one of them, and it catches up."""
    async with site(tmp_path, database, writer_url, servers=3) as here:
        here.writer()
        here.recorder()
        await here.simulator.wait_connected()
        await trade(here)
        await stored(database, here.market)
        leader = await here.cluster.leader()
        server = leader if victim == "leader" else next(each for each in here.cluster.servers if each is not leader)
        if fault == "killed":
            server.kill()
        else:
            server.freeze()
        await trade(here)
        await stored(database, here.market)
        if fault == "killed":
            server.start()
        else:
            server.thaw()
        await server.wait_ready()
        await trade(here)
        await stored(database, here.market)
