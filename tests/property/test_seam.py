"""Random joins of a relay while ticks are committed: each client sees each stored tick of its range exactly once."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest

from ingestor.batch import Batcher
from ingestor.clock import from_datetime, to_datetime
from ingestor.model import SECOND, Batch, Micros, Tick
from ingestor.relay import hub, subscription
from ingestor.relay.server import UNAVAILABLE
from ingestor.service.relay import Relay
from ingestor.store import record
from ingestor.store.ticks import TickStore
from tests.integration.test_store import session
from tests.relays import Client, Seen, new_token, relaying, stored
from tests.servers import execute_all, query

JOINS = int(os.environ.get("INGESTOR_TEST_JOINS", "60"))
SEEDS = 3
BASE: Micros = from_datetime(datetime(2026, 3, 2, tzinfo=UTC))
SPAN = 600
"""Microseconds in which all ticks arrive: so many of them arrive at once."""

SYMBOLS = ("A", "B", "C", "Ω")
END = Tick("END", BASE, 1.0, 1)
KILL = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE application_name LIKE 'ingestor relay%' AND datname = current_database()"
)


@dataclass
class Reader:
    """One client, which goes on from its cursor when its connection was cut."""

    options: dict[str, str]
    symbols: tuple[str, ...]
    since: Micros
    random: random.Random
    seen: Counter[Seen] = field(default_factory=Counter)
    cuts: int = 0
    connections: list[Client] = field(default_factory=list)

    async def read(self, relays: list[Relay], token: str) -> None:
        """Read until the last tick has come, over as many connections as that takes."""
        cursor = ""
        while not self.seen[self._end()]:
            relay = relays[self.cuts % len(relays)]
            resume = {"resume": cursor} if cursor else {}
            async with Client(relay.server.url, token, **self.options, **resume) as client:
                self.connections.append(client)
                await client.until(self._is_over, 60)
                assert client.error in {"", UNAVAILABLE}
                if self._end() not in client.seen and client.prices:  # as if it had not kept the last ones
                    del client.messages[self.random.randint(1, len(client.messages)) :]
                self.seen += client.seen
                cursor = client.cursor if client.prices else cursor

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

    async def write(self) -> None:
        """Let both daemons commit something at the same time."""
        await asyncio.gather(*(self._write(number) for number in range(2) if self.random.random() < 0.8))

    async def _write(self, number: int) -> None:
        if self.random.random() < 0.1:  # a restart: the fast way is tried again
            await self._stores[number].close()
            self._stores[number] = TickStore(self._writer_url, write_timeout=20)
        await self._stores[number].write([self._batch(number) for _ in range(self.random.randint(1, 3))])

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

    async def kill(self) -> None:
        """End the relays' connections to the database."""
        await query(self._url, KILL)

    async def end(self) -> None:
        """Commit the last tick."""
        batcher = Batcher(session(), max_rows=5000, occurrence_keys=1000)
        batcher.add(END, BASE + SPAN + SECOND)
        await self._stores[0].write([batcher.close()])
        for store in self._stores:
            await store.close()

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
        return Reader(options, symbols, since, random.Random(self.random.random()))


@pytest.fixture
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pages and slices end within ticks that arrived at once."""
    monkeypatch.setattr(subscription, "PAGE", 7)
    monkeypatch.setattr(subscription, "SLICE", 3)
    monkeypatch.setattr(hub, "SLICE", 4)
    monkeypatch.setattr(record, "MAX_ENTRIES", 3)


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.timeout(120 + JOINS)
@pytest.mark.usefixtures("_small_pieces")
async def test_each_client_sees_each_tick_once(seed: int, database: str, writer_url: str) -> None:
    """Sessions overlap, ticks are late, equal, refused; connections are cut: no tick is lost or doubled."""
    await execute_all(database, "ALTER TABLE market.ticks ADD CONSTRAINT no_13 CHECK (volume <> 13)")
    token = await new_token(database, max_streams=10_000)
    world = World(seed, database, writer_url)
    readers: list[Reader] = []
    reading: list[asyncio.Task[None]] = []
    await world.write()  # before any relay
    async with relaying(database, relay_max_clients=10_000) as one, relaying(database, relay_max_clients=10_000) as two:
        while len(readers) < JOINS // SEEDS:
            await world.write()
            action = world.random.random()
            if action < 0.5:
                readers.append(world.reader())
                reading.append(asyncio.create_task(readers[-1].read([one, two], token)))
            elif action < 0.7 and readers:
                world.random.choice(readers).cut()
            elif action < 0.75:
                await world.kill()
        await world.end()
        await asyncio.gather(*reading)
    for reader in readers:
        condition = f"received_at >= '{to_datetime(reader.since).isoformat()}'"
        if reader.symbols:
            names = ", ".join(f"'{symbol}'" for symbol in reader.symbols)
            condition += f" AND symbol IN ({names})"
        assert reader.seen == await stored(database, condition), (reader.options, reader.cuts)
    assert sum(reader.cuts for reader in readers) > 0
