"""A daemon that records from a relay: its table and its gaps become those of the relay's database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ingestor.clock import from_datetime, to_datetime
from ingestor.model import SECOND, Batch, EndReason, Micros, SessionEnd, Tick
from ingestor.service.relay import Relay
from ingestor.settings import Settings, load_settings
from ingestor.simulator.server import TOKEN, Simulator
from ingestor.store.ticks import TickStore
from tests.clocks import HANG_SECONDS
from tests.integration.test_store import batcher
from tests.proxy import Proxy
from tests.recording import received, running
from tests.relays import new_token, relaying, stored
from tests.servers import TestServer, execute_all, query

SESSIONS = "SELECT end_reason, authenticated_at, covered_until FROM ingest.stream_sessions ORDER BY connected_at, id"
COVERED = "SELECT unnest(range_agg(span)) AS span FROM ingest.covered ORDER BY 1"
GAPS = "SELECT started_at, ended_at, cause FROM market.gaps ORDER BY started_at"


@pytest.fixture
async def second(server: TestServer) -> AsyncIterator[str]:
    """The owner's URL of the second site's database."""
    name = server.new_name()
    url = await server.create(name, server.template)
    await execute_all(url, "UPDATE ingest.settings SET calendar = 'always'")
    yield url
    await server.drop(name)


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


@pytest.fixture
def start() -> Micros:
    """Ten minutes ago, in a whole second."""
    return from_datetime(datetime.now().astimezone().replace(microsecond=0)) - 600 * SECOND


def recorder(relay_url: str, token: str, url: str, spool: Path, start: Micros, **changes: Any) -> Settings:
    """Return the settings of a daemon that records from a relay, from `start` on."""
    since = to_datetime(start).isoformat().replace("+00:00", "Z")
    defaults = {
        "stream_url": f"{relay_url}?meta=1&from={since}",
        "token": token,
        "database_url": url,
        "exchange_calendar": "always",
        "reconnect_max_delay": "50ms",
        "heartbeat": "100ms",
        "ping_interval": "50ms",
        "ping_timeout": "2s",
        "spool_dir": spool,
        "instance": "second",
        "http_port": 0,
    }
    return load_settings(**{**defaults, **changes})


def covered(since: Micros, until: Micros, *ticks: Micros, reason: EndReason | None = EndReason.CLOSED) -> Batch:
    """Return the only batch of a session that covers a time, with a tick at each of these arrivals."""
    one = batcher()
    one.authenticated(since)
    for at in ticks:
        one.add(Tick("AIR.NZ", at // SECOND * SECOND, 1.5, 10), at)
    one.cover(until)
    return one.close(None if reason is None else SessionEnd(until, reason), proved=False)


async def eventually(check: Callable[[], Awaitable[bool]]) -> None:
    """Wait until a condition holds, or fail."""
    async with asyncio.timeout(HANG_SECONDS):
        while not await check():
            await asyncio.sleep(0.05)


async def same_ticks(database: str, second: str) -> bool:
    return await stored(database) == await stored(second)


async def covers(url: str, *spans: tuple[Micros, Micros]) -> bool:
    """Return whether the sessions of a database cover exactly these times."""
    found = [(from_datetime(row[0].lower), from_datetime(row[0].upper)) for row in await query(url, COVERED)]
    return found == list(spans)


async def test_the_record_and_its_gaps(
    store: TickStore, relay: Relay, token: str, database: str, second: str, tmp_path: Path, start: Micros
) -> None:
    """Ticks keep arrival and number, the relay's coverage becomes ours, and its gap our gap with its own cause."""
    minute = 60 * SECOND
    await store.write([covered(start, start + minute, start + 5, start + 6, start + 7)])
    await store.write([covered(start + 2 * minute, start + 3 * minute, start + 2 * minute + 5)])
    async with running(recorder(relay.server.url, token, second, tmp_path / "b", start)):
        await eventually(lambda: covers(second, (start, start + minute), (start + 2 * minute, start + 3 * minute)))
        await store.write([covered(start + 3 * minute, start + 4 * minute, start + 4 * minute)])
        await eventually(lambda: covers(second, (start, start + minute), (start + 2 * minute, start + 4 * minute)))
    assert await same_ticks(database, second)
    gaps = [gap for gap in await query(second, GAPS) if from_datetime(gap[0]) == start + minute]
    assert [(from_datetime(gap[1]), gap[2]) for gap in gaps] == [
        (start + 2 * minute, "the relay that was recorded from had a gap")
    ]


async def test_equal_ticks_on_either_side_of_a_cut(
    store: TickStore, relay: Relay, token: str, database: str, second: str, tmp_path: Path, start: Micros
) -> None:
    """Two equal ticks, of which one comes before and one after a cut of the wire, stay two."""
    tick = Tick("AIR.NZ", start, 1.5, 10)
    one = batcher()
    one.authenticated(start)
    one.add(tick, start + 1)
    await store.write([one.close()])
    async with Proxy(relay.server.url) as proxy:
        async with running(recorder(proxy.url, token, second, tmp_path / "b", start)):
            await eventually(partial(same_ticks, database, second))
            proxy.refuses = True
            proxy.cut()
            one.add(tick, start + 2)
            await store.write([one.close()])
            proxy.refuses = False
            await eventually(partial(same_ticks, database, second))
    assert sorted(row[0] for row in await query(second, "SELECT occurrence FROM market.ticks")) == [1, 2]


async def test_a_cut_leaves_no_gap(
    store: TickStore, relay: Relay, token: str, database: str, second: str, tmp_path: Path, start: Micros
) -> None:
    """Ticks and coverage of the time in which the wire was cut are asked for: the coverage is one span in the end."""
    one = batcher()
    one.authenticated(start)
    async with Proxy(relay.server.url) as proxy:
        async with running(recorder(proxy.url, token, second, tmp_path / "b", start)):
            for number in range(1, 6):
                at = start + number * 10 * SECOND
                one.add(Tick("AIR.NZ", at, 1.5, number), at)
                await store.write([one.close()])
                if number % 2:
                    proxy.cut()
                else:
                    await eventually(partial(covers, second, (start, at)))
            await eventually(lambda: covers(second, (start, start + 50 * SECOND)))
    assert await same_ticks(database, second)


async def test_a_restart_resumes_by_the_stored_cursor(
    store: TickStore, relay: Relay, token: str, database: str, second: str, tmp_path: Path, start: Micros
) -> None:
    """The next process resumes behind the last stored tick: nothing comes twice, and nothing is missing."""
    one = batcher()
    one.authenticated(start)
    configuration = recorder(relay.server.url, token, second, tmp_path / "b", start)
    for number in range(1, 4):
        at = start + number * 10 * SECOND
        one.add(Tick("AIR.NZ", at, 1.5, number), at)
        await store.write([one.close()])
        late = batcher()
        late.add(Tick("LATE", start, 1.5, number), start - 3600 * SECOND)  # a second daemon, from its spool
        await store.write([late.close()] if number > 1 else [])
        async with running(configuration):
            await eventually(partial(covers, second, (start, at)))
    assert await same_ticks(database, second)
    assert await query(second, "SELECT sum(duplicates)::int FROM ingest.stream_sessions") == [(0,)]


async def test_a_refused_cursor(
    store: TickStore, token: str, database: str, second: str, tmp_path: Path, start: Micros
) -> None:
    """If the log of commits began again, the record is asked for from the last covered instant on."""
    one = batcher()
    one.authenticated(start)
    for number in range(1, 3):
        at = start + number * 10 * SECOND
        one.add(Tick("AIR.NZ", at, 1.5, number), at)
        async with relaying(database) as relay:
            await store.write([one.close()])
            async with Proxy(relay.server.url) as proxy:
                # The port is another one; so the address of the record is made the same.
                await execute_all(second, f"UPDATE ingest.stream_sessions SET endpoint = '{proxy.url}?meta=1'")
                async with running(recorder(proxy.url, token, second, tmp_path / "b", start)):
                    await eventually(partial(covers, second, (start, at)))
        await execute_all(database, "UPDATE ingest.tick_log_state SET identity = gen_random_uuid()")
    assert await same_ticks(database, second)
    reasons = [row[0] for row in await query(second, SESSIONS)]
    assert reasons == ["stopped", "server_error", "stopped"]


async def test_a_gap_is_closed_by_ticks(
    store: TickStore, relay: Relay, token: str, database: str, second: str, tmp_path: Path, start: Micros
) -> None:
    """A gap on record, here of a daemon that recorded the feed itself, is asked for at the next start, and is gone."""
    minute = 60 * SECOND
    await store.write([covered(start, start + 5 * minute, *(start + number * SECOND for number in range(300)))])
    own = TickStore(second, write_timeout=10)
    await own.write([covered(start, start + minute, *(start + number * SECOND for number in range(60)))])
    await own.write([covered(start + 2 * minute, start + 3 * minute, reason=EndReason.STOPPED)])
    await own.close()
    async with running(recorder(relay.server.url, token, second, tmp_path / "b", start + 4 * minute)):
        await eventually(lambda: covers(second, (start, start + 5 * minute)))
    assert len(await stored(second)) == 300
    assert not [gap for gap in await query(second, GAPS) if from_datetime(gap[0]) < start + 5 * minute]


async def test_withdrawn_coverage(
    store: TickStore, relay: Relay, token: str, database: str, second: str, tmp_path: Path, start: Micros
) -> None:
    """If the relay's daemon finds that its stream was mute, our coverage ends at the last tick as well."""
    one = batcher()
    one.authenticated(start)
    one.add(Tick("AIR.NZ", start, 1.5, 1), start + SECOND)
    one.cover(start + 100 * SECOND)
    async with running(recorder(relay.server.url, token, second, tmp_path / "b", start)):
        await store.write([one.close()])
        await eventually(lambda: covers(second, (start, start + 100 * SECOND)))
        await store.write([one.close(SessionEnd(start + 100 * SECOND, EndReason.STALL))])
        await eventually(lambda: covers(second, (start, start + SECOND)))
        await store.write([covered(start + 120 * SECOND, start + 130 * SECOND, start + 121 * SECOND)])
        await eventually(lambda: covers(second, (start, start + SECOND), (start + 120 * SECOND, start + 130 * SECOND)))
    assert await same_ticks(database, second)


async def test_a_gap_that_closes_later(
    store: TickStore, relay: Relay, token: str, database: str, second: str, tmp_path: Path, start: Micros
) -> None:
    """A gap of the relay that another daemon's spool closes is closed at the second site without a reconnection."""
    minute = 60 * SECOND
    await store.write([covered(start, start + minute, start + 5)])
    await store.write([covered(start + 2 * minute, start + 3 * minute)])
    async with running(recorder(relay.server.url, token, second, tmp_path / "b", start)) as daemon:
        await eventually(lambda: covers(second, (start, start + minute), (start + 2 * minute, start + 3 * minute)))
        await store.write([covered(start, start + 3 * minute, start + 61 * SECOND)])
        await eventually(lambda: covers(second, (start, start + 3 * minute)))
        assert not daemon.telemetry.counts.reconnects
    assert await same_ticks(database, second)


async def test_not_a_relay(second: str, tmp_path: Path, start: Micros) -> None:
    """A server that is no relay, with ?meta=1, is no source of ticks: the error says so, and nothing is stored."""
    async with Simulator(port=0, rate=0) as simulator:
        url = simulator.stream_url
        async with running(recorder(url, TOKEN, second, tmp_path / "b", start)) as daemon:
            await simulator.wait_connected()
            simulator.send([Tick("AIR.NZ", start, 1.5, 1)])

            async def has_failed() -> bool:
                return bool(daemon.telemetry.counts.ends["protocol_error"])

            await eventually(has_failed)
    assert not await stored(second)


async def test_a_stop_while_the_database_hangs(
    relay: Relay, token: str, second: str, tmp_path: Path, start: Micros
) -> None:
    """A daemon that waits for its database to say where to go on stops at once, and connects nowhere before."""
    async with Proxy(second) as proxy:
        proxy.hold()
        async with running(recorder(relay.server.url, token, proxy.url, tmp_path / "b", start)) as daemon:

            async def has_asked() -> bool:
                return len(proxy.upstream_ports) >= 2

            await eventually(has_asked)
        assert not daemon.telemetry.counts.sessions


async def test_an_unavailable_database(
    store: TickStore, relay: Relay, token: str, database: str, second: str, tmp_path: Path, start: Micros
) -> None:
    """While the database is unavailable, a cut connection goes on from the cursor in memory, and nothing is lost."""
    one = batcher()
    one.authenticated(start)
    async with Proxy(second) as away, Proxy(relay.server.url) as wire:
        configuration = recorder(wire.url, token, away.url, tmp_path / "b", start, write_timeout="500ms")
        async with running(configuration) as daemon:
            for number in range(1, 4):
                at = start + number * 10 * SECOND
                one.add(Tick("AIR.NZ", at, 1.5, number), at)
                await store.write([one.close()])
                if number == 1:
                    await eventually(partial(same_ticks, database, second))
                    away.refuses = True
                    away.cut()
                await received(daemon, number)
                wire.cut()
            away.refuses = False
            await eventually(partial(same_ticks, database, second))
            await eventually(partial(covers, second, (start, start + 30 * SECOND)))
    assert await query(second, "SELECT sum(duplicates)::int FROM ingest.stream_sessions") == [(0,)]
