"""`make soak`: the daemon under a long load, without a database and then with one, or (`--steady`) always with one.

Prints its memory, file descriptors and tasks; ends with 1 if one of them exceeds its limit, or a tick is missing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ingestor.service.daemon import Daemon
from ingestor.service.process import StopRequest, return_large_blocks
from ingestor.settings import load_settings
from ingestor.simulator.server import TOKEN
from ingestor.telemetry.log import configure
from tests.servers import TestServer, plain_server, query

MEMORY_BOUND = 200 * 2**20
DRAIN_FACTOR = 10
SLACK = 8 * 2**20
"""Bytes by which memory may differ between the first and the last third of a steady run."""


@dataclass(frozen=True)
class Sample:
    """The process at one moment."""

    seconds: float
    resident: int
    descriptors: int
    tasks: int
    received: int
    spooled: int


class Soak:
    """A daemon in this process, sampled every second."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.samples: list[Sample] = []
        self._began = time.monotonic()

    async def watch(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Sample until the time is over or a condition is true, and print a line every ten seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not until():
            await asyncio.sleep(0.01)
            if self.samples and time.monotonic() < self._began + self.samples[-1].seconds + 1:
                continue
            self.samples.append(sample := self._look())
            if len(self.samples) % 10 == 0:
                print(
                    f"{sample.seconds:6.0f} s  {sample.resident / 2**20:6.1f} MiB  {sample.descriptors} descriptors  "
                    f"{sample.tasks} tasks  {sample.received:>10,} received  {sample.spooled / 2**20:7.1f} MiB on disk",
                    flush=True,
                )

    def _look(self) -> Sample:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return Sample(
            time.monotonic() - self._began,
            pages * os.sysconf("SC_PAGE_SIZE"),
            len(os.listdir("/proc/self/fd")),  # noqa: PTH208 - counted while it changes
            len(asyncio.all_tasks()),
            self.daemon.telemetry.counts.messages,
            self.daemon.buffer.spooled_bytes,
        )


class Market:
    """The simulator in a process of its own."""

    def __init__(self, rate: float, log: Path) -> None:
        self._log = log
        with log.open("wb") as file:
            # A day of one second: bursts are too short to matter, and the rate is that of every second.
            options = ["--port", "0", "--rate", str(rate), "--session", "1s"]
            self._process = subprocess.Popen([sys.executable, "-m", "ingestor", "simulate", *options], stdout=file)

    async def url(self) -> str:
        """Return its address."""
        while not (found := re.search(r"ws://\S+", self._log.read_text(encoding="utf-8"))):
            await asyncio.sleep(0.05)
        return found[0]

    def stop(self) -> int:
        """Stop it; return the number of sent ticks."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(30)
        found = re.search(r"Stopped after ([\d,]+) ticks", self._log.read_text(encoding="utf-8"))
        return int(found[1].replace(",", "")) if found else 0


@contextlib.contextmanager
def market(rate: float, directory: Path) -> Iterator[Market]:
    """Run the simulator for the block."""
    process = Market(rate, directory / "simulator.log")
    try:
        yield process
    finally:
        process.stop()


@contextlib.asynccontextmanager
async def soaking(server: TestServer, url: str, directory: Path, stream: str) -> AsyncIterator[Soak]:
    """Run the daemon for the block."""
    settings = load_settings(
        token=TOKEN,
        stream_url=stream,
        database_url=server.writer_url(url),
        exchange_calendar="always",
        spool_dir=directory / "spool",
        spool_max_bytes="8GiB",
        stop_timeout="5m",
    )
    request = StopRequest()
    daemon = Daemon(settings)
    task = asyncio.create_task(daemon.run(request), name="daemon")
    try:
        yield Soak(daemon)
    finally:
        request()
        await task


async def outage(minutes: float, rate: float) -> bool:
    """Make the database unavailable for so long, then available, while the market continues."""
    with plain_server() as server_url, tempfile.TemporaryDirectory(prefix="ingestor-soak-") as name:
        directory, server = Path(name), TestServer(server_url, "plain")
        await server.prepare()
        url = await server.create(server.new_name(), server.template)
        database = url.rpartition("/")[2]
        with market(rate, directory) as simulator:
            await server.run(f"ALTER DATABASE {database} ALLOW_CONNECTIONS false")
            async with soaking(server, url, directory, await simulator.url()) as soak:
                print(f"{minutes:g} minutes without a database at {rate:,.0f} ticks a second", flush=True)
                await soak.watch(minutes * 60)
                waited, rows = soak.samples[-1].seconds, soak.samples[-1].received
                await server.run(f"ALTER DATABASE {database} ALLOW_CONNECTIONS true")
                print("The database is available; the market continues", flush=True)
                await soak.watch(60, lambda: soak.daemon.telemetry.counts.batches_written > 0)
                began = time.monotonic()
                await soak.watch(minutes * 60, lambda: not soak.daemon.buffer.spooled_bytes)
                drained = time.monotonic() - began
                sent = await asyncio.to_thread(simulator.stop)
                await soak.watch(30, lambda: soak.daemon.telemetry.counts.messages >= sent)
        ((stored, twice),) = await query(
            url, "SELECT (SELECT count(*) FROM market.ticks), sum(duplicates)::int FROM ingest.stream_sessions"
        )
        await server.drop(database)
        await server.close()
    most = max(sample.resident for sample in soak.samples)
    factor = rows / drained / (rows / waited)
    print(
        f"\n{sent:,} ticks sent, {stored:,} stored, {twice} of them twice; at most {most / 2**20:.0f} MiB in memory; "
        f"{rows:,} ticks that came in {waited:.0f} s were written in {drained:.1f} s, {factor:.0f} times as fast"
    )
    complete: bool = sent == stored and not twice
    return complete and most < MEMORY_BOUND and factor >= DRAIN_FACTOR


async def steady(minutes: float, rate: float) -> bool:
    """Let everything run for so long."""
    with plain_server() as server_url, tempfile.TemporaryDirectory(prefix="ingestor-soak-") as name:
        directory, server = Path(name), TestServer(server_url, "plain")
        await server.prepare()
        url = await server.create(server.new_name(), server.template)
        with market(rate, directory) as simulator:
            async with soaking(server, url, directory, await simulator.url()) as soak:
                print(f"{minutes:g} minutes at {rate:,.0f} ticks a second", flush=True)
                await soak.watch(minutes * 60)
                sent = await asyncio.to_thread(simulator.stop)
                await soak.watch(30, lambda: soak.daemon.telemetry.counts.messages >= sent)
        ((stored,),) = await query(url, "SELECT count(*) FROM market.ticks")
        await server.drop(url.rpartition("/")[2])
        await server.close()
    third = len(soak.samples) // 3
    first, last = soak.samples[third // 3 : third], soak.samples[-third:-30]  # without the warm-up and the end
    growth = {
        what: max(getattr(s, what) for s in last) - max(getattr(s, what) for s in first)
        for what in ("resident", "descriptors", "tasks")
    }
    print(
        f"\n{sent:,} ticks sent, {stored:,} stored; from the first third to the last, at most: "
        f"{max(s.resident for s in first) / 2**20:.1f} to {max(s.resident for s in last) / 2**20:.1f} MiB, "
        f"{max(s.descriptors for s in first)} to {max(s.descriptors for s in last)} descriptors, "
        f"{max(s.tasks for s in first)} to {max(s.tasks for s in last)} tasks"
    )
    complete: bool = sent == stored
    return complete and growth["resident"] <= SLACK and growth["descriptors"] <= 2 and growth["tasks"] <= 2


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rate", type=float, default=5000)
    parser.add_argument("--steady", action="store_true")
    options = parser.parse_args()
    configure("error", "auto")
    return_large_blocks()  # as `ingestor run` does
    sys.exit(0 if asyncio.run((steady if options.steady else outage)(options.minutes, options.rate)) else 1)
