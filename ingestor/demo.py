"""The demonstration on one machine: an embedded database, the simulator, the daemon and a relay, for `ingestor demo`.

It prints nothing; the command shows its data.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import tempfile
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as open_websocket
from websockets.exceptions import ConnectionClosed

from ingestor.clock import from_datetime
from ingestor.embedded import EmbeddedServer
from ingestor.service.daemon import Daemon
from ingestor.service.process import StopRequest
from ingestor.service.relay import Relay
from ingestor.settings import Settings, load_settings
from ingestor.simulator.server import TOKEN, Simulator
from ingestor.store.connect import connect
from ingestor.store.relay_tokens import TokenStore
from ingestor.telemetry.events import Counts

DATABASE = "demo"
LATEST = 6
LAST_LINES = 3

_ROLES = """
CREATE ROLE ingestor LOGIN PASSWORD '{0}' IN ROLE market_write;
CREATE ROLE relay LOGIN PASSWORD '{0}' IN ROLE market_relay
"""
_STORED = "SELECT count(*) AS rows, count(*) FILTER (WHERE received_at < $1) AS earlier FROM market.ticks"
_LATEST = "SELECT time, symbol, price, volume FROM market.ticks ORDER BY received_at DESC LIMIT $1"
_SUMMARY = """
SELECT (SELECT count(*) FROM market.ticks) AS rows,
       (SELECT count(DISTINCT symbol) FROM market.ticks) AS symbols,
       (SELECT count(*) FROM market.ticks WHERE occurrence > 1) AS repeated,
       (SELECT count(*) FROM ingest.rejected_messages) AS rejected,
       count(*) AS sessions, coalesce(sum(duplicates), 0) AS duplicates,
       date_trunc('seconds', coalesce(sum(covered_until - authenticated_at), interval '0')) AS covered
FROM ingest.stream_sessions
"""

_BUSIEST = """
SELECT symbol, count(*) AS trades, sum(volume) AS volume,
       round((sum(price * volume) / sum(volume))::numeric, 3) AS vwap
FROM market.ticks GROUP BY symbol ORDER BY trades DESC LIMIT 5;
"""
_BARS = """
SELECT to_char(date_bin('10 s', time, '2020-01-01') AT TIME ZONE 'Pacific/Auckland', 'HH24:MI:SS') AS bar,
       (array_agg(price ORDER BY time, received_at, occurrence))[1] AS open,
       max(price) AS high, min(price) AS low,
       (array_agg(price ORDER BY time DESC, received_at DESC, occurrence DESC))[1] AS close,
       sum(volume) AS volume
FROM market.ticks WHERE symbol = 'FPH.NZ' GROUP BY bar ORDER BY bar LIMIT 5;
"""
_SESSIONS = """
SELECT to_char(authenticated_at, 'HH24:MI:SS') AS authenticated, covered_until - authenticated_at AS covered,
       ticks, duplicates, rejected, end_reason
FROM ingest.stream_sessions ORDER BY connected_at LIMIT 5;
"""

QUERIES = (
    ("The busiest symbols, with their volume-weighted average price:", _BUSIEST),
    ("Ten-second bars of one symbol, in New Zealand's time:", _BARS),
    ("Each connection: the covered time, the messages, and how it ended:", _SESSIONS),
)


@dataclass(frozen=True, slots=True)
class State:
    """The data of the live view."""

    counts: Counts
    sent: int
    connected: int
    waiting_bytes: int
    page: str | None
    latest: list[dict[str, Any]]
    subscriber: Subscriber | None


class Subscriber:
    """A client of a relay that comes late: it asks for everything since `since`, and goes on live.

    `ticks` is the number of its prices, `last` holds the latest messages as they came.
    """

    def __init__(self, relay_url: str, token: str, since: datetime) -> None:
        self.url = f"{relay_url}?from={since:%Y-%m-%dT%H:%M:%S.%fZ}"
        self.came_at = datetime.now(UTC)
        self.ticks = 0
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        self._token = token
        self._connection: ClientConnection | None = None
        self._task = asyncio.create_task(self._receive(), name="subscriber")

    async def _receive(self) -> None:
        async with open_websocket(self.url, proxy=None, compression=None) as self._connection:
            login = {"type": "authenticate", "data": {"token": self._token}}
            await self._connection.send(json.dumps(login))
            async for text in self._connection:
                if json.loads(text)["type"] == "price":
                    self.ticks += 1
                    self.last.append(str(text))

    async def receive_all(self, ticks: int) -> None:
        """Wait up to 10 s for so many ticks, then until everything that the relay has sent is read."""
        with contextlib.suppress(TimeoutError, ConnectionClosed):
            async with asyncio.timeout(10):
                while self.ticks < ticks and not self._task.done():  # noqa: ASYNC110 - two ends
                    await asyncio.sleep(0.02)
                if self._connection is not None:
                    await (await self._connection.ping())

    async def stop(self) -> None:
        """Disconnect. Raises the error that ended the connection, if one did."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task


class Demo:
    """A running demonstration. `url` is that of the database, as its superuser; `relay_token` admits to the relay."""

    def __init__(
        self, url: str, settings: Settings, simulator: Simulator, daemon: Daemon, relay: Relay,
        connection: asyncpg.Connection, relay_token: str,
    ) -> None:  # fmt: skip
        self.url = url
        self.settings = settings
        self.relay_token = relay_token
        self.subscriber: Subscriber | None = None
        self._began = datetime.now(UTC)
        self._simulator = simulator
        self._daemon = daemon
        self._relay = relay
        self._connection = connection
        self._request, self._relay_request = StopRequest(), StopRequest()
        self._task = asyncio.create_task(daemon.run(self._request), name="daemon")
        self._relay_task = asyncio.create_task(relay.run(self._relay_request), name="relay")

    @property
    def relay_url(self) -> str:
        """The address of the relay's stream."""
        return self._relay.server.url

    async def ready(self) -> None:
        """Wait until the relay follows the log. Raises its error if it ends before."""
        ready = asyncio.create_task(self._relay.hub.is_ready.wait())
        await asyncio.wait({ready, self._relay_task}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if self._relay_task.done():
            self._relay_task.result()

    async def state(self) -> State:
        """Return the current state. Raises the error of the daemon or the relay if one has ended with it."""
        for task in (self._task, self._relay_task):
            if task.done():
                task.result()
        return State(
            self._daemon.telemetry.counts,
            self._simulator.ticks_sent,
            self._simulator.connected,
            self._daemon.buffer.size,
            self._daemon.http.url if self._daemon.http.is_bound else None,
            await self.query(_LATEST, LATEST),
            self.subscriber,
        )

    def subscribe(self) -> Subscriber:
        """Connect a subscriber that asks the relay for everything since the demo began."""
        self.subscriber = Subscriber(self.relay_url, self.relay_token, self._began)
        return self.subscriber

    def outage(self, seconds: float) -> None:
        """Cut the stream for some seconds, while the market continues."""
        self._simulator.outage(seconds)

    async def close_market(self) -> None:
        """Close the market, and wait up to 5 s until the daemon has received all ticks."""
        await self._simulator.stop_market()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                while self._daemon.telemetry.counts.messages < self._simulator.ticks_sent:  # noqa: ASYNC110 - two ends
                    await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """Stop the daemon gracefully."""
        self._request()
        await self._task

    async def summary(self) -> dict[str, Any]:
        """Return the counts of the database, and `sent`, the count of the simulator."""
        (row,) = await self.query(_SUMMARY)
        return {"sent": self._simulator.ticks_sent, **row}

    async def received_late(self) -> dict[str, int]:
        """Disconnect the subscriber, and return its count of `ticks` beside that of the stored `rows`.

        `earlier` of the rows arrived before it came. Call it once nothing more is written.
        """
        subscriber = self.subscriber or self.subscribe()
        (stored,) = await self.query(_STORED, subscriber.came_at)
        await subscriber.receive_all(stored["rows"])
        with contextlib.suppress(ConnectionClosed, OSError):
            await subscriber.stop()
        return {"ticks": subscriber.ticks, **stored}

    async def compare(self) -> tuple[int, int]:
        """Return the number of the market's one-minute bars, and of those that `market.bars_1m` has unchanged."""
        made = {
            (symbol, bar.start): (bar.open, bar.high, bar.low, bar.close, bar.volume)
            for symbol, bar in self._simulator.bars.everything()
        }
        ours = {
            (row["symbol"], from_datetime(row["time"])): tuple(
                row[name] for name in ("open", "high", "low", "close", "volume")
            )
            for row in await self.query("SELECT * FROM market.bars_1m")
        }
        return len(made), sum(ours.get(key) == bar for key, bar in made.items())

    async def query(self, sql: str, *arguments: Any) -> list[dict[str, Any]]:
        """Return a query's rows."""
        return [dict(row) for row in await self._connection.fetch(sql, *arguments)]

    async def abandon(self) -> None:
        """Stop the relay, and cancel the daemon."""
        self._relay_request()
        self._task.cancel()
        await asyncio.gather(self._relay_task, self._task, return_exceptions=True)


@contextlib.asynccontextmanager
async def running(*, rate: float, seed: int, seconds: float, faults: list[str]) -> AsyncIterator[Demo]:
    """Start database, simulator, daemon and relay; stop them and remove all files at the end.

    The market's day is as long as the demonstration, with a burst at its start and at its end.
    """
    from ingestor.admin.migrate import migrate  # noqa: PLC0415 - it imports SQLAlchemy, which the daemon does not need

    with EmbeddedServer() as server, tempfile.TemporaryDirectory(prefix="ingestor-demo-") as directory:
        admin = await connect(server.url())
        await admin.execute(f"CREATE DATABASE {DATABASE}")
        await admin.close()
        url = server.url(DATABASE)
        async with Simulator(port=0, rate=rate, seed=seed, cycle=max(seconds, 1.0), faults=faults) as simulator:
            began = datetime.now(UTC)
            password = secrets.token_urlsafe(16)
            address = f"{password}@127.0.0.1:{server.port}/{DATABASE}"
            settings = _settings(simulator, f"postgresql://ingestor:{address}", Path(directory))
            await migrate(url, settings, lambda _: None)
            connection = await connect(url)
            await connection.execute(_ROLES.format(password))
            # Ticks sent before the daemon runs count as missing too.
            await connection.execute("UPDATE ingest.settings SET coverage_since = $1", began)
            relay_token = await TokenStore(url).add("subscriber", max_streams=10, lifetime=None)
            assert relay_token is not None
            relay = Relay(_settings(simulator, f"postgresql://relay:{address}", Path(directory)))
            demo = Demo(url, settings, simulator, Daemon(settings), relay, connection, relay_token)
            try:
                await demo.ready()
                yield demo
            finally:
                await demo.abandon()
                await connection.close()


def _settings(simulator: Simulator, url: str, directory: Path) -> Settings:
    """Return settings for this demonstration only, whatever the environment has."""
    return load_settings(
        token=TOKEN,
        token_file=None,
        stream_url=simulator.stream_url,
        rest_url=simulator.rest_url,
        database_url=url,
        database_url_file=None,
        exchange_timezone="Pacific/Auckland",
        exchange_calendar="always",
        coverage_margin="1s",
        spool_dir=directory,
        instance="demo",
        reconnect_max_delay="2s",
        http_host="127.0.0.1",
        http_port=0,
        relay_host="127.0.0.1",
        relay_port=0,
        relay_http_port=0,
        relay_tls_cert=None,
        relay_tls_key=None,
    )
