"""The wire to the feed is cut, held up and slowed down."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from ingestor.model import Tick
from ingestor.simulator.server import Simulator
from tests.clocks import HANG_SECONDS
from tests.proxy import Proxy
from tests.recording import COUNT, ENDS, NOW, Market, running, settings, stored, until
from tests.servers import query


@pytest.mark.parametrize(
    ("fault", "reasons"),
    [
        ("cut", {"closed"}),
        ("cut_in_the_middle", {"closed", "protocol_error"}),
        ("hold", {"keepalive"}),
    ],
)
async def test_cuts_of_the_feed_wire(writer_url: str, database: str, fault: str, reasons: set[str]) -> None:
    """A reset, a reset within a frame and a half-open connection each end the session, and the stream is reopened."""
    async with Simulator(port=0, rate=0, max_streams=9) as simulator, Proxy(simulator.stream_url, seed=3) as proxy:
        configuration = settings(simulator, writer_url, stream_url=proxy.url, ping_timeout="300ms")
        async with running(configuration) as daemon:
            await simulator.wait_connected()
            market = Market(simulator)
            market.trade()
            await until(database, COUNT, market.sent)
            getattr(proxy, fault)()
            simulator.send([Tick("LOST.NZ", NOW, 1.0, number) for number in range(100)])
            await until(database, "SELECT count(*) FROM ingest.stream_sessions WHERE ended_at IS NOT NULL", 1)
            proxy.release()
            async with asyncio.timeout(HANG_SECONDS):
                while daemon.telemetry.counts.sessions < 2:
                    await asyncio.sleep(0.01)
            await until(database, "SELECT count(*) FROM ingest.stream_sessions WHERE authenticated_at IS NOT NULL", 2)
            market.trade()
            await until(database, "SELECT count(*) FROM market.ticks WHERE symbol = 'AIR.NZ'", market.sent)
    ends = await query(database, ENDS)
    assert ends[0][0] in reasons
    assert ends[-1] == ("stopped",)


async def test_a_slow_wire(writer_url: str, database: str) -> None:
    """A delay below the keepalive's timeout changes only the time of arrival."""
    async with Simulator(port=0, rate=0) as simulator, Proxy(simulator.stream_url) as proxy:
        proxy.delay = 0.1
        async with running(settings(simulator, writer_url, stream_url=proxy.url, ping_timeout="2s")):
            await simulator.wait_connected()
            market = Market(simulator)
            with contextlib.suppress(TimeoutError):
                await market.trade_for(1)
            await stored(database, market)
    assert await query(database, ENDS) == [("stopped",)]
