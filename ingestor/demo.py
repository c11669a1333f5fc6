"""The demonstration on one machine: an embedded database, the simulator and the daemon, for `ingestor demo`.

It prints nothing; the command shows its data.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg

from ingestor.clock import from_datetime
from ingestor.embedded import EmbeddedServer
from ingestor.service.daemon import Daemon
from ingestor.service.process import StopRequest
from ingestor.settings import Settings, load_settings
from ingestor.simulator.server import TOKEN, Simulator
from ingestor.store.connect import connect
from ingestor.telemetry.events import Counts

DATABASE = "demo"
LATEST = 8

_ROLE = "CREATE ROLE ingestor LOGIN PASSWORD '{}' IN ROLE market_write"
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


class Demo:
    """A running demonstration. `url` is that of the database, as its superuser."""

    def __init__(
        self, url: str, settings: Settings, simulator: Simulator, daemon: Daemon, connection: asyncpg.Connection
    ) -> None:
        self.url = url
        self.settings = settings
        self._simulator = simulator
        self._daemon = daemon
        self._connection = connection
        self._request = StopRequest()
        self._task = asyncio.create_task(daemon.run(self._request), name="daemon")

    async def state(self) -> State:
        """Return the current state. Raises the daemon's error if it has ended with one."""
        if self._task.done():
            self._task.result()
        return State(
            self._daemon.telemetry.counts,
            self._simulator.ticks_sent,
            self._simulator.connected,
            self._daemon.buffer.size,
            self._daemon.http.url if self._daemon.http.is_bound else None,
            await self.query(_LATEST, LATEST),
        )

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
        """Cancel the daemon."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@contextlib.asynccontextmanager
async def running(*, rate: float, seed: int, seconds: float, faults: list[str]) -> AsyncIterator[Demo]:
    """Start database, simulator and daemon; stop them and remove all files at the end.

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
            daemon_url = f"postgresql://ingestor:{password}@127.0.0.1:{server.port}/{DATABASE}"
            settings = _settings(simulator, daemon_url, Path(directory))
            await migrate(url, settings, lambda _: None)
            connection = await connect(url)
            await connection.execute(_ROLE.format(password))
            # Ticks sent before the daemon runs count as missing too.
            await connection.execute("UPDATE ingest.settings SET coverage_since = $1", began)
            demo = Demo(url, settings, simulator, Daemon(settings), connection)
            try:
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
    )
