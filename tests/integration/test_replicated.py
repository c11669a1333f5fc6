"""Recorder, NATS and writer as real processes, which fail between the stream and the database."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ingestor.simulator.server import TOKEN, Simulator
from tests.clocks import HANG_SECONDS
from tests.nats_servers import Cluster, running_cluster
from tests.processes import DaemonProcess, WriteProcess
from tests.recording import Market, stored, until


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
        settings = self._settings(name) | {
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
        process = WriteProcess(self.directory / f"{name}.log", **self._settings(name) | changes)
        self._start(process)
        return process

    def _start(self, process: DaemonProcess) -> None:
        process.start()
        self.processes.append(process)

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
