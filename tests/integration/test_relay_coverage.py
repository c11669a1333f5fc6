"""The coverage that a relay states: which time is complete, and never before the client has its ticks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ingestor.clock import to_datetime
from ingestor.model import SECOND, Batch, EndReason, SessionEnd
from ingestor.relay.encoder import instant
from ingestor.service.relay import Relay
from ingestor.store.ticks import TickStore
from tests.integration.test_store import T0, batcher, tick
from tests.relays import Client, new_token, relaying
from tests.servers import execute_all

FROM = {"meta": "1", "from": str(instant(to_datetime(T0))), "coverage": str(instant(to_datetime(T0)))}


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


def covered(since: float, until: float, *, reason: EndReason | None = None, ticks: int = 1) -> Batch:
    """Return the only batch of a session that covers a time, in seconds since T0, with ticks at its end."""
    one = batcher()
    one.authenticated(T0 + round(since * SECOND))
    for _ in range(ticks):
        one.add(tick("AIR.NZ"), T0 + round(until * SECOND))
    end = None if reason is None else SessionEnd(T0 + round(until * SECOND), reason)
    return one.close(end)


def spans(client: Client) -> list[tuple[str, str]]:
    return [(each["data"]["from"], each["data"]["to"]) for each in client.messages if each["type"] == "coverage"]


def text(*seconds: float) -> tuple[Any, ...]:
    return tuple(instant(to_datetime(T0 + round(each * SECOND))) for each in seconds)


async def test_spans_and_the_hole_between_them(store: TickStore, relay: Relay, token: str) -> None:
    """A client that catches up gets each span once it has all ticks, from the instant on that it asked for."""
    await store.write([covered(-60, 10, reason=EndReason.CLOSED)])
    await store.write([covered(20, 30, reason=EndReason.CLOSED)])
    async with Client(relay.server.url, token, **FROM) as client:
        await client.until(lambda client: len(spans(client)) >= 2)
    assert spans(client)[:2] == [text(0, 10), text(20, 30)]
    assert client.kinds.index("coverage") == 2  # behind the authentication and the only tick, which came twice


async def test_live(store: TickStore, relay: Relay, token: str) -> None:
    """A client that is live learns what a commit has covered, behind the ticks of that commit."""
    await store.write([covered(0, 10)])
    async with Client(relay.server.url, token, **FROM) as client:
        await client.until(lambda client: text(0, 10) in spans(client))
        one = batcher()
        one.authenticated(T0 + 10 * SECOND)
        one.add(tick("NEW"), T0 + 15 * SECOND)
        await store.write([one.close()])
        await client.until(lambda client: text(0, 15) in spans(client))
    kinds = [each["data"].get("symbol", each["data"].get("to")) for each in client.messages[1:]]
    assert kinds.index("NEW") < kinds.index(text(15)[0])


async def test_dropped_ticks_are_not_covered(store: TickStore, relay: Relay, token: str, database: str) -> None:
    """Time whose ticks retention has dropped is not complete, although sessions covered it."""
    await store.write([covered(0, 30)])
    await execute_all(database, f"UPDATE ingest.settings SET ticks_since = '{to_datetime(T0 + 12 * SECOND)}'")
    async with Client(relay.server.url, token, **FROM) as client:
        await client.until(lambda client: bool(spans(client)))
    assert spans(client)[0] == text(12, 30)


async def test_late_ticks_of_any_arrival(store: TickStore, relay: Relay, token: str) -> None:
    """A client that asks for coverage gets ticks that are committed late and arrived before its from."""
    await store.write([covered(0, 10)])
    async with Client(relay.server.url, token, **FROM) as client:
        await client.until(lambda client: bool(spans(client)))
        late = batcher()
        late.add(tick("LATE"), T0 - 100)
        await store.write([late.close()])
        await client.received(2)
    assert client.prices[-1]["symbol"] == "LATE"


@pytest.mark.parametrize("place", ["live", "record"])
async def test_resume_and_from_together(store: TickStore, relay: Relay, token: str, place: str) -> None:
    """With a cursor and from, a client gets the record from there on again, and all that was committed since."""
    one = batcher()
    for number in range(6):
        one.add(tick(f"S{number}"), T0 + number)
    await store.write([one.close()])
    async with Client(relay.server.url, token, **FROM) as client:
        await client.received(6)
        if place == "live":
            async with asyncio.timeout(15):
                while not relay.hub.live:
                    await asyncio.sleep(0.01)
            await store.write([covered(1, 2)])
            await client.received(7)
    late = batcher()
    late.add(tick("LATE"), T0 - 100)
    await store.write([late.close()])
    since = str(instant(to_datetime(T0 + 4)))
    options = {**FROM, "from": since, "resume": client.cursor}
    async with Client(relay.server.url, token, **options) as again:
        await again.until(lambda client: len(client.prices) >= (4 if place == "live" else 3))
    found = sorted(price["symbol"] for price in again.prices)
    assert found == sorted(["LATE", "S4", "S5", *(["AIR.NZ"] if place == "live" else [])])


@pytest.mark.parametrize(
    "options",
    [
        {"coverage": FROM["coverage"], "from": FROM["from"]},
        {"coverage": FROM["coverage"], "meta": "1"},
        {**FROM, "symbols": "AIR.NZ"},
        {**FROM, "to": str(instant(to_datetime(T0 + SECOND)))},
        {**FROM, "speed": "1"},
        {**FROM, "coverage": "yesterday"},
    ],
)
async def test_wrong_options(relay: Relay, token: str, options: dict[str, str]) -> None:
    """Coverage of a part of the record would be misunderstood, so the options that choose a part are refused."""
    async with Client(relay.server.url, token, **options) as client:
        await client.ended()
    assert client.error.startswith("coverage: ")
