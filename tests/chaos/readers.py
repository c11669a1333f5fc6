"""Clients of relays that join at random moments, from random past ones, and keep what they see for the audit."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from websockets.exceptions import WebSocketException

from ingestor.clock import to_datetime
from ingestor.model import SECOND, Micros
from ingestor.relay.server import UNAVAILABLE
from ingestor.simulator.server import now
from ingestor.store.relay_tokens import TokenStore
from tests.processes import RelayProcess
from tests.relays import Client, Seen, stored

MOST = 12
"""Clients of a run."""

JOIN_SECONDS = 4.0
"""Mean time between two joins."""

PAST_SECONDS = 90.0
"""The longest way back that a client asks for."""

CATCH_UP_SECONDS = 60.0
"""Seconds for all clients to have everything, once the last tick is committed."""

SYMBOLS = ("AIR.NZ", "FPH.NZ", "SPK.NZ", "MEL.NZ", "CEN.NZ", "FBU.NZ", "RYM.NZ", "ATM.NZ")


@dataclass
class Reader:
    """One client, which goes on from its cursor on any relay, and begins again if a relay asks for that."""

    name: str
    options: dict[str, str]
    since: Micros
    symbols: frozenset[str]
    chance: random.Random
    seen: Counter[Seen] = field(default_factory=Counter)
    connections: int = 0
    restarts: int = 0
    cursor: str = ""
    client: Client | None = None
    broken: str = ""

    async def read(self, urls: list[str], token: str) -> None:
        """Read without end."""
        while True:
            try:
                await self._read(self.chance.choice(urls), token)
            except (OSError, WebSocketException):  # the relay was killed, or hangs
                self.client = None
                await asyncio.sleep(0.2)

    async def _read(self, url: str, token: str) -> None:
        resume = {"resume": self.cursor} if self.cursor else {}
        self.connections += 1
        async with asyncio.timeout(60), Client(url, token, **self.options, **resume) as client:
            self.client = client
            seconds = self.chance.expovariate(1 / 8)  # then it cuts the connection itself
            with contextlib.suppress(TimeoutError):
                await client.until(lambda client: client.is_closed, seconds)
        self._keep(client)

    def _keep(self, client: Client) -> None:
        """Add what a connection brought."""
        self.client = None
        if client.error and client.error != UNAVAILABLE:
            if "from" not in client.error:
                self.broken = f"{self.name} got an error: {client.error}"
            self.restarts += 1
            self.seen.clear()
            self.cursor = ""
            return
        self.seen += client.seen
        self.cursor = client.cursor if client.prices else self.cursor

    def so_far(self) -> Counter[Seen]:
        """Return all ticks that were seen, those of the open connection included."""
        return self.seen + self.client.seen if self.client is not None else self.seen

    def expected(self, rows: Counter[Seen]) -> Counter[Seen]:
        """Return those rows of the table that are in its range."""
        since = to_datetime(self.since).isoformat(timespec="microseconds")[:26] + "Z"
        return Counter(
            {row: count for row, count in rows.items() if row[1] >= since and row[0] in (self.symbols or {row[0]})}
        )


class Readers:
    """Two relays, in processes of their own, and their clients."""

    def __init__(self, url: str, relay_urls: list[str], directory: Path, seed: int, settings: dict[str, Any]) -> None:
        self._url = url
        self._random = random.Random(seed)
        self._token = ""
        self._tasks: list[asyncio.Task[None]] = []
        self.readers: list[Reader] = []
        self.relays: list[RelayProcess] = []
        self._urls: list[str] = []
        for number, each in enumerate(relay_urls, 1):
            port = _free_port()
            log = directory / f"relay-{number}.log"
            options = {
                **settings,
                "database_url": each,
                "relay_port": port,
                "relay_http_port": 0,
                "instance": f"r{number}",
            }
            self.relays.append(RelayProcess(log, **options))
            self._urls.append(f"ws://127.0.0.1:{port}/ws")

    async def start(self) -> None:
        """Start the relays."""
        token = await TokenStore(self._url).add("readers", max_streams=1000, lifetime=None)
        assert token is not None
        self._token = token
        for relay in self.relays:
            relay.start()

    async def join(self) -> None:
        """Let clients join at random moments, and relays run, without end."""
        while True:
            await asyncio.sleep(self._random.expovariate(1 / JOIN_SECONDS))
            self.ensure_running()
            if len(self.readers) < MOST:
                self.readers.append(self._reader())
                self._tasks.append(asyncio.create_task(self.readers[-1].read(self._urls, self._token)))

    def ensure_running(self) -> None:
        """Start relays that ended, as a service manager does: without a database they do not start."""
        for relay in self.relays:
            if not relay.is_running:
                relay.start()

    def _reader(self) -> Reader:
        since = now() - round(self._random.uniform(0, PAST_SECONDS) * SECOND)
        options = {"from": to_datetime(since).isoformat(), "meta": "1"}
        symbols: frozenset[str] = frozenset()
        if self._random.random() < 0.7:
            symbols = frozenset(self._random.sample(SYMBOLS, self._random.randint(1, 4)))
            options["symbols"] = ",".join(symbols)
        if self._random.random() < 0.3:
            options["compress"] = "1"
        chance = random.Random(self._random.random())
        return Reader(f"client {len(self.readers) + 1}", options, since, symbols, chance)

    async def audit(self) -> list[str]:
        """Wait until all clients have all stored ticks of their ranges, each once; return where one has not."""
        self.ensure_running()
        rows = await stored(self._url)
        deadline = time.monotonic() + CATCH_UP_SECONDS
        wrong = self._wrong(rows)
        while wrong and time.monotonic() < deadline:
            await asyncio.sleep(2)
            self.ensure_running()
            wrong = self._wrong(rows)
        for task in self._tasks:
            if task.done():
                task.result()
        return wrong

    def _wrong(self, rows: Counter[Seen]) -> list[str]:
        found = []
        for reader in self.readers:
            seen, expected = reader.so_far(), reader.expected(rows)
            lost, extra = (expected - seen).total(), (seen - expected).total()
            if reader.broken:
                found.append(reader.broken)
            if lost or extra:
                found.append(f"{reader.name} of a relay lacks {lost} ticks, and has {extra} too many: {reader.options}")
        return found

    def summary(self) -> str:
        """Return how much the clients have proved."""
        connections = sum(reader.connections for reader in self.readers)
        restarts = sum(reader.restarts for reader in self.readers)
        ticks = sum(reader.so_far().total() for reader in self.readers)
        return (
            f"{len(self.readers)} clients of relays, {connections} connections, {restarts} that began again, "
            f"{ticks:,} ticks seen"
        )

    async def close(self) -> None:
        """End the clients and the relays."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for relay in self.relays:
            relay.end()


async def kill_relay(relay: RelayProcess, seconds: float) -> None:
    """Kill a relay, and start it again."""
    await asyncio.to_thread(relay.end)
    await asyncio.sleep(seconds / 3)
    relay.start()
    await asyncio.sleep(1)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
