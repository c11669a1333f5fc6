"""A running relay, and clients that record what they get, for the tests."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any, Self
from urllib.parse import quote, urlencode

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame

from ingestor.relay.server import PortOptions
from ingestor.service.process import StopRequest
from ingestor.service.relay import Relay
from ingestor.settings import load_settings
from ingestor.store.relay_tokens import TokenStore
from tests.servers import query

Seen = tuple[str, str, float, int, int]
"""A tick as a client with `meta=1` sees it: symbol, arrival, price, volume, occurrence."""

STORED = """
SELECT symbol, to_char(received_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'), price, volume, occurrence
FROM market.ticks
"""

PRUNE = """
WITH gone AS (DELETE FROM ingest.tick_log RETURNING id)
UPDATE ingest.tick_log_state SET complete_after = greatest(complete_after, (SELECT max(id) FROM gone)) RETURNING 1
"""
"""Prunes the log as if an hour had passed."""


async def stored(url: str, condition: str = "true") -> Counter[Seen]:
    """Return the ticks of the table, as `Seen`."""
    return Counter(tuple(row) for row in await query(url, f"{STORED} WHERE {condition}"))


@contextlib.asynccontextmanager
async def relaying(
    url: str, *, stuck_after: float = 60.0, port: PortOptions | None = None, **changes: Any
) -> AsyncIterator[Relay]:
    """Run a relay on a database, and stop it in order at the end."""
    defaults = {"database_url": url, "relay_port": 0, "relay_http_port": 0, "write_timeout": "5s"}
    relay = Relay(load_settings(**{**defaults, **changes}), stuck_after=stuck_after, port=port)
    request = StopRequest()
    task = asyncio.create_task(relay.run(request))
    ready = asyncio.create_task(relay.hub.is_ready.wait())
    try:
        await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED, timeout=20)
        if task.done():
            task.result()
        yield relay
    finally:
        ready.cancel()
        request()
        await asyncio.wait_for(task, 20)


async def new_token(url: str, name: str = "client", **limits: Any) -> str:
    """Return a new token of a database."""
    token = await TokenStore(url).add(name, **{"max_streams": 100, "lifetime": None, **limits})
    assert token is not None
    return token


class Client:
    """A client of the stream: it authenticates, and keeps every message."""

    def __init__(self, url: str, token: str, **options: str) -> None:
        query_ = urlencode(options, quote_via=quote)
        self._url = f"{url}?{query_}" if query_ else url
        self._token = token
        self.messages: list[dict[str, Any]] = []
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.connection: ClientConnection | None = None
        self.compressed = 0
        """Prices that came in compressed frames."""

    async def __aenter__(self) -> Self:
        self.connection = await connect(self._url, proxy=None, ping_interval=None, close_timeout=0.5)
        self._count_compressed(self.connection)
        await self.connection.send(json.dumps({"type": "authenticate", "data": {"token": self._token}}))
        self._task = asyncio.create_task(self._receive())
        self._task.add_done_callback(lambda _: self._changed.set())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self.connection is not None
        self.connection.transport.abort()
        await self.ended()

    def _count_compressed(self, connection: ClientConnection) -> None:
        for extension in connection.protocol.extensions:
            decode = extension.decode

            def counting(frame: Frame, *, max_size: int | None = None, decode: Any = decode) -> Frame:
                found: Frame = decode(frame, max_size=max_size)
                self.compressed += frame.rsv1 and b'"price"' in found.data
                return found

            extension.decode = counting  # type: ignore[method-assign]

    async def _receive(self) -> None:
        assert self.connection is not None
        with contextlib.suppress(ConnectionClosed):
            async for message in self.connection:
                self.messages.append(json.loads(message))
                self._changed.set()

    @property
    def is_closed(self) -> bool:
        """Whether the connection has ended and everything that came is read."""
        return self._task is not None and self._task.done()

    async def ended(self) -> int | None:
        """Wait until the connection is closed, and return the code."""
        assert self._task is not None
        assert self.connection is not None
        await asyncio.wait_for(self._task, 15)
        return self.connection.close_code

    async def until(self, condition: Callable[[Self], bool], seconds: float = 15) -> Self:
        """Wait until a condition holds, or fail."""
        async with asyncio.timeout(seconds):
            while not condition(self):
                self._changed.clear()
                await self._changed.wait()
                assert self._task is not None
                if self._task.done() and not condition(self):
                    raise AssertionError(f"closed after {len(self.messages)} messages: {self.messages[-1:]}")
        return self

    async def authenticated(self) -> Self:
        """Wait until the server accepts the token."""
        return await self.until(lambda client: bool(client.messages))

    async def received(self, count: int) -> list[dict[str, Any]]:
        """Wait for so many prices, and return all."""
        await self.until(lambda client: len(client.prices) >= count)
        return self.prices

    @property
    def prices(self) -> list[dict[str, Any]]:
        """The data of the prices that were received."""
        return [each["data"] for each in self.messages if each["type"] == "price"]

    @property
    def kinds(self) -> list[str]:
        """The types of all messages, in order."""
        return [each["type"] for each in self.messages]

    @property
    def error(self) -> str:
        """The text of the error that was received; empty if none was."""
        return next((str(each["data"]["message"]) for each in self.messages if each["type"] == "error"), "")

    @property
    def seen(self) -> Counter[Seen]:
        """The ticks, of a client with `meta=1`."""
        return Counter(
            (each["symbol"], each["received_at"], float(each["price"]), each["volume"], each["occurrence"])
            for each in self.prices
        )

    @property
    def cursor(self) -> str:
        """The cursor of the last price."""
        return str(self.prices[-1]["cursor"])
