"""The whole: a market, a recorder, Patroni, and with the replicated buffer three NATS servers and two writers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ingestor.admin.migrate import migrate
from ingestor.buffer.spool import Spool
from ingestor.model import Micros
from ingestor.settings import load_settings
from ingestor.simulator.market import Market
from ingestor.simulator.server import TOKEN, Simulator, now
from ingestor.store.connect import connect
from tests.chaos.audit import Verdict, audit
from tests.cluster.patroni import PatroniCluster
from tests.nats_servers import Cluster, new_cluster
from tests.processes import DaemonProcess, WriteProcess
from tests.proxy import Proxy
from tests.servers import query, with_parts

RATE = 2000.0
DATABASE = "ingestor_cluster"
WRITER = "ingestor_cluster_writer"
RECORDER = "recorder"
MARGIN = 1.5
SETTINGS = {
    "exchange_calendar": "always",
    "coverage_margin": f"{MARGIN}s",
    "heartbeat": "500ms",
    "ping_interval": "1s",
    "ping_timeout": "2s",
    "stall_timeout": "2s",
    "write_timeout": "2s",
    "spool_after": "200ms",
    "reconnect_max_delay": "500ms",
    "stop_timeout": "60s",
    "log_format": "json",
}
DRAIN_SECONDS = 180.0
"""Time within which everything must be committed after the last fault."""

SETTLE_SECONDS = 2.0
"""Time of undisturbed load before each fault."""

_COMMITS = """
SELECT DISTINCT (extract(epoch FROM pg_xact_commit_timestamp(xmin)) * 1000000)::bigint AS at
FROM market.ticks WHERE pg_xact_commit_timestamp(xmin) IS NOT NULL ORDER BY at
"""


@dataclass
class World:
    """Everything that runs. `cluster` and its parts outlast it; the rest is its own."""

    cluster: PatroniCluster
    url: str
    simulator: Simulator
    recorder: DaemonProcess
    spool: Path
    nats: Cluster | None = None
    writers: list[WriteProcess] = field(default_factory=list)
    recorder_wires: list[Proxy] = field(default_factory=list)
    writer_wires: list[list[Proxy]] = field(default_factory=list)
    """For each writer its wires to the NATS servers."""
    trading: asyncio.Task[None] | None = None

    async def trade(self, seed: int) -> None:
        """Trade without end."""
        market = Market(seed, RATE, now(), cycle=60)
        while True:
            self.simulator.send(market.until(now()))
            await asyncio.sleep(0.01)

    async def commits_advance(self) -> None:
        """Wait until ticks of this moment are committed."""
        since = now()
        async with asyncio.timeout(DRAIN_SECONDS):
            while True:
                with contextlib.suppress(Exception):  # the database may be between two primaries
                    async with asyncio.timeout(5):
                        ((newest,),) = await query(self.url, "SELECT max(received_at) FROM market.ticks")
                        if newest is not None and newest.timestamp() * 1e6 > since:
                            return
                assert self.recorder.is_running, self.recorder.tail()
                await asyncio.sleep(0.1)

    async def whole(self) -> None:
        """Wait until the cluster is whole, and ticks are committed as they come."""
        await self.cluster.whole()
        if self.nats is not None:
            for server in self.nats.servers:
                await server.wait_ready()
        await self.commits_advance()

    async def finish(self) -> None:
        """Stop the market, let everything be committed, and stop all processes in order."""
        if self.trading is not None:
            self.trading.cancel()
            await asyncio.gather(self.trading, return_exceptions=True)
        for _ in range(5):
            await asyncio.sleep(SETTLE_SECONDS)
            status = await asyncio.to_thread(self.recorder.stop)
            assert status == 0, f"the recorder ended with {status}: {self.recorder.tail()}"
            if not self._spooled():
                break
            self.recorder.start()
            await self.recorder.page()
            await asyncio.sleep(8)  # longer than the longest wait between two attempts
        else:
            raise AssertionError(f"the recorder does not finish its spool: {self.recorder.tail()}")
        for writer in self.writers:
            status = await asyncio.to_thread(writer.stop)
            assert status == 0, f"a writer ended with {status}: {writer.tail()}"

    def _spooled(self) -> int:
        spool = Spool(self.spool)
        spool.open()
        try:
            return spool.depth
        finally:
            spool.close()

    def memory(self) -> dict[str, float]:
        """Return the most memory (RSS, MB) that each process has had since its last start."""
        pids = {"recorder": self.recorder.pid, **{f"writer {n}": w.pid for n, w in enumerate(self.writers)}}
        for server in self.nats.servers if self.nats is not None else ():
            assert server.process is not None
            pids[f"NATS {server.name}"] = server.process.pid
        for node in self.cluster.nodes:
            pids[f"Patroni {node.name}"] = node.part.pid
        pids["etcd"] = self.cluster.etcd.pid
        return {name: _peak(pid) for name, pid in pids.items()}

    async def audit(self) -> Verdict:
        """Compare the database with everything that the market sent."""
        accounts = {RECORDER: self.simulator.accounts}
        return await audit(self.url, accounts, self.simulator.made_at, margin=MARGIN)

    async def commits(self) -> list[Micros]:
        """Return the moments at which ticks were committed, in order, on the database's clock, which is ours."""
        return [at for (at,) in await query(self.url, _COMMITS)]


def _peak(pid: int) -> float:
    """Return the most memory (RSS, MB) that a process has had."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1000


async def _database(cluster: PatroniCluster, settings: dict[str, Any]) -> tuple[str, str]:
    """Create a migrated database; return the URLs of its owner and of the daemons' login."""
    admin = await connect(cluster.url)
    try:
        await admin.execute(f"DROP DATABASE IF EXISTS {DATABASE} WITH (FORCE)")
        await admin.execute(f"DROP ROLE IF EXISTS {WRITER}")
        await admin.execute(f"CREATE DATABASE {DATABASE} TEMPLATE template0")
        owner = with_parts(cluster.url, database=DATABASE)
        await migrate(owner, load_settings(**settings), lambda _: None)
        await admin.execute(f"CREATE ROLE {WRITER} LOGIN PASSWORD 'writer' IN ROLE market_write")
    finally:
        await admin.close()
    return owner, with_parts(cluster.url, database=DATABASE, user=WRITER, password="writer")


async def _wires(stack: contextlib.AsyncExitStack, nats: Cluster) -> list[Proxy]:
    return [await stack.enter_async_context(Proxy(server.url)) for server in nats.servers]


def _buffer_url(wires: list[Proxy]) -> str:
    return ",".join(wire.url for wire in wires)


@contextlib.asynccontextmanager
async def world(
    cluster: PatroniCluster, directory: Path, *, seed: int, replicated: bool, module: str = "ingestor"
) -> AsyncIterator[World]:
    """Build the world on a cluster. With `replicated` batches pass through three NATS servers and two writers."""
    async with contextlib.AsyncExitStack() as stack:
        owner, login = await _database(cluster, SETTINGS)
        simulator = await stack.enter_async_context(
            Simulator(port=0, rate=0, record=True, faults=["replay"], max_streams=1000)
        )
        spool = directory / RECORDER
        settings = SETTINGS | {
            "stream_url": simulator.stream_url,
            "database_url": login,
            "token": TOKEN,
            "spool_dir": spool,
            "instance": RECORDER,
        }
        here = World(cluster, owner, simulator, DaemonProcess(directory / "recorder.log", **settings), spool)
        if replicated:
            await _replicate(stack, here, directory, settings)
        for process in (here.recorder, *here.writers):
            process.module = module
        for writer in here.writers:
            writer.start()
        stack.callback(here.recorder.end)
        here.recorder.start()
        await simulator.wait_connected()
        here.trading = asyncio.create_task(here.trade(seed), name="trade")
        stack.callback(here.trading.cancel)
        await here.whole()
        yield here


async def _replicate(stack: contextlib.AsyncExitStack, here: World, directory: Path, settings: dict[str, Any]) -> None:
    """Put three NATS servers and two writers between the recorder and the database."""
    here.nats = new_cluster(directory / "nats", 3)
    stack.callback(here.nats.end)
    await here.nats.start()
    here.recorder_wires = await _wires(stack, here.nats)
    through = {"buffer_url": _buffer_url(here.recorder_wires), "buffer_replicas": 3}
    here.recorder = DaemonProcess(directory / "recorder.log", **settings | through)
    for name in ("w0", "w1"):
        wires = await _wires(stack, here.nats)
        own = {"instance": name, "database_url": settings["database_url"], "buffer_url": _buffer_url(wires)}
        writer = WriteProcess(directory / f"{name}.log", **SETTINGS | {"buffer_replicas": 3} | own)
        stack.callback(writer.end)
        here.writers.append(writer)
        here.writer_wires.append(wires)
