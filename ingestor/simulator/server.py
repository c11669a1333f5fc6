"""The simulator: the documented Stream API and REST API on one port.

It refuses the same requests as the real service, and records exactly what it sent on each connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from websockets.asyncio.server import Server, ServerConnection, broadcast
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from ingestor.errors import ConfigurationError
from ingestor.model import Micros, Tick
from ingestor.protocol.login import AUTHENTICATION_TIMEOUT, receive_login, refuse, token_of
from ingestor.protocol.messages import (
    AUTHENTICATED,
    NO_ACCESS,
    NO_AUTHENTICATION,
    NOT_AUTHORISED,
    price_message,
    stream_limit,
)
from ingestor.protocol.port import PATH, PORT, listen, port_of
from ingestor.simulator.bars import Bars
from ingestor.simulator.faults import REPLAYED, Fault, Faults
from ingestor.simulator.market import CYCLE, Market
from ingestor.simulator.rest import RestApi, encode

TOKEN = "tk_simulator_0123456"  # noqa: S105 - public, so that any client can connect
TICK_INTERVAL = 0.01
WRITE_LIMIT = 16 * 2**20
"""Bytes that may wait for a client that does not read, before its connection is cut."""


def now() -> Micros:
    """Return the time of day, UTC."""
    return time.time_ns() // 1000


@dataclass(slots=True)
class Account:
    """The record of one authenticated connection.

    If the simulator records, `ticks` and `sent_at` hold each tick and the instant at which it was sent (`Micros`).
    `port` is the client's. `replayed` are the ticks sent again after its authentication.
    """

    number: int
    connection: ServerConnection
    authenticated_at: Micros
    port: int
    sent: int = 0
    ticks: list[Tick] = field(default_factory=list)
    sent_at: array[int] = field(default_factory=lambda: array("q"))
    replayed: list[Tick] = field(default_factory=list)
    muted: bool = False
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


class Simulator:
    """A market and its service on this machine, used as a context manager.

    `port` 0 chooses a free port. `market_clock` returns the market's time. With `rate` 0 the market is silent, and
    `send` streams a scripted sequence.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = PORT,
        rate: float = 50.0,
        seed: int = 1,
        cycle: float = CYCLE,
        faults: Iterable[str] = (),
        max_streams: int = 2,
        rate_limit: int = 600,
        timezone: str = "Pacific/Auckland",
        record: bool = False,
        market_clock: Callable[[], Micros] = now,
    ) -> None:
        self._host, self._port = host, port
        self._authority = f"[{host}]" if ":" in host else host
        self._timezone = ZoneInfo(timezone)
        self._clock = market_clock
        self._market = Market(seed, rate, market_clock(), cycle=cycle)
        self._faults = Faults(faults, seed=seed)
        self._max_streams = max_streams
        self._record = record
        self._recent: deque[tuple[bytes, Tick]] = deque(maxlen=REPLAYED)
        self._numbers = itertools.count(1)
        self._server: Server | None = None
        self._generator: asyncio.Task[None] | None = None
        self._active: dict[int, Account] = {}
        self._changed = asyncio.Event()
        self._outage_until = 0.0
        self.bars = Bars()
        self._rest = RestApi(self.bars, token=TOKEN, timezone=self._timezone, now=market_clock, limit=rate_limit)
        self.accounts: list[Account] = []
        self.ticks_sent = 0
        self.made_at = array("q")
        """If it records: the instant of each tick, with or without a connection, as in the accounts."""

    @property
    def stream_url(self) -> str:
        """The URL of the stream."""
        return f"ws://{self._authority}:{self._port}{PATH}"

    @property
    def rest_url(self) -> str:
        """The base URL of the REST API."""
        return f"http://{self._authority}:{self._port}"

    @property
    def connected(self) -> int:
        """The number of authenticated streams."""
        return len(self._active)

    async def __aenter__(self) -> Self:
        try:
            self._server = await listen(
                self._converse,
                self._host,
                self._port,
                name="simulator",
                process_request=self._process_request,
                ping_interval=None,
            )
        except OSError as error:
            raise ConfigurationError(
                f"The simulator cannot listen on {self._host}:{self._port}: {error.strerror}. Use another --port."
            ) from None
        self._port = port_of(self._server)
        self._generator = asyncio.create_task(self._generate(), name="market")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        await self.stop_market()
        for account in self.accounts:
            account.connection.transport.resume_reading()  # ends a half-open state, so that it can be closed
        self._server.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2):
                await self._server.wait_closed()

    async def stop_market(self) -> None:
        """Stop the market."""
        if self._generator is not None:
            self._generator.cancel()
            await asyncio.gather(self._generator, return_exceptions=True)
            self._generator = None

    def send(self, ticks: Sequence[Tick]) -> None:
        """Stream ticks to every authenticated connection, in order."""
        for tick in ticks:
            self.bars.add(tick)
            message = price_message(tick, self._timezone)
            self._recent.append((message, tick))
            self._send(message, tick)

    def send_raw(self, message: str | bytes, *, text: bool | None = None) -> None:
        """Send any message: `str` as a text frame, `bytes` as a binary one, unless `text` overrides it."""
        broadcast([account.connection for account in self._listening()], message, text=text)

    def mute(self, account: Account) -> None:
        """Send no more messages on a connection, but answer its pings."""
        account.muted = True

    def drop_all(self) -> None:
        """Cut every connection without a closing handshake."""
        for account in list(self._active.values()):
            account.connection.transport.abort()

    def outage(self, seconds: float) -> None:
        """Cut all connections and refuse new ones (HTTP 503) for some seconds, while the market continues."""
        self._outage_until = time.monotonic() + seconds
        self.drop_all()

    async def wait_connected(self, number: int = 1) -> None:
        """Wait until there are `number` authenticated streams."""
        while len(self._active) != number:
            self._changed.clear()
            await self._changed.wait()

    def _listening(self) -> list[Account]:
        return [account for account in self._active.values() if not account.muted]

    def _send(self, message: bytes, tick: Tick) -> None:
        listening = self._listening()
        sent_at = now()
        if self._record:
            self.made_at.append(sent_at)
        broadcast([account.connection for account in listening], message, text=True)
        for account in listening:
            account.sent += 1
            self.ticks_sent += 1
            if self._record:
                account.ticks.append(tick)
                account.sent_at.append(sent_at)

    async def _generate(self) -> None:
        """Stream the market's trades, with malformed messages if that fault is enabled."""
        due = self._faults.due_after(Fault.GARBAGE)
        garbage_at = None if due is None else time.monotonic() + due
        while True:
            await asyncio.sleep(TICK_INTERVAL)
            self.send(self._market.until(self._clock()))
            if garbage_at is not None and time.monotonic() >= garbage_at:
                self.send_raw(self._faults.garbage())
                garbage_at = time.monotonic() + (self._faults.due_after(Fault.GARBAGE) or 0)
            for account in self._listening():
                if account.connection.transport.get_write_buffer_size() > WRITE_LIMIT:
                    account.connection.transport.abort()

    async def _process_request(self, _: ServerConnection, request: Request) -> Response | None:
        """Accept a WebSocket at its path; answer all other requests as the REST API."""
        if urlsplit(request.path).path == PATH:
            if time.monotonic() >= self._outage_until:
                return None
            return Response(HTTPStatus.SERVICE_UNAVAILABLE, "Service Unavailable", Headers({"Connection": "close"}))
        answer = self._rest.answer(request.path, request.headers.get("Authorization"))
        body = encode(answer)
        headers = Headers(
            {
                **answer.headers,
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                "Connection": "close",
            }
        )
        return Response(answer.status, HTTPStatus(answer.status).phrase, headers, body)

    async def _converse(self, connection: ServerConnection) -> None:
        """Authenticate a client, then serve it until it disconnects."""
        refusal = await self._refusal(connection)
        if refusal is not None:
            await refuse(connection, refusal)
            return
        account = Account(next(self._numbers), connection, authenticated_at=now(), port=connection.remote_address[1])
        self.accounts.append(account)
        try:
            # No await between these: after its authentication a client gets every tick.
            broadcast([connection], AUTHENTICATED, text=True)
            if Fault.REPLAY in self._faults and account.number > 1:
                for message, tick in self._recent:
                    broadcast([connection], message, text=True)
                    account.replayed.append(tick)
            self._enter(account)
            async for _ in connection:
                pass  # the client may send {"type": "ping"}; no answer is documented
        except ConnectionClosed:
            pass
        finally:
            for task in account.tasks:
                task.cancel()
            self._active.pop(account.number, None)
            self._changed.set()

    def _enter(self, account: Account) -> None:
        self._active[account.number] = account
        self._changed.set()
        for fault in (Fault.DROP, Fault.STALL, Fault.HALF_OPEN):
            due = self._faults.due_after(fault)
            if due is not None:
                account.tasks.append(asyncio.create_task(self._strike(account, fault, due), name=str(fault)))

    async def _strike(self, account: Account, fault: Fault, seconds: float) -> None:
        await asyncio.sleep(seconds)
        transport = account.connection.transport
        if fault is Fault.DROP:
            transport.abort()
            return
        account.muted = True
        if fault is Fault.HALF_OPEN:
            transport.pause_reading()
            # It does not notice the end of its client, and must not count against the plan's limit without end.
            self._active.pop(account.number, None)
            self._changed.set()

    async def _refusal(self, connection: ServerConnection) -> str | None:
        """Read the first message, and return the text of the error if it is refused."""
        message = await receive_login(connection, AUTHENTICATION_TIMEOUT)
        if message is None:
            return NO_AUTHENTICATION
        injected = self._faults.refusal() if token_of(message) == TOKEN else Fault.REJECT
        if injected is Fault.REJECT:
            return NOT_AUTHORISED
        if injected is Fault.NO_ACCESS:
            return NO_ACCESS
        if injected is Fault.LIMIT or len(self._active) >= self._max_streams:
            return stream_limit(self._max_streams)
        return None
