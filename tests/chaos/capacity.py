"""`make capacity`: a daemon's resources at several rates, with and without the database: a table for the runbook.

The simulator, the daemon and the server are processes of their own; they share this machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from ingestor.simulator.server import TOKEN
from tests.chaos.soak import market
from tests.http import Window
from tests.processes import DaemonProcess
from tests.proxy import Proxy
from tests.recording import until
from tests.servers import TestServer, plain_server, query

RATES = (10, 100, 1_000, 5_000, 10_000)


_BREAKS = """
SELECT extract(epoch FROM lead(authenticated_at) OVER (ORDER BY connected_at) - covered_until)::float8
FROM ingest.stream_sessions
"""


@dataclass(frozen=True)
class Row:
    """The measurements at one rate. Bytes a tick are those of the spool."""

    rate: float
    processor_percent: float
    resident: float
    delay: float
    bytes_a_tick: float


async def measure(rate: float, seconds: float, server: TestServer, directory: Path) -> Row:
    """Run a daemon at a rate, first with the database and then without."""
    name = server.new_name()
    database = await server.create(name, server.template)
    with market(rate, directory) as feed:
        async with Proxy(server.writer_url(database)) as proxy:
            daemon = DaemonProcess(
                directory / "daemon.log",
                token=TOKEN,
                stream_url=await feed.url(),
                database_url=proxy.url,
                spool_dir=directory / "spool",
                exchange_calendar="always",
            )
            daemon.start()
            try:
                async with Window(await daemon.page()) as window:
                    row = await _look(rate, seconds, window, proxy)
            finally:
                daemon.end()
    await server.drop(name)
    return row


async def _look(rate: float, seconds: float, window: Window, proxy: Proxy) -> Row:
    async def metric(name: str) -> float:
        return await window.metric(f"ingestor_{name}" if not name.startswith("process_") else name) or 0.0

    await asyncio.sleep(seconds / 2)  # until the rate is steady
    processor = await metric("process_cpu_seconds_total")
    commits, delays = await metric("wire_to_commit_seconds_count"), await metric("wire_to_commit_seconds_sum")
    await asyncio.sleep(seconds)
    processor = await metric("process_cpu_seconds_total") - processor
    commits = await metric("wire_to_commit_seconds_count") - commits
    delays = await metric("wire_to_commit_seconds_sum") - delays
    resident = await metric("process_resident_memory_bytes")

    proxy.refuses = True
    proxy.cut()
    await asyncio.sleep(2)  # until everything is spooled
    received, spooled = await metric("messages_total"), await metric("spool_bytes")
    await asyncio.sleep(seconds)
    received, spooled = await metric("messages_total") - received, await metric("spool_bytes") - spooled
    return Row(rate, 100 * processor / seconds, resident, delays / commits, spooled / received)


async def restart(times: int, server: TestServer, directory: Path) -> list[float]:
    """Restart a daemon so many times; return how many seconds the market had no listener, each time."""
    name = server.new_name()
    database = await server.create(name, server.template)
    with market(100, directory) as feed:
        daemon = DaemonProcess(
            directory / "daemon.log",
            token=TOKEN,
            stream_url=await feed.url(),
            database_url=server.writer_url(database),
            spool_dir=directory / "spool",
            exchange_calendar="always",
        )
        for number in range(1, times + 2):
            daemon.start()
            await until(database, "SELECT count(*) FROM ingest.stream_sessions WHERE covered_until IS NOT NULL", number)
            await asyncio.sleep(1)
            await asyncio.to_thread(daemon.stop)
    rows = await query(database, _BREAKS)
    await server.drop(name)
    return sorted(row[0] for row in rows if row[0] is not None)


async def main(seconds: float) -> None:
    """Print the table."""
    print(f"Python {platform.python_version()} on {platform.machine()}; {seconds:g} s for each part of each row.\n")
    print("| ticks a second | of a core | memory | from arrival to commit, on average | on disk, a tick |")
    print("|---|---|---|---|---|")
    with plain_server() as url, tempfile.TemporaryDirectory(prefix="ingestor-capacity-") as directory:
        server = TestServer(url, "plain")
        await server.prepare()
        for rate in RATES:
            place = Path(directory) / str(rate)
            place.mkdir()
            row = await measure(rate, seconds, server, place)
            print(
                f"| {row.rate:,.0f} | {row.processor_percent:.1f} % | {row.resident / 2**20:.0f} MiB "
                f"| {row.delay * 1000:.0f} ms | {row.bytes_a_tick:.0f} B |",
                flush=True,
            )
        place = Path(directory) / "restart"
        place.mkdir()
        gaps = await restart(9, server, place)
        print(
            f"\nRestarted nine times: no process received the stream for "
            f"{median(gaps):.2f} s ({gaps[0]:.2f} to {gaps[-1]:.2f} s)."
        )
        await server.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20)
    asyncio.run(main(parser.parse_args().seconds))
