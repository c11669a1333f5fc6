"""Bad input to the relay's port: each gets a clear error and a close, and other clients notice nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from ingestor.protocol import login
from ingestor.protocol.messages import NO_AUTHENTICATION, NOT_AUTHORISED
from ingestor.relay import server, subscription
from ingestor.relay.connection import BURST_BYTES, TOO_MUCH
from ingestor.relay.server import NOT_A_LOGIN, NOT_A_MESSAGE, PortOptions
from ingestor.service import relay as service
from ingestor.service.relay import Relay
from ingestor.store.relay_tokens import TokenStore
from ingestor.store.ticks import TickStore
from tests.commands import start
from tests.http import Window
from tests.integration.test_relay import START, flood
from tests.integration.test_store import T0, batcher, filled, tick
from tests.relays import PRUNE, Client, new_token, relaying, stored
from tests.servers import query

PORT = PortOptions("127.0.0.1", 0, max_clients=10, client_buffer=4096)
LOGIN = '{"type": "authenticate", "data": {"token": "%s"}}'


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


async def _answer(url: str, first: str | bytes) -> tuple[str, int | None]:
    """Send a first message; return the text of the error and the close code."""
    text = ""
    async with connect(url, proxy=None, compression=None) as client:
        try:
            await client.send(first)
            text = json.loads(await client.recv())["data"]["message"]
            await client.recv()
        except ConnectionClosed:
            pass
    return text, client.close_code


@pytest.mark.parametrize(
    "first",
    [
        LOGIN.encode() % b"rk_AAAAAAAAAAAAAAAAA",
        b"\x00\xff",
        "",
        "{",
        "[" * 2000,
        "[]",
        '{"type": "ping"}',
        '{"type": "authenticate", "data": {"token": 7}}',
        '{"type": "authenticate", "data": []}',
        LOGIN % ("x" * 5000),
    ],
    ids=range(10),
)
async def test_no_login(relay: Relay, first: str | bytes) -> None:
    """A first message that is no authentication gets an error that says so."""
    assert await _answer(relay.server.url, first) == (NOT_A_LOGIN, 1000)


async def test_a_huge_first_message(relay: Relay) -> None:
    """A message far beyond the limit is not even read; the close code says why."""
    assert await _answer(relay.server.url, "x" * 40_000) == ("", 1009)


async def test_tokens_of_another_form(relay: Relay, database: str) -> None:
    """The provider's token, texts of another length and strange letters are refused like a wrong token."""
    for wrong in ("pk_AAAAAAAAAAAAAAAAA", "rk_", "", "rk_" + "Ω" * 17, "rk_\\ud800" + "A" * 16, "rk_" + "\0" * 17):
        first = json.dumps({"type": "authenticate", "data": {"token": wrong}})
        assert (await _answer(relay.server.url, first))[0] == NOT_AUTHORISED
        relay.server._failures._counts.clear()
    assert relay.telemetry.counts.refused == {"token": 6}


async def test_silence_instead_of_a_login(database: str) -> None:
    """A client that does not authenticate in time gets an error."""
    port = PortOptions("127.0.0.1", 0, 10, 4096, authentication_timeout=0.2)
    async with relaying(database, port=port) as relay, connect(relay.server.url, proxy=None) as client:
        assert NO_AUTHENTICATION in str(await client.recv())
        with pytest.raises(ConnectionClosed):
            await client.recv()


async def test_silence_instead_of_a_handshake(database: str) -> None:
    """A connection without a handshake is closed in time, too."""
    port = PortOptions("127.0.0.1", 0, 10, 4096, authentication_timeout=0.2)
    async with relaying(database, port=port) as relay:
        parts = urlsplit(relay.server.url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(b"GET /ws HTTP/1.1\r\nHost: x\r\n")
        assert await asyncio.wait_for(reader.read(), 20) == b""
        writer.close()


@pytest.mark.parametrize("later", [b"\0", "{", "[]", '"ping"', '{"type": "%s"}' % ("x" * 5000)], ids=range(5))
async def test_bad_messages_later(store: TickStore, relay: Relay, token: str, later: str | bytes) -> None:
    """After the login, a client may send short JSON objects; anything else ends its stream, and no other one."""
    async with Client(relay.server.url, token) as bad, Client(relay.server.url, token) as good:
        await bad.authenticated()
        await good.authenticated()
        assert bad.connection is not None
        assert good.connection is not None
        await bad.connection.send('{"type": "ping"}')
        await good.connection.send('{"type": "ping"}')
        await bad.connection.send(later)
        assert await bad.ended() == 1008
        assert bad.error == NOT_A_MESSAGE
        await store.write([filled(batcher(), tick())])
        await good.received(1)
        assert good.kinds == ["authenticated", "price"]


async def test_a_client_that_sends_too_much(store: TickStore, relay: Relay, token: str) -> None:
    """A client that floods the relay, even with pings, is closed, and the others notice nothing."""
    async with Client(relay.server.url, token) as bad, Client(relay.server.url, token) as good:
        await bad.authenticated()
        await good.authenticated()
        assert bad.connection is not None
        ping = b"\x89\x80\0\0\0\0"
        for _ in range(BURST_BYTES // len(ping) // 1000 + 2):
            bad.connection.transport.write(ping * 1000)
        code = await bad.ended()
        assert (bad.error, code) == (TOO_MUCH, 1008) or code == 1006  # a reset may overtake the error
        await store.write([filled(batcher(), tick())])
        await good.received(1)


async def test_too_much_before_the_handshake(relay: Relay) -> None:
    """A flood instead of a handshake is closed."""
    parts = urlsplit(relay.server.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(b"GET /ws HTTP/1.1\r\n" + b"x: " + b"y" * BURST_BYTES)
    with contextlib.suppress(ConnectionResetError):
        assert b"101" not in await asyncio.wait_for(reader.read(), 20)
    writer.close()


async def test_a_flood_of_connections(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While too many connections wait for their authentication, further ones get HTTP 503; streams go on."""
    monkeypatch.setattr(server, "MAX_UNAUTHENTICATED", 3)
    token = await new_token(database)
    async with relaying(database) as relay, Client(relay.server.url, token) as first:
        await first.authenticated()
        waiting = [await connect(relay.server.url, proxy=None) for _ in range(3)]
        with pytest.raises(InvalidStatus, match="503") as refused:
            await connect(relay.server.url, proxy=None)
        assert b"Too many connections" in refused.value.response.body
        parts = urlsplit(relay.server.url)
        silent = [await asyncio.open_connection(parts.hostname, parts.port) for _ in range(4)]
        ends = [asyncio.create_task(reader.read()) for reader, _ in silent]
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED, timeout=20)
        assert done
        for _, writer in silent:
            writer.transport.abort()
        for each in waiting:
            each.transport.abort()
        await asyncio.gather(*ends, return_exceptions=True)
        async with asyncio.timeout(20):
            while relay.server._lobby._counts:
                await asyncio.sleep(0.01)
        async with Client(relay.server.url, token) as second:
            await second.authenticated()
        assert not first.is_closed


async def test_the_limit_of_the_relay(database: str) -> None:
    """One stream more than the relay's limit gets the documented error, with that limit."""
    async with relaying(database, relay_max_clients=1) as relay:
        one, two = await new_token(database, "one"), await new_token(database, "two")
        async with Client(relay.server.url, one) as first:
            await first.authenticated()
            async with Client(relay.server.url, two) as second:
                await second.ended()
    assert second.error == "You have reached the stream limit of 1 of your plan"


async def test_a_half_open_client(database: str) -> None:
    """A client that answers no ping is closed, and leaves room for another."""
    port = PortOptions("127.0.0.1", 0, 10, 4096, ping_interval=0.05, pong_timeout=0.3)
    token = await new_token(database, max_streams=1)
    async with relaying(database, port=port) as relay:
        async with Client(relay.server.url, token) as client:
            await client.authenticated()
            assert client.connection is not None
            client.connection.transport.pause_reading()
            async with asyncio.timeout(20):
                while relay.server.clients:
                    await asyncio.sleep(0.01)
            client.connection.transport.resume_reading()
            assert await client.ended() in {1006, 1011}
        async with Client(relay.server.url, token) as client:
            await client.authenticated()
            await asyncio.sleep(0)
            assert client.error == ""


@pytest.mark.parametrize("reads", [True, False])
async def test_a_token_that_is_revoked_while_streaming(
    store: TickStore,
    database: str,
    monkeypatch: pytest.MonkeyPatch,
    reads: bool,
) -> None:
    """The stream of a revoked token ends at the next check, also that of a client that does not read."""
    monkeypatch.setattr(service, "TOKEN_SECONDS", 0.05)
    monkeypatch.setattr(login, "SEND_TIMEOUT", 0.2)
    monkeypatch.setattr(server, "SEND_TIMEOUT", 0.2)
    revoked, valid = await new_token(database, "revoked"), await new_token(database, "valid")
    async with relaying(database, relay_client_buffer=4096) as relay:
        async with Client(relay.server.url, revoked) as client, Client(relay.server.url, valid) as other:
            await client.authenticated()
            await other.authenticated()
            assert client.connection is not None
            if not reads:
                client.connection.transport.pause_reading()
                await flood(store, lambda: relay.telemetry.counts.fallen_back > 0)
            assert await TokenStore(database).revoke("revoked")
            async with asyncio.timeout(20):
                while relay.server.clients > 1:
                    await asyncio.sleep(0.01)
            client.connection.transport.resume_reading()
            await client.ended()
            assert not reads or client.error == NOT_AUTHORISED
            assert not other.is_closed


async def test_a_record_that_cannot_be_read(store: TickStore, relay: Relay, token: str, database: str) -> None:
    """A failed read for a client is counted for the operator; the stream goes on once the record can be read."""
    await store.write([filled(batcher(), tick())])
    await query(database, "ALTER VIEW market.gaps RENAME TO hidden")
    async with Client(relay.server.url, token, **{"from": START, "gaps": "1"}) as client:
        async with asyncio.timeout(20):
            while not relay.telemetry.counts.read_failures:
                await asyncio.sleep(0.01)
        assert client.kinds == ["authenticated"]
        await query(database, "ALTER VIEW market.hidden RENAME TO gaps")
        assert len(await client.received(1)) == 1


async def test_before_the_record(store: TickStore, relay: Relay, token: str) -> None:
    """A `from` long before the first tick is answered with all that there is."""
    await store.write([filled(batcher(), tick("A"), tick("B"))])
    for since in ("0001-01-01T00:00:00Z", "1969-12-31T23:59:59-12:00"):
        async with Client(relay.server.url, token, **{"from": since, "gaps": "1"}) as client:
            await client.received(2)
            assert client.kinds == ["authenticated", "price", "price"]


async def test_retention_while_a_client_reads(
    store: TickStore,
    relay: Relay,
    token: str,
    database: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ticks that retention drops while a client is on its way to them are marked as a gap."""
    monkeypatch.setattr(subscription, "LONGEST_WAIT", 0.05)
    one = batcher()
    for number, symbol in enumerate("ABC"):
        one.add(tick(symbol), T0 + 3_600_000_000 * number)
    await store.write([one.close()])
    async with Client(relay.server.url, token, **{"from": START, "gaps": "1", "speed": "1"}) as client:
        await client.received(1)
        await query(
            database,
            "WITH dropped AS (DELETE FROM market.ticks WHERE symbol = 'B') "
            "UPDATE ingest.settings SET ticks_since = '2026-03-02T01:30:00Z' RETURNING 1",
        )
        await client.until(lambda client: "gap" in client.kinds)
    assert client.kinds == ["authenticated", "price", "gap"]
    gap = client.messages[-1]["data"]
    assert (gap["to"], gap["cause"]) == ("2026-03-02T01:30:00Z", "retention")
    assert "2026-03-02T00:00:00" < gap["from"] < "2026-03-02T01:00:00"


async def test_a_replay_at_a_speed_keeps_its_place_in_the_log(
    store: TickStore,
    relay: Relay,
    token: str,
    database: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While a replay waits for its next tick, maybe overnight, it reads the log, so pruning takes nothing from it."""
    monkeypatch.setattr(subscription, "LONGEST_WAIT", 0.05)
    one = batcher()
    one.add(tick("A"), T0)
    one.add(tick("B"), T0 + 1)
    one.add(tick("NIGHT"), T0 + 12 * 3_600_000_000)
    await store.write([one.close()])
    async with Client(relay.server.url, token, **{"from": START, "speed": "1", "meta": "1"}) as client:
        await client.received(2)
        for number in range(3):
            late = batcher()
            late.add(tick(f"LATE{number}"), T0 + 2)
            await store.write([late.close()])
            await client.received(3 + number)
            await query(database, PRUNE)
        assert client.seen == await stored(database, "symbol <> 'NIGHT'")


async def test_the_log_is_pruned_under_a_slow_client(database: str, store: TickStore, token: str) -> None:
    """A client that is too slow for the log gets an error, never a stream with a hole."""
    async with relaying(database, relay_client_buffer=4096) as relay:
        async with Client(relay.server.url, token, meta="1") as slow, Client(relay.server.url, token) as quick:
            await slow.authenticated()
            await quick.authenticated()
            assert slow.connection is not None
            slow.connection.transport.pause_reading()
            await flood(store, lambda: relay.telemetry.counts.fallen_back > 0)
            await store.write([filled(batcher(), tick("LAST"))])
            await quick.until(lambda client: client.prices[-1]["symbol"] == "LAST")
            await query(database, PRUNE)
            slow.connection.transport.resume_reading()
            await slow.ended()
            assert "too slow" in slow.error
            assert "use from" in slow.error
            have = [price["symbol"] for price in slow.prices]
            assert have == [price["symbol"] for price in quick.prices][: len(have)]


async def test_a_lost_registration(store: TickStore, relay: Relay, token: str, database: str) -> None:
    """A relay that was not registered for an hour ends all streams with an error: its clients may have a hole."""
    async with Client(relay.server.url, token) as client:
        await client.authenticated()
        await query(database, "UPDATE ingest.relays SET seen_at = now() - interval '2 hours' RETURNING 1")
        await store.write([filled(batcher(), tick("UNLOGGED"))])
        relay._report_at = 0.0
        await store.write([filled(batcher(), tick("UNLOGGED2"))])
        assert await client.ended() == 1013
        assert "began again" in client.error
        assert client.prices == []
    async with Client(relay.server.url, token, **{"from": START}) as client:
        await client.received(2)
        await store.write([filled(batcher(), tick("LOGGED"))])
        await client.received(3)


async def test_nothing_logs_a_token(database: str) -> None:
    """A token in the query, in a header, in the path or in a bad message is in no log line and no metric."""
    token = await new_token(database)
    process = await start(
        "relay", DATABASE_URL=database, RELAY_PORT="0", RELAY_HTTP_PORT="0", LOG_FORMAT="json", LOG_LEVEL="debug"
    )
    assert process.stderr is not None
    text = ""
    async with asyncio.timeout(30):
        while "relay_following" not in text:
            text += (await process.stderr.readline()).decode()
    (url,) = re.findall(r'"(ws://[^"]*)"', text)
    (health,) = re.findall(r'"(http://[^"]*)"', text)
    for query_ in (f"?token={token}", f"?{token}", f"?{token}=1", f"?resume={token}", f"?from={token}"):
        async with Client(url + query_, token) as client:
            assert await client.ended() == 1000
            assert client.error
    for first in (token, f"[{token!r}]", LOGIN % token[:-1], LOGIN % (token + "A"), token.encode()):
        assert (await _answer(url, first))[0]
    for path, headers in (
        (url.replace("/ws", f"/{token}"), {}),
        (f"{url}/{token}", {}),
        (url, {"Authorization": f"Bearer {token}", "Origin": token, "Cookie": token}),
    ):
        with contextlib.suppress(InvalidStatus):
            async with connect(path, proxy=None, additional_headers=headers) as connection:
                await connection.send("nonsense")
                await connection.recv()
    async with Client(url, token) as client:
        await client.authenticated()
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(f"GET /ws HTTP/1.1\r\nUpgrade: {token}\r\n{token}\r\n\r\n".encode())
    await asyncio.wait_for(reader.read(), 20)
    writer.close()
    async with Window(health) as window:
        metrics = (await window.client.get("/metrics")).text
    process.terminate()
    _, errors = await asyncio.wait_for(process.communicate(), 20)
    text += errors.decode()
    assert "relay_client_refused" in text
    assert token not in text + metrics
    assert token[3:] not in text + metrics
