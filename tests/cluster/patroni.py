"""Two PostgreSQL servers under Patroni, with etcd, on free ports of the loopback address."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import shutil
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from ingestor.embedded import wheel_binaries
from tests.clocks import HANG_SECONDS
from tests.cluster.parts import Part, alive, descendants, own_directory, python
from tests.nats_servers import free_ports
from tests.processes import send
from tests.proxy import Proxy
from tests.servers import local_binaries

SCOPE = "ingestor"
SETTINGS: dict[str, Any] = {
    "ttl": 20,  # the least that Patroni accepts: a machine's death is noticed after it
    "loop_wait": 2,
    "retry_timeout": 5,
    "maximum_lag_on_failover": 64 * 2**20,
    "synchronous_mode": True,
}
"""The cluster's settings that matter to the measured pauses."""

PARAMETERS = {
    "max_connections": 60,
    "wal_log_hints": "on",  # pg_rewind needs it
    "track_commit_timestamp": "on",  # the pauses of commits are read from it
    "wal_keep_size": "512MB",
}
READY_SECONDS = 2 * HANG_SECONDS
"""Time within which a cluster must be whole again after a fault."""


@dataclass
class Node:
    """A machine of the cluster: Patroni, and the PostgreSQL that it started.

    The other node replicates through `wire`, so the network between the two can be cut.
    """

    name: str
    part: Part
    api: str
    port: int
    data: Path
    wire: Proxy

    def postmaster(self) -> int | None:
        """Return the process of PostgreSQL, if there is one."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            pid = int((self.data / "postmaster.pid").read_text(encoding="ascii").splitlines()[0])
            return pid if alive([pid]) else None
        return None

    def postgres(self) -> list[int]:
        """Return all processes of PostgreSQL."""
        pid = self.postmaster()
        return [] if pid is None else descendants(pid)

    async def kill_postgres(self) -> None:
        victims = self.postgres()
        send(signal.SIGKILL, *victims)
        await _gone(victims)

    async def die(self) -> None:
        """Kill Patroni and PostgreSQL at the same moment, as a machine's death does."""
        victims = [*descendants(self.part.pid), *self.postgres()] if self.part.is_running else self.postgres()
        send(signal.SIGSTOP, *victims)
        send(signal.SIGKILL, *victims)
        await asyncio.to_thread(self.part.kill)
        await _gone(victims)

    def freeze(self) -> None:
        """Stop Patroni and PostgreSQL: connections stay open, and nothing answers."""
        send(signal.SIGSTOP, self.part.pid, *descendants(self.part.pid), *self.postgres())

    def thaw(self) -> None:
        send(signal.SIGCONT, *self.postgres(), self.part.pid, *descendants(self.part.pid))

    def cut_replication(self) -> None:
        """Let the other node receive nothing more from this one."""
        self.wire.refuses = True
        self.wire.cut()

    def allow_replication(self) -> None:
        self.wire.refuses = False

    def end(self) -> None:
        """End everything of this machine, in whatever state it is."""
        self.part.end()
        if (pid := self.postmaster()) is not None:
            victims = descendants(pid)
            send(signal.SIGCONT, *victims)
            send(signal.SIGKILL, *victims)


@dataclass
class PatroniCluster:
    """etcd and the nodes. `url` finds the primary of the moment."""

    etcd: Part
    nodes: list[Node]
    password: str
    client: httpx.AsyncClient
    switched: int = field(default=0)

    @property
    def url(self) -> str:
        """The superuser's URL, with both nodes."""
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
        return f"postgresql://postgres:{self.password}@{hosts}/postgres?target_session_attrs=read-write"

    async def members(self) -> list[dict[str, Any]]:
        """Return Patroni's view of its nodes, from the first that answers; empty without one."""
        for node in self.nodes:
            with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
                answer = await self.client.get(f"{node.api}/cluster", timeout=2)
                return list(answer.json()["members"])
        return []

    async def primary(self) -> Node:
        """Wait for a running leader and return it."""
        async with asyncio.timeout(READY_SECONDS):
            while True:
                assert any(node.part.is_running for node in self.nodes), self.nodes[0].part.tail()
                for member in await self.members():
                    if member["role"] == "leader" and member["state"] == "running":
                        return self.node(member["name"])
                await asyncio.sleep(0.1)

    def node(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    def other(self, node: Node) -> Node:
        return next(each for each in self.nodes if each is not node)

    async def promoted(self, node: Node) -> None:
        """Wait until a node is the primary, also in its own answer: the view of the cluster may be stale."""
        async with asyncio.timeout(READY_SECONDS):
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if (await self.client.get(f"{node.api}/primary", timeout=2)).status_code == 200:
                        return
                await asyncio.sleep(0.1)

    async def whole(self) -> None:
        """Wait until one node leads and the other one replicates in the current mode."""
        role = "sync_standby" if await self._is_synchronous() else "replica"
        members: list[dict[str, Any]] = []
        try:
            async with asyncio.timeout(READY_SECONDS):
                while True:
                    members = await self.members()
                    states = {(each["role"], each["state"]) for each in members}
                    if states == {("leader", "running"), (role, "streaming")} and self._is_level(members):
                        return
                    await asyncio.sleep(0.2)
        except TimeoutError:
            logs = "\n".join(node.part.tail() for node in self.nodes)
            raise AssertionError(f"the cluster does not recover: {members}\n{logs}") from None

    async def switch_over(self) -> Node:
        """Let Patroni move the primary in order; return the new one."""
        primary = await self.primary()
        candidate = self.other(primary)
        answer = await self.client.post(
            f"{primary.api}/switchover", json={"leader": primary.name, "candidate": candidate.name}, timeout=60
        )
        assert answer.status_code == 200, answer.text
        return candidate

    async def configure(self, **settings: Any) -> None:
        """Change the cluster's settings; they apply within one loop of Patroni."""
        answer = await self.client.patch(f"{(await self.primary()).api}/config", json=settings, timeout=10)
        assert answer.status_code == 200, answer.text

    async def _is_synchronous(self) -> bool:
        node = await self.primary()
        return bool((await self.client.get(f"{node.api}/config", timeout=5)).json()["synchronous_mode"])

    @staticmethod
    def _is_level(members: list[dict[str, Any]]) -> bool:
        return len({each.get("timeline") for each in members}) == 1


def etcd_program() -> str:
    found = shutil.which("etcd")
    assert found, "install etcd-server"
    return found


def _etcd(directory: Path) -> tuple[Part, int]:
    client, peer = free_ports(2)
    urls = [f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}"]
    home = own_directory(directory / "etcd")
    command = [
        etcd_program(),
        "--name=e0",
        f"--data-dir={home}/data",
        f"--listen-client-urls={urls[0]}",
        f"--advertise-client-urls={urls[0]}",
        f"--listen-peer-urls={urls[1]}",
        f"--initial-advertise-peer-urls={urls[1]}",
        f"--initial-cluster=e0={urls[1]}",
    ]
    return Part("etcd", command, home), client


def _configuration(node: Node, etcd: int, password: str) -> dict[str, Any]:
    """Return Patroni's configuration of a node. JSON is YAML."""
    api = node.api.removeprefix("http://")
    login = {"username": "postgres", "password": password}
    return {
        "scope": SCOPE,
        "name": node.name,
        "restapi": {"listen": api, "connect_address": api},
        "etcd3": {"host": f"127.0.0.1:{etcd}"},
        "bootstrap": {
            "dcs": {**SETTINGS, "postgresql": {"use_pg_rewind": True, "parameters": PARAMETERS}},
            "initdb": [{"encoding": "UTF8"}, {"locale": "C"}],
        },
        "postgresql": {
            "listen": f"127.0.0.1:{node.port}",
            "connect_address": f"127.0.0.1:{node.wire.port}",
            "data_dir": str(node.data),
            "bin_dir": str(local_binaries() or wheel_binaries()),
            "pgpass": str(node.part.directory / "pgpass"),
            "authentication": {"superuser": login, "replication": {"username": "replicator", "password": password}},
            "parameters": {"unix_socket_directories": str(node.part.directory)},
            "pg_hba": ["host all all 127.0.0.1/32 scram-sha-256", "host replication all 127.0.0.1/32 scram-sha-256"],
            "basebackup": [{"checkpoint": "fast"}],
        },
    }


async def _node(stack: contextlib.AsyncExitStack, directory: Path, name: str, etcd: int, password: str) -> Node:
    port, api = free_ports(2)
    wire = await stack.enter_async_context(Proxy(f"postgresql://127.0.0.1:{port}"))
    home = own_directory(directory / name)
    configuration = home / "patroni.json"
    program, environment = python()
    command = [*program, "-m", "patroni", str(configuration)]
    node = Node(name, Part(name, command, home, environment), f"http://127.0.0.1:{api}", port, home / "data", wire)
    configuration.touch(mode=0o644)  # its directory is closed to others
    configuration.write_text(json.dumps(_configuration(node, etcd, password), indent=1), encoding="utf-8")
    stack.callback(node.end)
    return node


@contextlib.asynccontextmanager
async def patroni_cluster(directory: Path) -> AsyncIterator[PatroniCluster]:
    """Run etcd and two nodes, in a directory that the unprivileged user can enter."""
    async with contextlib.AsyncExitStack() as stack:
        password = secrets.token_hex(8)
        etcd, port = _etcd(directory)
        stack.callback(etcd.end)
        etcd.start()
        nodes = [await _node(stack, directory, name, port, password) for name in ("a", "b")]
        client = await stack.enter_async_context(httpx.AsyncClient(trust_env=False))
        cluster = PatroniCluster(etcd, nodes, password, client)
        nodes[0].part.start()
        await cluster.primary()
        nodes[1].part.start()
        await cluster.whole()
        yield cluster


async def _gone(pids: list[int]) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while alive(pids):
        assert time.monotonic() < deadline, "a killed process does not end"
        await asyncio.sleep(0.01)
