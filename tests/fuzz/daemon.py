"""A daemon with a real database, fed by a hostile stream, accounts for each message that it has certainly read.

Those are the messages before a ping that it answered. Each of them is a tick, stored with its number among equal ones,
or a rejection with its bytes. Nothing is stored twice or without having been sent, and no half-sent message is covered.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias, cast
from zoneinfo import ZoneInfo

from ingestor.model import RAW_LIMIT, SECOND, Micros, Tick
from ingestor.protocol.messages import AUTHENTICATED, price_message
from ingestor.stream.decoder import Decoder, Refused
from tests.fuzz import decoder
from tests.fuzz.frames import FIN, PING, TEXT, Deflater, ending, frame, message
from tests.fuzz.server import Client, serving
from tests.fuzz.target import Case, Counts
from tests.recording import running, settings
from tests.servers import TestServer, execute_all, plain_server, query

ZONE = ZoneInfo("Pacific/Auckland")
EMPTY = "TRUNCATE market.ticks, ingest.rejected_messages, ingest.stream_sessions"
_TICKS = """
SELECT symbol, (extract(epoch FROM time) * 1000000)::bigint, price, volume, count(*), max(occurrence)
FROM market.ticks GROUP BY 1, 2, 3, 4
"""
_REJECTED = """
SELECT raw, raw_bytes FROM ingest.rejected_messages WHERE session_id = '{session}' ORDER BY batch, position
"""
_SESSIONS = """
SELECT id, ticks, rejected, (extract(epoch FROM covered_until) * 1000000)::bigint
FROM ingest.stream_sessions ORDER BY connected_at
"""
_COUNTED = "SELECT coalesce(sum(ticks - duplicates), 0)::bigint FROM ingest.stream_sessions"

Key: TypeAlias = tuple[str, Micros, float, int]


@dataclass
class Account:
    """The messages of one connection in order: a tick's key, or the bytes of a rejection."""

    sent: list[Key | bytes] = field(default_factory=list)
    before: dict[bytes, int] = field(default_factory=dict)
    pings: int = 0
    sure: int = 0
    """The number of messages of `sent` that the daemon has certainly read."""
    half_at: Micros | None = None
    """A message that began before this moment was never finished; the daemon had its beginning by then."""

    def ping(self) -> bytes:
        """Return a ping: its pong proves that all messages before it were read."""
        self.pings += 1
        payload = f"ping {self.pings}".encode()
        self.before[payload] = len(self.sent)
        return frame(FIN | PING, payload)

    def prove(self, payload: bytes) -> None:
        """Record a pong, which may also answer the pings before it (RFC 6455, 5.5.3)."""
        self.sure = self.before[payload]
        self.before = dict(list(self.before.items())[list(self.before).index(payload) + 1 :])

    async def answered(self) -> None:
        """Wait until all pings are answered."""
        async with asyncio.timeout(30):
            while self.before:
                await asyncio.sleep(0.005)

    def ticks(self, number: int | None = None) -> Counter[Key]:
        """Return how often each tick is among the first messages."""
        return Counter(each for each in self.sent[:number] if isinstance(each, tuple))

    def rejected(self, number: int | None = None) -> list[bytes]:
        """Return the rejections among the first messages."""
        return [each for each in self.sent[:number] if isinstance(each, bytes)]


def _tick(chance: random.Random) -> Tick:
    """Draw a tick that is likely to equal another one."""
    moment = (int(time.time()) - chance.randrange(2)) * SECOND
    return Tick(chance.choice(("AIR.NZ", "É.NZ")), moment, chance.choice((0.5, 2.61, 3.0)), chance.choice((0, 1, 5000)))


def _draw(chance: random.Random, reference: Decoder) -> tuple[bytes, bool, Key | bytes] | None:
    """Draw a message, whether it is binary, and its outcome; None if it would be a message of the server itself."""
    if chance.random() < 0.8:
        tick = _tick(chance)
        return price_message(tick, ZONE), False, (tick.symbol, tick.time, tick.price, tick.volume)
    payload, binary = decoder.draw(chance), chance.random() < 0.2
    if binary:
        return payload, True, payload
    match reference.decode(payload, time.time_ns() // 1000):
        case Tick() as tick:
            return payload, False, (tick.symbol, tick.time, tick.price, tick.volume)
        case Refused():
            return payload, False, payload
        case _:
            return None


async def _talk(client: Client, account: Account, chance: random.Random, last: asyncio.Event | None) -> int:
    """Accept a client, send it drawn messages, and end in some way; a `last` client is marked and kept.

    Return the number of frames.
    """
    client.on_pong = account.prove
    greeting = await client.accept()
    token = asyncio.Event()
    client.on_message = lambda _: token.set()
    client.listen()
    await client.send(greeting)
    await token.wait()
    reference = Decoder(str(ZONE))
    frames = [frame(FIN | TEXT, AUTHENTICATED)]
    for _ in range(chance.choice((0, 50, 500))):
        frames += _more(account, chance, reference, client.deflate)
    await client.send(b"".join([*frames, account.ping()]))
    await account.answered()
    if chance.random() < 0.3:
        await _leave_half_sent(client, account)
    if last is not None:
        last.set()
        await client.gone()
        return len(frames)
    end = ending(chance, deflates=client.deflate is not None)
    if account.half_at is None:
        some = [each for _ in range(5) for each in _more(account, chance, reference, client.deflate)]
        await client.send(b"".join(some) + end.wire, is_last=True)
    if end.is_reset:
        client.reset()
    else:
        client.finish()
        await client.gone()
    return len(frames)


def _more(account: Account, chance: random.Random, reference: Decoder, deflate: Deflater | None) -> list[bytes]:
    """Return the frames of one more message, or sometimes a ping."""
    if chance.random() < 0.05:
        return [account.ping()]
    drawn = _draw(chance, reference)
    if drawn is None:
        return []
    payload, binary, outcome = drawn
    account.sent.append(outcome)
    return message(payload, chance, binary=binary, deflate=deflate)


async def _leave_half_sent(client: Client, account: Account) -> None:
    """Begin a message, and let many pings of the daemon be answered, but never finish it."""
    await client.send(frame(TEXT, b'{"type": "price"') + account.ping())
    await account.answered()
    account.half_at = time.time_ns() // 1000
    await asyncio.sleep(0.4)


async def _compare(url: str, accounts: list[Account]) -> None:
    """Compare the sent messages with the stored rows."""
    sessions = await query(url, _SESSIONS)
    assert len(accounts) - 1 <= len(sessions) <= len(accounts), f"{len(accounts)} connections, {len(sessions)} sessions"
    least: Counter[Key] = Counter()
    most: Counter[Key] = Counter()
    for account, (session, ticks, rejected, covered_until) in zip(accounts, sessions, strict=False):
        least |= account.ticks(account.sure)
        most |= account.ticks()
        kept = await query(url, _REJECTED.format(session=session))
        counted = f"{ticks} ticks and {rejected} rejections are counted"
        assert account.sure <= ticks + rejected, f"{account.sure} messages were certainly read, but {counted}"
        assert ticks + rejected <= len(account.sent), f"{len(account.sent)} messages were sent, but {counted}"
        assert rejected == len(kept), f"{rejected} rejections are counted, but {len(kept)} are stored"
        assert len(kept) >= len(account.rejected(account.sure)), "a rejection is missing"
        expected = [(payload[:RAW_LIMIT], len(payload)) for payload in account.rejected()]
        for found, sent in zip(kept, expected, strict=False):
            assert found == sent, f"{sent!r:.200} was sent, but {found!r:.200} is stored"
        if account.half_at is not None and covered_until is not None:
            over = (covered_until - account.half_at) / SECOND
            assert over <= 0, f"a half-sent message is covered, {over:.3f} s beyond its beginning"
    rows = {row[:4]: (row[4], row[5]) for row in await query(url, _TICKS)}
    for key, (count, highest) in rows.items():
        assert count == highest, f"{key} is numbered up to {highest}, but stored {count} times"
        assert count <= most[key], f"{key} was sent {most[key]} times at most, but is stored {count} times"
    for key, count in least.items():
        assert rows.get(key, (0, 0))[0] >= count, f"{key} was read {count} times, but is stored as {rows.get(key)}"
    ((counted,),) = await query(url, _COUNTED)
    stored = sum(count for count, _ in rows.values())
    assert counted == stored, f"the sessions count {counted} new ticks, but {stored} are stored"


@asynccontextmanager
async def on_database(writer_url: str, owner_url: str, directory: Path) -> AsyncIterator[Case]:
    """Test daemons on a database, which is emptied for each of them."""

    async def case(chance: random.Random) -> Counts:
        await execute_all(owner_url, EMPTY)
        accounts: list[Account] = []
        connections = chance.randint(1, 4)
        last = asyncio.Event()
        counts: Counts = Counter()

        async def talk(client: Client) -> None:
            account = Account()
            accounts.append(account)
            is_last = len(accounts) >= connections
            try:
                frames = await _talk(client, account, chance, last if is_last else None)
                counts.update(frames=frames, pieces=client.pieces)
            except Exception:
                last.set()
                raise

        async with serving(talk, chance) as url:
            configuration = settings(cast("Any", SimpleNamespace(stream_url=url)), writer_url, spool_dir=directory)
            async with running(configuration):
                await last.wait()
        await _compare(owner_url, accounts)
        counts.update(messages=sum(account.sure for account in accounts), connections=len(accounts))
        return counts

    yield case


@asynccontextmanager
async def target(directory: Path) -> AsyncIterator[Case]:
    """Start a server with a migrated database."""
    with plain_server() as url:
        server = TestServer(url, "plain")
        await server.prepare()
        name = server.new_name()
        owner_url = await server.create(name, server.template)
        try:
            async with on_database(server.writer_url(owner_url), owner_url, directory) as case:
                yield case
        finally:
            await server.drop(name)
            await server.close()
