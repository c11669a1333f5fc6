from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory

from ingestor.clock import to_datetime
from ingestor.service.relay import Relay
from ingestor.store.ticks import TickStore
from tests.integration.test_store import T0, batcher, filled, tick
from tests.relays import Client, new_token, relaying, stored
from tests.servers import query

START = to_datetime(T0).isoformat()


@pytest.fixture
async def store(writer_url: str) -> AsyncIterator[TickStore]:
    store = TickStore(writer_url, write_timeout=10)
    yield store
    await store.close()


@pytest.fixture
async def relay(database: str) -> AsyncIterator[Relay]:
    async with relaying(database) as relay:
        yield relay


@pytest.fixture
async def token(database: str) -> str:
    return await new_token(database)


async def test_live_ticks_in_the_order_of_commits(store: TickStore, relay: Relay, token: str) -> None:
    """A client without options gets each tick after its commit, in the documented form with the exchange's offset."""
    await store.write([filled(batcher(), tick("BEFORE"))])
    async with Client(relay.server.url, token) as client:
        await client.authenticated()
        await store.write([filled(batcher(), tick("B", price=2.61), tick("A", time=T0 + 1, price=3.0))])
        await store.write([filled(batcher(), tick('"Ω', price=1e300, volume=2**62))])
        prices = await client.received(3)
    assert client.messages[0]["type"] == "authenticated"
    assert prices == [
        {"date": "2026-03-02T13:00:00+13:00", "price": 2.61, "volume": 10, "symbol": "B"},
        {"date": "2026-03-02T13:00:00.000001+13:00", "price": 3.0, "volume": 10, "symbol": "A"},
        {"date": "2026-03-02T13:00:00+13:00", "price": 1e300, "volume": 2**62, "symbol": '"Ω'},
    ]


async def test_from_the_record_into_live(store: TickStore, relay: Relay, token: str, database: str) -> None:
    """A client with from gets what is stored from then on, late ticks and live ones: each once."""
    one = batcher()
    await store.write([filled(one, *(tick(f"S{number}") for number in range(50)))])
    since = to_datetime(T0 + 10).isoformat()
    async with Client(relay.server.url, token, **{"from": since, "meta": "1"}) as client:
        prices = await client.received(40)
        assert [price["symbol"] for price in prices] == [f"S{number}" for number in range(10, 50)]
        await store.write([filled(batcher(), tick("EARLY"))])
        late = batcher()
        late.add(tick("LATE"), T0 + 20)
        await store.write([late.close()])
        await client.received(41)
        assert client.seen == await stored(database, f"received_at >= '{since}'")


async def test_symbols_and_to(store: TickStore, relay: Relay, token: str) -> None:
    """The options symbols and to choose ticks; behind a to in the past, the stream is closed with 1000."""
    await store.write([filled(batcher(), *(tick(symbol) for symbol in "ABCABC"))])
    options = {"from": START, "to": to_datetime(T0 + 4).isoformat(), "symbols": "A,C,UNKNOWN"}
    async with Client(relay.server.url, token, **options) as client:
        assert await client.ended() == 1000
    assert [price["symbol"] for price in client.prices] == ["A", "C", "A"]


@pytest.mark.parametrize("at", [0, 1, 2, 5, 6, 7])
async def test_resuming_by_a_cursor(store: TickStore, relay: Relay, token: str, database: str, at: int) -> None:
    """A client that goes on from any cursor, of the record or live, misses nothing and gets nothing twice."""
    await store.write([filled(batcher(), *(tick(symbol) for symbol in "AB"))])
    await store.write([filled(batcher(), *(tick(symbol) for symbol in "CD"))])  # the same arrivals
    async with Client(relay.server.url, token, **{"from": START, "meta": "1"}) as client:
        await client.received(4)
        await store.write([filled(batcher(), *(tick(symbol) for symbol in "EFGH"))])
        prices = await client.received(8)
    first = prices[: at + 1]
    await store.write([filled(batcher(), tick("I"))])
    async with Client(relay.server.url, token, resume=first[-1]["cursor"], meta="1") as client:
        await client.received(9 - len(first))
        await store.write([filled(batcher(), tick("J"))])
        rest = await client.received(10 - len(first))
    found = [price["symbol"] for price in [*first, *rest]]
    assert sorted(found) == list("ABCDEFGHIJ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"from": "2026-03-02T00:00:00"}, "offset"),
        ({"from": "2999-03-02T00:00:00Z"}, "future"),
        ({"from": "2026-02-30T00:00:00Z"}, "no such instant"),
        ({"form": "2026-03-02T00:00:00Z"}, "no option 'form'"),
        ({"from": START, "to": START}, "later than from"),
        ({"speed": "0"}, "speed"),
        ({"symbols": ","}, "symbols"),
        ({"gaps": "yes"}, "gaps"),
        ({"resume": "nonsense"}, "not a cursor"),
        ({"resume": "00000000.1.0"}, "use from"),
    ],
    ids=str,
)
async def test_wrong_options(relay: Relay, token: str, options: dict[str, str], words: str) -> None:
    """A wrong option gets an error in the protocol's form, and the connection is closed."""
    async with Client(relay.server.url, token, **options) as client:
        assert await client.ended() == 1000
    assert words in client.error


async def test_tokens(relay: Relay, token: str, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong, revoked and expired tokens are refused; a token that is revoked ends its streams."""
    async with Client(relay.server.url, "rk_wrong_token_00001") as client:
        await client.ended()
    assert "not authorised" in client.error
    expired = await new_token(database, "expired", lifetime=timedelta(0))
    async with Client(relay.server.url, expired) as client:
        await client.ended()
    assert "not authorised" in client.error
    async with Client(relay.server.url, token) as client:
        await client.authenticated()
        relay.server.end_all_but(set())
        await client.ended()
    assert "not authorised" in client.error
    assert token.encode() not in b"".join(
        row[0] for row in await query(database, "SELECT hash FROM ingest.relay_tokens")
    )


async def test_the_limit_of_streams(relay: Relay, database: str) -> None:
    """One stream more than the token's limit gets the documented error; after one has left, there is room again."""
    token = await new_token(database, "one", max_streams=1)
    async with Client(relay.server.url, token) as first:
        await first.authenticated()
        async with Client(relay.server.url, token) as second:
            await second.ended()
        assert second.error == "You have reached the stream limit of 1 of your plan"
    async with asyncio.timeout(10):
        while relay.server.clients:
            await asyncio.sleep(0.01)
    async with Client(relay.server.url, token) as third:
        await third.authenticated()
        assert third.kinds == ["authenticated"]


async def test_a_slow_client_loses_nothing(store: TickStore, database: str, token: str) -> None:
    """A client that does not read for a while is served from the log, and has every tick in the end, each once."""
    async with relaying(database, relay_client_buffer=4096) as relay:
        async with (
            Client(relay.server.url, token, meta="1", gaps="1") as slow,
            Client(relay.server.url, token, meta="1") as quick,
        ):
            await slow.authenticated()
            await quick.authenticated()
            assert slow.connection is not None
            slow.connection.transport.pause_reading()
            total = await flood(store, lambda: relay.telemetry.counts.fallen_back > 0)
            await quick.received(total)
            assert relay.hub.live == 1
            slow.connection.transport.resume_reading()
            await slow.received(total)
            assert slow.seen == quick.seen
            assert slow.kinds.count("lagging") == 1
            async with asyncio.timeout(10):
                while relay.hub.live < 2:
                    await asyncio.sleep(0.01)


async def test_a_client_that_accepts_nothing(store: TickStore, database: str, token: str) -> None:
    """A client that accepts nothing for the time limit is closed, and the others notice nothing."""
    async with relaying(database, relay_client_buffer=4096, stuck_after=0.2) as relay:
        async with Client(relay.server.url, token) as client, Client(relay.server.url, token) as other:
            await client.authenticated()
            await other.authenticated()
            assert client.connection is not None
            client.connection.transport.pause_reading()
            total = await flood(store, lambda: relay.telemetry.counts.stuck > 0)
            await other.received(total)


async def flood(store: TickStore, is_enough: Callable[[], bool]) -> int:
    """Write distinct ticks until a condition holds; return their number."""
    one, total = batcher(), 0
    async with asyncio.timeout(60):
        while not is_enough():
            await store.write([filled(one, *(tick(f"S{total + number}") for number in range(5000)))])
            total += 5000
    return total


async def test_a_lost_connection_to_the_log(store: TickStore, relay: Relay, token: str, database: str) -> None:
    """When the server ends the relay's connections, clients stay and get every tick once."""
    async with Client(relay.server.url, token, meta="1") as client:
        await client.authenticated()
        one = batcher()
        for number in range(5):
            await store.write([filled(one, tick(f"S{number}"))])
            await query(
                database,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'ingestor relay%' "
                "AND datname = current_database()",
            )
        await store.write([filled(one, tick("LAST"))])
        await client.received(6)
        assert client.seen == await stored(database)


async def test_the_lag_is_the_age_of_the_newest_commit(
    store: TickStore, relay: Relay, token: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit that waited in the log is handed out with its age by the database's clock; afterwards none waits."""
    lags: list[float] = []
    published = relay.telemetry.published

    def note(commits: int, *, lag: float) -> None:
        published(commits, lag=lag)
        lags.append(relay.telemetry.lag_seconds)

    monkeypatch.setattr(relay.telemetry, "published", note)
    async with Client(relay.server.url, token) as client:
        await client.authenticated()
        await store.write([filled(batcher(), tick("FIRST"))])
        await client.received(1)
        await query(
            database,
            "INSERT INTO ingest.tick_log (session_id, batch, ticks, rows, logged_at) "
            "SELECT session_id, batch, ticks, rows, clock_timestamp() - interval '100 s' FROM ingest.tick_log "
            "RETURNING 1",
        )
        await client.received(2)
        await store.write([filled(batcher(), tick("LAST"))])
        await client.received(3)
    fresh, waited, last = lags
    assert waited >= 100 > max(fresh, last)


async def test_gaps_are_marked(store: TickStore, relay: Relay, token: str, database: str) -> None:
    """With gaps=1, ticks that retention dropped are reported as a gap before the first tick that is left."""
    await query(database, "UPDATE ingest.settings SET ticks_since = '2026-03-01' RETURNING 1")
    await store.write([filled(batcher(), tick())])
    async with Client(relay.server.url, token, **{"from": "2026-02-01T00:00:00Z", "gaps": "1"}) as client:
        await client.received(1)
    (gap,) = (each for each in client.messages if each["type"] == "gap")
    expected: dict[str, Any] = {"from": "2026-02-01T00:00:00Z", "to": "2026-03-01T00:00:00Z"}
    assert gap["data"] == expected | {"cause": "retention", "status": "unfillable"}
    assert client.kinds == ["authenticated", "gap", "price"]


@pytest.mark.parametrize("compression", ["deflate", None])
async def test_an_offered_compression(store: TickStore, relay: Relay, token: str, compression: str | None) -> None:
    """The extension is agreed on if the client offers it; the frames are compressed only on request."""
    await store.write([filled(batcher(), *(tick(f"S{number}") for number in range(100)))])
    async with connect(
        f"{relay.server.url}?from={START.replace('+', '%2B')}", proxy=None, compression=compression
    ) as client:
        await client.send(json.dumps({"type": "authenticate", "data": {"token": token}}))
        assert [json.loads(await client.recv())["type"] for _ in range(101)] == ["authenticated"] + ["price"] * 100
        agreed = client.response.headers.get("Sec-WebSocket-Extensions", "") if client.response else ""
        assert agreed.startswith("permessage-deflate") == (compression == "deflate")


async def test_compressed_frames(store: TickStore, relay: Relay, token: str, database: str) -> None:
    """With compress=1, a client gets the same ticks, from the record and live, in fewer bytes."""
    one = batcher()
    await store.write([filled(one, *(tick(f"S{number}") for number in range(500)))])
    options = {"from": START, "meta": "1"}
    async with (
        Client(relay.server.url, token, **options) as plain,
        Client(relay.server.url, token, **options, compress="1") as compressed,
    ):
        await plain.received(500)
        await compressed.received(500)
        async with asyncio.timeout(10):
            while relay.hub.live < 2:
                await asyncio.sleep(0.01)
        await store.write([filled(one, *(tick(f"T{number}") for number in range(500)))])
        await plain.received(1000)
        await compressed.received(1000)
        assert compressed.messages[1:] == plain.messages[1:]
        assert compressed.seen == await stored(database)
    assert compressed.compressed == 1000
    assert plain.compressed == 0


@pytest.mark.parametrize(
    "offer", [None, {"server_no_context_takeover": True}, {"server_max_window_bits": 9}, {"server_max_window_bits": 8}]
)
async def test_compression_that_is_not_offered(
    store: TickStore, relay: Relay, token: str, offer: dict[str, Any] | None
) -> None:
    """A client that asks for compressed frames, but cannot read them, gets an error; without it, all is well."""
    extensions = None if offer is None else [ClientPerMessageDeflateFactory(**offer)]
    login = json.dumps({"type": "authenticate", "data": {"token": token}})
    url = f"{relay.server.url}?compress=1"
    async with connect(url, proxy=None, compression=None, extensions=extensions) as client:
        await client.send(login)
        assert "compress: offer" in str(await client.recv())
    async with connect(relay.server.url, proxy=None, compression=None, extensions=extensions) as client:
        await client.send(login)
        assert "authenticated" in str(await client.recv())
        await store.write([filled(batcher(), *(tick(f"S{number}") for number in range(10)))])
        assert [json.loads(await client.recv())["data"]["symbol"] for _ in range(10)] == [f"S{n}" for n in range(10)]
