"""Random joins of relays while ticks are committed: each client sees each stored tick of its range exactly once.

Two daemons write late ticks, equal ones and refused ones, backlogs, and batches whose answer was lost. One relay runs
here, one reads through a pooler if there is one, and one is a process that is killed. Connections and the server are
killed, the log is pruned, and the relays' registration is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
from websockets.exceptions import WebSocketException

from ingestor.batch import Batcher
from ingestor.clock import from_datetime, to_datetime
from ingestor.errors import StoreError
from ingestor.model import SECOND, Batch, Micros, Tick
from ingestor.relay import budget, hub, subscription
from ingestor.relay.server import UNAVAILABLE
from ingestor.service import relay as service
from ingestor.store import record
from ingestor.store.ticks import TickStore
from tests.integration.test_store import session
from tests.pooler import PROGRAM, Pooler
from tests.processes import RelayProcess, ServerProcess
from tests.relays import PRUNE, Client, Seen, new_token, relaying, stored
from tests.servers import execute_all, query

log = logging.getLogger(__name__)

JOINS = int(os.environ.get("INGESTOR_TEST_JOINS", "60"))
SEEDS = 3
BASE: Micros = from_datetime(datetime(2026, 3, 2, tzinfo=UTC))
SPAN = 600
"""Microseconds in which all ticks arrive: so many of them arrive at once."""

SYMBOLS = ("A", "B", "C", "Ω")
END = Tick("END", BASE, 1.0, 1)
Address = Callable[[], str]
"""Returns where a relay listens now."""

KILL = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE application_name LIKE '{}' AND datname = current_database() AND pid <> pg_backend_pid()
"""
UNREGISTER = "UPDATE ingest.relays SET seen_at = now() - interval '2 hours' RETURNING 1"


@dataclass
class Reader:
    """One client, which goes on from its cursor when its connection was cut."""

    options: dict[str, str]
    symbols: tuple[str, ...]
    since: Micros
    random: random.Random
    seen: Counter[Seen] = field(default_factory=Counter)
    cuts: int = 0
    restarts: int = 0
    connections: list[Client] = field(default_factory=list)
    cursor: str = ""

    async def read(self, relays: list[Address], token: str) -> None:
        """Read until the last tick has come, over as many connections as that takes."""
        while not self.seen[self._end()]:
            try:
                await self._read(relays[self.cuts % len(relays)](), token)
            except (OSError, WebSocketException):  # a relay that was killed: another one may be there
                self.cuts += 1
                await asyncio.sleep(0.05)

    async def _read(self, url: str, token: str) -> None:
        resume = {"resume": self.cursor} if self.cursor else {}
        async with Client(url, token, **self.options, **resume) as client:
            self.connections.append(client)
            await client.until(self._is_over, 120)
        if client.error not in {"", UNAVAILABLE}:  # the relay says that it may have missed ticks: begin again
            assert "from" in client.error, client.error
            self.restarts += 1
            self.seen.clear()
            self.cursor = ""
            return
        if self._end() not in client.seen and client.prices:  # as if it had not kept the last ones
            del client.messages[self.random.randint(1, len(client.messages)) :]
        self.seen += client.seen
        self.cursor = client.cursor if client.prices else self.cursor

    def _end(self) -> Seen:
        return ("END", to_datetime(BASE + SPAN + SECOND).isoformat(timespec="microseconds")[:26] + "Z", 1.0, 1, 1)

    def _is_over(self, client: Client) -> bool:
        return client.is_closed or self._end() in client.seen

    def cut(self) -> None:
        """Cut the connection, as a network would."""
        self.cuts += 1
        if self.connections and (connection := self.connections[-1].connection):
            connection.transport.abort()


class World:
    """Two daemons that write to one database, by random steps."""

    def __init__(self, seed: int, url: str, writer_url: str) -> None:
        self.random = random.Random(seed)
        self._url = url
        self._writer_url = writer_url
        self._stores = [TickStore(writer_url, write_timeout=20) for _ in range(2)]
        self._batchers: list[list[tuple[Batcher, list[Micros]]]] = [[], []]
        self._backlogs: list[list[Batch]] = [[], []]

    async def write(self) -> None:
        """Let both daemons commit something at the same time."""
        await asyncio.gather(*(self._write(number) for number in range(2) if self.random.random() < 0.8))

    async def _write(self, number: int) -> None:
        if self.random.random() < 0.1:  # a restart: the fast way is tried again
            await self._stores[number].close()
            self._stores[number] = TickStore(self._writer_url, write_timeout=20)
        backlog = self._backlogs[number]
        backlog += [self._batch(number) for _ in range(self.random.randint(1, 3))]
        if self.random.random() < 0.9:  # else the database is unavailable, for this daemon
            await self._write_out(number)

    async def _write_out(self, number: int) -> None:
        """Write the backlog; what fails, maybe after its commit, is written again later."""
        with contextlib.suppress(StoreError):
            await self._stores[number].write(self._backlogs[number])
            self._backlogs[number].clear()

    def _batch(self, number: int) -> Batch:
        """Return the next batch of a session of one daemon: a new one's ticks may have arrived long ago."""
        if not self._batchers[number] or self.random.random() < 0.2:
            batcher = Batcher(session(instance=str(number)), max_rows=5000, occurrence_keys=1000)
            self._batchers[number] = [(batcher, [BASE + self.random.randrange(SPAN - 100)])]
        batcher, arrived = self._batchers[number][0]
        for _ in range(self.random.choice((1, 2, 5, 30))):
            arrived[0] = min(arrived[0] + self.random.randint(0, 3), BASE + SPAN)
            batcher.add(self._tick(), arrived[0])
        return batcher.close()

    def _tick(self) -> Tick:
        volume = 13 if self.random.random() < 0.002 else self.random.randint(1, 4)
        time = BASE + self.random.randrange(2) * SECOND
        return Tick(self.random.choice(SYMBOLS), time, self.random.choice((1.5, 2.0)), volume)

    async def disturb(self) -> None:
        """End connections of relays or daemons, prune the log, or lose the registration of all relays."""
        draw = self.random.random()
        if draw < 0.85:
            name = self.random.choice(("ingestor relay%", "ingestor relay", "ingestor relay reader", "ingestor"))
            await asyncio.gather(query(self._url, KILL.format(name)), self.write())
        elif draw < 0.95:
            await query(self._url, PRUNE)
        else:
            await query(self._url, UNREGISTER)

    async def end(self) -> None:
        """Commit everything, and the last tick."""
        for number, store in enumerate(self._stores):
            async with asyncio.timeout(60):
                while self._backlogs[number]:
                    await self._write_out(number)
            await store.close()
        batcher = Batcher(session(), max_rows=5000, occurrence_keys=1000)
        batcher.add(END, BASE + SPAN + SECOND)
        await self._stores[0].write([batcher.close()])
        await self._stores[0].close()

    def reader(self) -> Reader:
        """Return a client with random options."""
        since = BASE + self.random.choice((0, self.random.randrange(SPAN)))
        options = {"from": to_datetime(since).isoformat(), "meta": "1"}
        symbols: tuple[str, ...] = ()
        if self.random.random() < 0.5:
            symbols = (*self.random.sample(SYMBOLS, self.random.randint(1, 3)), "END")
            options["symbols"] = ",".join(symbols)
        if self.random.random() < 0.2:
            options["gaps"] = "1"
        if self.random.random() < 0.3:
            options["compress"] = "1"
        if self.random.random() < 0.1:
            options["speed"] = "0.01"
        return Reader(options, symbols, since, random.Random(self.random.random()))


@pytest.fixture
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pages and slices end within ticks that arrived at once."""
    for name in ("MOST", "LEAST"):
        monkeypatch.setattr(budget, name, 7)
    monkeypatch.setattr(subscription, "SLICE", 3)
    monkeypatch.setattr(hub, "SLICE", 4)
    monkeypatch.setattr(record, "MAX_ENTRIES", 3)
    monkeypatch.setattr(service, "REPORT_SECONDS", 0.5)


@contextlib.asynccontextmanager
async def _relays(database: str, directory: Path) -> AsyncIterator[tuple[list[Address], RelayProcess]]:
    """Run three relays; yield where they listen, and the one that is a process."""
    process = RelayProcess(
        directory / "relay.log", database_url=database, relay_port=0, relay_http_port=0, log_format="json"
    )
    async with contextlib.AsyncExitStack() as stack:
        second = database
        if PROGRAM:
            pooler = Pooler(database)
            stack.callback(pooler.close)
            pooler.start()
            second = pooler.url(database)
        one, two = [
            await stack.enter_async_context(relaying(url, relay_max_clients=10_000)) for url in (database, second)
        ]
        stack.callback(process.end)
        process.start()
        yield [lambda: one.server.url, lambda: two.server.url, lambda: _address(process)], process


def _address(process: RelayProcess) -> str:
    """Return the address that a relay logged last."""
    found = re.findall(r'"(ws://[^"]*)"', process.log.read_text(encoding="utf-8"))
    return str(found[-1]) if found else "ws://127.0.0.1:1/"


async def _restart(process: RelayProcess) -> None:
    await asyncio.to_thread(process.kill)
    process.start()


async def _restart_server(server: ServerProcess) -> None:
    await asyncio.to_thread(server.kill)
    await server.start()


Break = Callable[[], Awaitable[None]]


async def _join_at_random(world: World, relays: list[Address], token: str, joins: int, *breaks: Break) -> list[Reader]:
    """Let clients join while daemons write, and while in turn each of `breaks` happens; return them at their end."""
    readers: list[Reader] = []
    reading: list[asyncio.Task[None]] = []
    broken = 0
    while len(readers) < joins:
        await world.write()
        action = world.random.random()
        if action < 0.5:
            readers.append(world.reader())
            reading.append(asyncio.create_task(readers[-1].read(relays, token)))
        elif action < 0.7 and readers:
            world.random.choice(readers).cut()
        elif action < 0.8:
            await world.disturb()
        if breaks and broken < 3 * len(readers) // joins:  # twice, at a third and at two thirds
            await asyncio.gather(breaks[broken % len(breaks)](), world.write())
            broken += 1
    await world.end()
    await asyncio.gather(*reading)
    return readers


async def _check(database: str, readers: list[Reader]) -> str:
    """Compare the ticks of each client with the table; return how much that proves."""
    for reader in readers:
        condition = f"received_at >= '{to_datetime(reader.since).isoformat()}'"
        if reader.symbols:
            names = ", ".join(f"'{symbol}'" for symbol in reader.symbols)
            condition += f" AND symbol IN ({names})"
        assert reader.seen == await stored(database, condition), (reader.options, reader.cuts, reader.restarts)
    cuts, restarts = sum(reader.cuts for reader in readers), sum(reader.restarts for reader in readers)
    ticks = max(reader.seen.total() for reader in readers)
    return f"{len(readers)} clients, {cuts} cuts, {restarts} began again, up to {ticks} ticks each"


@pytest.fixture
async def world(request: pytest.FixtureRequest, database: str, writer_url: str) -> World:
    """Return the daemons of a database that refuses some ticks; they have written before any relay came."""
    await execute_all(database, "ALTER TABLE market.ticks ADD CONSTRAINT no_13 CHECK (volume <> 13)")
    world = World(request.param, database, writer_url)
    await world.write()
    return world


@pytest.mark.parametrize("world", range(SEEDS), indirect=True)
@pytest.mark.timeout(180 + JOINS)
@pytest.mark.usefixtures("_small_pieces")
async def test_each_client_sees_each_tick_once(world: World, database: str, tmp_path: Path) -> None:
    """No tick is lost or doubled, with late, equal and refused ones, cuts, kills and a pruned log."""
    token = await new_token(database, max_streams=10_000)
    async with _relays(database, tmp_path) as (addresses, relay):
        readers = await _join_at_random(world, addresses, token, JOINS // SEEDS, partial(_restart, relay))
    log.info(await _check(database, readers))
    assert sum(reader.cuts for reader in readers) > 0


@pytest.mark.parametrize("world", [SEEDS], indirect=True)
@pytest.mark.usefixtures("_small_pieces")
async def test_a_killed_server(world: World, database: str, tmp_path: Path, process: ServerProcess) -> None:
    """A server that is killed, and comes back, loses and doubles nothing for the clients either."""
    token = await new_token(database, max_streams=10_000)
    async with _relays(database, tmp_path) as (addresses, relay):
        breaks = partial(_restart_server, process), partial(_restart, relay)
        await _check(database, await _join_at_random(world, addresses, token, 12, *breaks))
