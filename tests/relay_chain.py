"""Two sites in a row, each with a daemon, a database and a relay as processes of their own, which a test disturbs."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ingestor.simulator.server import TOKEN, Simulator
from tests.addresses import free_port
from tests.clocks import HANG_SECONDS
from tests.processes import DaemonProcess
from tests.proxy import Proxy
from tests.relays import new_token

DAEMON = {
    "exchange_calendar": "always",
    "reconnect_max_delay": "200ms",
    "heartbeat": "200ms",
    "ping_interval": "500ms",
    "ping_timeout": "5s",
}


class RelayProcess(DaemonProcess):
    """`ingestor relay` in a process of its own."""

    COMMAND: ClassVar = "relay"


@dataclass
class Chain:
    """The processes, and the wires between them: simulator to A, relay A to B, both sites to their databases."""

    random: random.Random
    processes: dict[str, DaemonProcess]
    wires: dict[str, Proxy]
    last_relay: str
    """The stream of relay B."""

    async def disturb(self) -> str:
        """Disturb something at random, and return what it was."""
        name = self.random.choice([*self.wires, *self.processes])
        if name in self.wires:
            wire = self.wires[name]
            self.random.choice((wire.cut, wire.cut_in_the_middle, wire.cut))()
            return f"cut {name}"
        process = self.processes[name]
        if self.random.random() < 0.5:
            process.kill()
        else:
            process.signal(signal.SIGTERM)
            await asyncio.to_thread(process.wait, HANG_SECONDS)  # the wires must not stand still meanwhile
        await asyncio.sleep(self.random.random() * 0.5)
        process.start()
        return f"restarted {name}"

    def end(self) -> None:
        for process in self.processes.values():
            process.end()

    def tails(self) -> str:
        return "\n".join(f"--- {name}\n{process.tail()}" for name, process in self.processes.items())


@contextlib.asynccontextmanager
async def chain(simulator: Simulator, first: str, second: str, path: Path, seed: int) -> AsyncIterator[Chain]:
    """Run simulator → daemon A → relay A → daemon B → relay B on two databases."""
    async with contextlib.AsyncExitStack() as stack:
        wires = {
            "feed": await stack.enter_async_context(Proxy(simulator.stream_url, seed=seed)),
            "database A": await stack.enter_async_context(Proxy(first, seed=seed)),
            "database B": await stack.enter_async_context(Proxy(second, seed=seed)),
        }
        ports = [free_port("127.0.0.1") for _ in range(2)]
        wires["relay A"] = await stack.enter_async_context(Proxy(f"ws://127.0.0.1:{ports[0]}/ws", seed=seed))
        token = await new_token(first, "daemon B")

        def daemon(name: str, url: str, **changes: Any) -> DaemonProcess:
            settings = {**DAEMON, "database_url": url, "spool_dir": path / name, "instance": name, **changes}
            return DaemonProcess(path / f"{name}.log", **settings)

        def relay(name: str, url: str, port: int) -> RelayProcess:
            settings = {"database_url": url, "relay_port": port, "relay_http_port": 0, "instance": name}
            return RelayProcess(path / f"{name}.log", **settings)

        a, b = wires["database A"].url, wires["database B"].url
        processes = {
            "daemon-a": daemon("daemon-a", a, stream_url=wires["feed"].url, token=TOKEN),
            "relay-a": relay("relay-a", a, ports[0]),
            "daemon-b": daemon("daemon-b", b, stream_url=f"{wires['relay A'].url}?meta=1", token=token),
            "relay-b": relay("relay-b", b, ports[1]),
        }
        sites = Chain(random.Random(seed), processes, wires, f"ws://127.0.0.1:{ports[1]}/ws")
        stack.callback(sites.end)
        for process in processes.values():
            process.start()
        yield sites
