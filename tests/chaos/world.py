"""The parts of chaos: a market, its service, a server, two daemons, and a wire on each side of each of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from ingestor.admin.migrate import migrate
from ingestor.buffer.spool import Spool
from ingestor.settings import load_settings
from ingestor.simulator.faults import GARBAGE
from ingestor.simulator.market import Market
from ingestor.simulator.server import TOKEN, Account, Simulator, now
from ingestor.store.connect import connect
from tests.chaos.audit import Skew
from tests.chaos.readers import Readers
from tests.disks import small_disk
from tests.pooler import Pooler
from tests.processes import DaemonProcess, ServerProcess
from tests.proxy import Proxy
from tests.servers import with_parts

RATE = 300.0
DISK = 256 * 2**20
FIRST_ADDRESS = "127.0.0.2"
"""The first address of `localhost` for the daemons refuses or swallows connections; the wires use the second."""
DATABASE = "ingestor_chaos"
WRITER = "ingestor_chaos_writer"
SETTINGS = {
    "exchange_calendar": "always",
    "coverage_margin": "1500ms",
    "heartbeat": "500ms",
    "ping_interval": "1s",
    "ping_timeout": "2s",
    "stall_timeout": "2s",  # the clock is then checked every half second, so a pause of a second is noticed
    "write_timeout": "1s",
    "spool_after": "200ms",
    "reconnect_max_delay": "500ms",
    "stop_timeout": "60s",
    "log_format": "json",
    "log_level": "info",
}


@dataclass
class Instance:
    """A daemon with its wires. The locks keep faults of the same target apart."""

    name: str
    daemon: DaemonProcess
    feed: Proxy
    database: Proxy
    spool: Path
    look_at: str
    """The database's URL without a wire, for checks of the daemon's claims."""
    process_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    feed_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    database_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    skews: list[Skew] = field(default_factory=list)
    """When its clock was wrong, and by how much."""
    broken: set[str] = field(default_factory=set)
    """Broken promises that a fault has found itself."""


@dataclass
class World:
    """Everything that runs."""

    url: str
    simulator: Simulator
    market: Market
    server: ServerProcess
    instances: list[Instance]
    readers: Readers
    disk: Path | None
    """The small disk under the database, if this machine can mount one."""
    pooler: Pooler | None = None
    """The pooler between the daemons and the database, if any."""
    pooler_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    relay_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    server_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    backup_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held from a backup to its restore: a second backup in between would mix two times."""

    def accounts(self) -> dict[str, list[Account]]:
        """Return each instance's connections in order."""
        return {
            each.name: [account for account in self.simulator.accounts if account.port in set(each.feed.upstream_ports)]
            for each in self.instances
        }

    def mute(self, instance: Instance) -> list[Account]:
        """Send no more messages on an instance's connection; return its account, if it is connected."""
        accounts = self.accounts()[instance.name][-1:]
        for account in accounts:
            self.simulator.mute(account)
        return accounts

    async def ended(self, accounts: list[Account], *, within: float) -> None:
        """Wait until connections are closed, at most so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                for account in accounts:
                    await account.connection.wait_closed()

    async def trade(self, chance: random.Random) -> None:
        """Trade without end, with some garbage in between."""
        while True:
            self.simulator.send(self.market.until(now()))
            if chance.random() < 0.005:
                self.simulator.send_raw(chance.choice(GARBAGE))
            await asyncio.sleep(0.01)

    async def select_daemons(self, *, both: bool) -> None:
        """Let both daemons record, or only the first: then no other instance covers its losses."""
        second = self.instances[1]
        async with second.process_lock:
            if both and not second.daemon.is_running:
                second.daemon.start()
            elif not both and second.daemon.is_running:
                await asyncio.to_thread(second.daemon.stop)

    async def recover(self) -> None:
        """End all faults, and let the daemons write everything before they stop."""
        await self.server.ensure_running()
        if self.pooler is not None:
            self.pooler.ensure_running()
        for each in self.instances:
            each.feed.release()
            each.database.release()
            each.feed.delay = each.database.delay = 0.0
            each.database.bytes_per_second = each.database.most_unanswered = None
            each.database.mutes_server = each.database.refuses = False
            if not each.daemon.is_running:
                each.daemon.start()
        await asyncio.sleep(8)  # longer than the longest wait between two attempts
        await asyncio.gather(*(self._write_out(each) for each in self.instances))

    async def _write_out(self, instance: Instance) -> None:
        for _ in range(5):
            status = await asyncio.to_thread(instance.daemon.stop)
            if status:
                raise AssertionError(f"{instance.name} ended with {status}: {instance.daemon.tail()}")
            spool = Spool(instance.spool)
            spool.open()
            left = spool.depth
            spool.close()
            if not left:
                return
            instance.daemon.start()
            await instance.daemon.page()  # it handles SIGTERM by then
            await asyncio.sleep(8)
        raise AssertionError(f"{instance.name} does not finish its spool: {instance.daemon.tail()}")


@contextlib.asynccontextmanager
async def world(url: str, directory: Path, *, seed: int, pooled: bool = False) -> AsyncIterator[World]:
    """Build the world around the server of a superuser's URL. Afterwards only the files in `directory` are left.

    With `pooled` the daemons write through PgBouncer in transaction mode.
    """
    async with contextlib.AsyncExitStack() as stack:
        server = await ServerProcess.of(url)
        inside = f"/tmp/{DATABASE}-{os.getpid()}"
        disk: Path | None = server.host_path(inside)
        try:
            stack.enter_context(small_disk(server.host_path(inside), DISK))
            server.chown(server.host_path(inside))
        except PermissionError:
            disk = None
        owner = await stack.enter_async_context(_database(url, inside if disk else None))
        simulator = await stack.enter_async_context(
            Simulator(port=0, rate=0, record=True, faults=["replay"], max_streams=1000)
        )
        parts = urlsplit(url)
        writer = with_parts(url, database=urlsplit(owner).path[1:], user=WRITER, password="writer")
        assert parts.port is not None
        pooler = Pooler(url, users={WRITER: "writer"}) if pooled else None
        if pooler is not None:
            stack.callback(pooler.close)
            pooler.start()
        instances = []
        for name in ("one", "two"):
            feed = await stack.enter_async_context(Proxy(simulator.stream_url, seed=seed))
            wire = await stack.enter_async_context(Proxy(pooler.url(writer) if pooler else writer, seed=seed))
            daemon = DaemonProcess(
                directory / f"{name}.log",
                **SETTINGS,
                stream_url=feed.url,
                database_url=wire.url,
                token=TOKEN,
                spool_dir=directory / name,
                instance=name,
            )
            daemon.first_address = FIRST_ADDRESS
            stack.callback(daemon.end)
            daemon.start()
            instances.append(Instance(name, daemon, feed, wire, directory / name, owner))
        market = Market(seed, RATE, now(), cycle=60)
        stack.push_async_callback(server.ensure_running)
        relay_urls = [owner, pooler.url(owner) if pooler else owner]
        readers = Readers(owner, relay_urls, directory, seed, SETTINGS)
        stack.push_async_callback(readers.close)
        await readers.start()
        yield World(owner, simulator, market, server, instances, readers, disk, pooler)


@contextlib.asynccontextmanager
async def _database(url: str, tablespace: str | None) -> AsyncIterator[str]:
    """Create a migrated database, on the small disk if there is one."""
    admin = await connect(url)
    try:
        await admin.execute(f"DROP DATABASE IF EXISTS {DATABASE} WITH (FORCE)")
        await admin.execute(f"DROP ROLE IF EXISTS {WRITER}")
        where = ""
        if tablespace is not None:
            await admin.execute(f"CREATE TABLESPACE {DATABASE} LOCATION '{tablespace}'")
            where = f"TABLESPACE {DATABASE}"
        await admin.execute(f"CREATE DATABASE {DATABASE} TEMPLATE template0 {where}")
        owner = with_parts(url, database=DATABASE)
        await migrate(owner, load_settings(**SETTINGS), lambda _: None)
        await admin.execute(f"CREATE ROLE {WRITER} LOGIN PASSWORD 'writer' IN ROLE market_write")
    finally:
        await admin.close()
    try:
        yield owner
    finally:
        admin = await connect(url)
        await admin.execute(f"DROP DATABASE {DATABASE} WITH (FORCE)")
        if tablespace is not None:
            await admin.execute(f"DROP TABLESPACE {DATABASE}")
        await admin.execute(f"DROP ROLE {WRITER}")
        await admin.close()
