"""Hostile clients of the HTTP server, on real sockets, delay no other client and get nothing by a false host name."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import select
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from prometheus_client import CollectorRegistry

from ingestor.web import app
from ingestor.web.app import make_app
from ingestor.web.server import HttpServer, Limits
from tests.clocks import HANG_SECONDS
from tests.http import mute

LARGE = "x" * 3_000_000
GET = b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n"


class FakeDaemon:
    """A daemon that only has a status, of `size` bytes."""

    def __init__(self, size: int = 10_000) -> None:
        self._status = {"text": LARGE[:size]}

    def loops(self) -> dict[str, bool]:
        return {"reader": True}

    def readiness(self) -> dict[str, Any]:
        return {"ready": False, "problems": [{"check": "database", "detail": "db.internal refuses"}]}

    def status(self) -> dict[str, Any]:
        return self._status


@contextlib.asynccontextmanager
async def serving(limits: Limits | None = None, source: FakeDaemon | None = None) -> AsyncIterator[str]:
    """Serve the application and yield its URL."""
    server, closing = HttpServer("127.0.0.1", 0, limits), asyncio.Event()
    server.bind()
    url = server.url
    task = asyncio.create_task(server.serve(make_app(source or FakeDaemon(), CollectorRegistry(), closing)))
    try:
        yield url
    finally:
        closing.set()
        server.stop()
        await asyncio.wait_for(task, HANG_SECONDS)


def is_cut(peer: socket.socket) -> bool:
    """Return whether the server has closed the connection, without reading from it."""
    poll = select.poll()
    poll.register(peer, select.POLLRDHUP)
    return bool(poll.poll(0))


async def cut(peer: socket.socket) -> None:
    """Wait until the server has closed a connection."""
    async with asyncio.timeout(60):
        while not is_cut(peer):
            await asyncio.sleep(0.02)


def client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, trust_env=False, timeout=60)


async def test_clients_that_never_read_leave_room_for_probes() -> None:
    """The next client is answered before any deadline, however many clients send requests and do not read."""
    kinds = [
        GET % b"/status",
        GET % b"/metrics",
        GET % b"/events",
        GET % b"/status" * 500,
        b"GET / HTTP/1.1\r\nX-",
        b"",
    ]
    async with serving(Limits(timeout=3600)) as url, mute(url, *kinds * 50), client(url) as probe:
        for _ in range(3):
            assert (await probe.get("/healthz")).status_code == 200
            assert (await probe.get("/readyz", headers={"Connection": "close"})).status_code == 503


async def test_slow_clients_are_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that send no request or do not read are disconnected, also if they send a byte now and then."""
    monkeypatch.setattr(app, "EVENT_INTERVAL", 0.002)
    kinds = [
        b"",
        b"GET / HTTP/1.1\r\nX-Endless: ",  # half of a request
        GET % b"/healthz" + b"GET / HTTP",  # half of the next one
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n",  # half of a body
        GET % b"/status" * 500,
        GET % b"/events",
    ]
    async with serving(Limits(timeout=0.2)) as url, mute(url, *kinds) as peers, asyncio.timeout(60):
        while not all(map(is_cut, peers)):
            for peer in peers:
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    peer.send(b"x")
            await asyncio.sleep(0.02)


async def test_an_event_client_that_never_reads_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client of the events that does not read is disconnected, and a page that does gets its place."""
    monkeypatch.setattr(app, "EVENT_INTERVAL", 0.002)
    monkeypatch.setattr(app, "MAX_WATCHERS", 1)
    async with serving(Limits(timeout=0.2)) as url, client(url) as page:
        async with mute(url, GET % b"/events"), asyncio.timeout(60):
            while True:
                async with page.stream("GET", "/events") as response:
                    if response.status_code == 200:
                        break
                    await asyncio.sleep(0.02)


async def test_a_client_that_reads_receives_everything() -> None:
    """A long answer, and another one on the same connection, are received completely."""
    async with serving(source=FakeDaemon(len(LARGE))) as url, client(url) as peer:
        for _ in range(2):
            assert (await peer.get("/status")).json() == {"text": LARGE}
        assert (await peer.get("/healthz")).status_code == 200


async def test_a_new_client_replaces_the_longest_idle_one() -> None:
    """A page in use is not replaced, unless all places are taken by such pages."""
    async with serving(Limits(connections=3, timeout=3600)) as url, client(url) as page:
        async with page.stream("GET", "/events") as response:
            events = response.aiter_lines()
            await anext(events)
            async with mute(url, b"") as (first,), mute(url, b"") as (second,):
                async with mute(url, b"") as (third,):
                    await cut(first)
                    async with mute(url, b""):
                        await cut(second)
                        assert not is_cut(third)
                        async with asyncio.timeout(HANG_SECONDS):
                            while not (await anext(events)).startswith("data"):
                                pass
        pages = [page.stream("GET", "/events") for _ in range(3)]
        async with pages[0], pages[1], pages[2], client(url) as probe:
            assert (await probe.get("/healthz")).status_code == 200


async def test_connections_that_are_opened_and_left() -> None:
    """Abandoned connections take no more descriptors than the limit."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    async with serving(Limits(connections=20, timeout=3600)) as url, client(url) as probe:
        address = urlsplit(url)
        for _ in range(400):
            peer = socket.socket()
            peer.setblocking(False)
            await asyncio.get_running_loop().sock_connect(peer, (address.hostname, address.port))
            peer.close()
        async with mute(url, *[b""] * 100):
            assert (await probe.get("/healthz")).status_code == 200
            assert len(list(Path("/proc/self/fd").iterdir())) < before + 100 + 20 + 2 * 10 + 10


def test_few_descriptors_mean_fewer_clients() -> None:
    """The recorder keeps the descriptors that it needs."""
    assert Limits().within(1024) == Limits()
    assert Limits(timeout=1).within(64) == Limits(connections=16, timeout=1)
    assert Limits().within(3).connections == Limits().within(3).accepted_at_once == 1
    assert Limits().within(-1) == Limits()


async def test_a_request_that_is_broken_in_the_middle_of_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    """A request that breaks off during the answer ends the connection and is not logged as an error."""
    head = b"GET /events HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with serving() as url, mute(url, head) as (peer,):
        await asyncio.sleep(0.05)
        peer.send(b"no chunk\r\n")
        await cut(peer)
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_the_stop_does_not_wait_for_a_client_that_never_reads(caplog: pytest.LogCaptureFixture) -> None:
    """A client that never reads neither delays the stop nor makes it fail."""
    async with serving(Limits(timeout=3600)) as url, mute(url, GET % b"/status" * 500):
        await asyncio.sleep(0.1)
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_an_unknown_host_name() -> None:
    """A request for another host name gets nothing from any path."""
    async with serving() as url, client(url) as peer:
        for path in ("/", "/page.js", "/status", "/metrics", "/events", "/nothing"):
            response = await peer.get(path, headers={"Host": "evil.example:9464"})
            assert response.status_code == 421
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert "evil" not in response.text


async def test_probes_by_any_name() -> None:
    """Probes are answered under any name, without details."""
    async with serving() as url, client(url) as peer:
        strange = {"Host": "ingestor.monitoring.svc"}
        assert (await peer.get("/healthz", headers=strange)).status_code == 200
        assert (await peer.get("/readyz", headers=strange)).json() == {"ready": False}
        assert "db.internal" in (await peer.get("/readyz")).text


async def test_requests_without_exactly_one_host() -> None:
    """HTTP/1.1 needs exactly one host; health is answered to older probes too; the size of a head is limited."""
    async with serving() as url:
        address = urlsplit(url)
        for head, status in (
            (b"GET /status HTTP/1.0\r\n", b"421"),
            (b"GET /status HTTP/1.1\r\n", b"400"),
            (b"GET /status HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n", b"400"),
            (b"GET http://localhost/status HTTP/1.1\r\nHost: evil.example\r\n", b"421"),
            (b"GET /status HTTP/1.1\r\nHost: evil.example\r\nX-Forwarded-Host: localhost\r\n", b"421"),
            (b"GET /healthz HTTP/1.0\r\n", b"200"),
            (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 100_000 + b"\r\n", b"400"),
            (b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n", b"400"),
        ):
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            writer.write(head + b"Connection: close\r\n\r\n")
            async with asyncio.timeout(60):
                assert (await reader.readline()).split()[1] == status, head
            writer.close()
