"""Two sites in a row: what the second one has on record is what the first one has, after random cuts and kills."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ingestor.clock import SystemClock, to_datetime
from ingestor.model import SECOND, Tick
from ingestor.simulator.server import Simulator
from tests.clocks import HANG_SECONDS
from tests.relay_chain import Chain, chain
from tests.relays import Client, new_token, stored
from tests.servers import TestServer, execute_all, query

SEEDS = int(os.environ.get("INGESTOR_TEST_CHAINS", "2"))
STEPS = 8
COVERED = "SELECT range_agg(span) FROM ingest.covered"


@pytest.fixture
async def sites(server: TestServer) -> AsyncIterator[tuple[str, str]]:
    """The owner's URLs of two databases, of which every minute is trading time."""
    names = [server.new_name() for _ in range(2)]
    urls = [await server.create(name, server.template) for name in names]
    for url in urls:
        await execute_all(url, "UPDATE ingest.settings SET calendar = 'always'")
    yield urls[0], urls[1]
    for name in names:
        await server.drop(name)


async def trade(simulator: Simulator, source: random.Random) -> None:
    """Send few different ticks, so that many are equal, until cancelled."""
    while True:
        now = SystemClock().wall() // SECOND * SECOND
        ticks = [Tick(source.choice("AB"), now, source.choice((1.5, 2.0)), source.randint(1, 3)) for _ in range(3)]
        simulator.send(ticks)
        await asyncio.sleep(0.01)


async def settle(simulator: Simulator, first: str, second: str) -> None:
    """Send marks until one has come through to the second site, and both sites have the same number of ticks."""
    async with asyncio.timeout(2 * HANG_SECONDS):
        for number in range(1, 10_000):
            simulator.send([Tick("END", SystemClock().wall() // SECOND * SECOND, 1.0, number)])
            await asyncio.sleep(0.3)
            if await query(second, "SELECT 1 FROM market.ticks WHERE symbol = 'END' LIMIT 1"):
                break
        while await stored(first) != await stored(second):
            await asyncio.sleep(0.3)


async def same_coverage(first: str, second: str) -> bool:
    """Return whether the second site covers the same time, from its own beginning to its last word."""
    ours = (await query(second, COVERED))[0][0]
    theirs = (await query(first, COVERED))[0][0]
    if not ours:
        return False
    since, until = ours[0].lower, ours[-1].upper

    def within(spans: list[object]) -> list[tuple[object, object]]:
        cut = [(max(span.lower, since), min(span.upper, until)) for span in spans]  # type: ignore[attr-defined]
        return [span for span in cut if span[0] < span[1]]

    return within(list(theirs)) == within(list(ours))


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_two_sites_end_equal(sites: tuple[str, str], tmp_path: Path, seed: int) -> None:
    """Tables, arrivals, numbers and coverage of both sites are equal, and a client of the last relay gets them all."""
    first, second = sites
    started = SystemClock().wall()
    token = await new_token(second)
    async with (
        Simulator(port=0, rate=0, max_streams=10) as simulator,
        chain(simulator, first, second, tmp_path, seed) as system,
    ):
        done = await disturbed(simulator, system)
        try:
            await settle(simulator, first, second)
            async with asyncio.timeout(HANG_SECONDS):
                while not await same_coverage(first, second):
                    await asyncio.sleep(0.3)
        except TimeoutError:
            spans = [await query(url, COVERED) for url in sites]
            raise AssertionError(f"{done}\n{spans}\n{system.tails()}") from None
        record = await stored(second)
        options = {"meta": "1", "from": to_datetime(started - 60 * SECOND).isoformat()}
        async with Client(system.last_relay, token, **options) as client:
            await client.received(record.total())
        assert client.seen == record
    assert max(row[4] for row in record) > 1


async def disturbed(simulator: Simulator, system: Chain) -> list[str]:
    """Let the market trade while something is disturbed now and then; return what was."""
    await simulator.wait_connected()
    trading = asyncio.create_task(trade(simulator, random.Random(system.random.random())))
    done = []
    try:
        for _ in range(STEPS):
            await asyncio.sleep(system.random.random() * 1.5)
            done.append(await system.disturb())
        await asyncio.sleep(1)
    finally:
        trading.cancel()
        await asyncio.gather(trading, return_exceptions=True)
    return done
