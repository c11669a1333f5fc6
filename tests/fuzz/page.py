"""Malformed and unfinished requests to the daemon's page always get an answer or a close, and probes are answered."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

from ingestor.simulator.server import TOKEN, Simulator
from tests.fuzz.target import Case, Counts, mutate
from tests.recording import running, settings

ANSWER_TIMEOUT = 20.0
"""Seconds until an answer or a close: twice the daemon's timeout for an idle client."""

PROBE = 8.0
_UNAVAILABLE = "postgresql://none:nothing@127.0.0.1:9/nowhere"
"""An unavailable database, without which the page must still work."""

_PATHS = ("/", "/healthz", "/readyz", "/metrics", "/status", "/events", "/page.js", "/../etc/passwd", "/%00", "*", "")
_METHODS = ("GET", "GET", "GET", "HEAD", "POST", "PUT", "OPTIONS", "CONNECT", "TRACE", "get", "G\0T", "")
_HEADERS = (
    "Host: localhost", "Host: example.org", "Host: ", "Connection: close", "Connection: upgrade", "Upgrade: websocket",
    "Upgrade: h2c", "Content-Length: 5", "Content-Length: -1", "Content-Length: 99999999999", "Content-Length: 5, 5",
    "Transfer-Encoding: chunked", "Transfer-Encoding: gzip, chunked", "Expect: 100-continue", "Accept: " + "a/b," * 200,
    "Accept: application/openmetrics-text; version=\xff", "Range: bytes=0-1", "X: " + "x" * 70_000, " folded: x",
    "no colon", "Origin: http://example.org", "Cookie: " + "c=1; " * 50, "Accept-Encoding: gzip",
    "X-Forwarded-For: 1.2.3.4",
)  # fmt: skip


_TLS = b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03"


def draw(chance: random.Random) -> bytes:
    """Draw a client's bytes: one or several requests, damaged or cut, or something else."""
    if chance.random() < 0.1:
        return chance.choice(
            (chance.randbytes(chance.randint(0, 300)), b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03", b"\n" * 500)
        )
    requests = b"".join(_request(chance) for _ in range(chance.choice((1, 1, 1, 5, 40))))
    if chance.random() < 0.4:
        requests = mutate(requests, chance)
    return requests[: chance.randrange(len(requests) + 1)] if chance.random() < 0.2 else requests


def _request(chance: random.Random) -> bytes:
    path = chance.choice(_PATHS) + chance.choice(("", "", "?x=%ff", "/", "?" + "q" * 9000, "#f"))
    version = chance.choice(("HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/9", ""))
    lines = [f"{chance.choice(_METHODS)} {path} {version}", *chance.sample(_HEADERS, chance.choice((0, 1, 2, 5)))]
    end = chance.choice(("\r\n", "\r\n", "\r\n", "\n"))
    body = chance.choice(("", "", "hello", "5\r\nhello\r\n0\r\n\r\n", "-1\r\n", "fffffffff\r\n"))
    return (end.join(lines) + end + end + body).encode("latin-1")


async def _exchange(host: str, port: int, request: bytes) -> int:
    """Send a request, close our side, and return how many bytes come back until the end."""
    reader, writer = await asyncio.open_connection(host, port)
    size = 0
    try:
        with contextlib.suppress(ConnectionError):
            writer.write(request)
            writer.write_eof()
            async with asyncio.timeout(ANSWER_TIMEOUT):
                while data := await reader.read(2**16):
                    assert TOKEN.encode() not in data, "the token is in an answer"
                    size += len(data)
                    if b"text/event-stream" in data:
                        break  # an answer without end
    except TimeoutError:
        raise AssertionError(f"{request!r:.300} is neither answered nor closed within {ANSWER_TIMEOUT:g} s") from None
    finally:
        await _abort(writer)
    return size


async def _abort(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


@asynccontextmanager
async def _idle_clients(host: str, port: int, requests: list[bytes]) -> AsyncIterator[None]:
    """Keep connections open that send requests and never read."""
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        for request in requests:
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.setblocking(False)
            with contextlib.suppress(OSError):
                await loop.sock_connect(client, (host, port))
                client.send(request)
        yield


async def _probe(host: str, port: int) -> None:
    """Check that a probe is answered; a refused one may try again."""
    request = f"GET /healthz HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode()
    try:
        async with asyncio.timeout(PROBE):
            while True:
                with contextlib.suppress(OSError):
                    reader, writer = await asyncio.open_connection(host, port)
                    writer.write(request)
                    answer = await reader.read()
                    await _abort(writer)
                    if answer:
                        break
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"/healthz was not answered within {PROBE:g} s") from None
    assert answer.startswith(b"HTTP/1.1 200 "), f"/healthz answers {answer!r:.100}"


@asynccontextmanager
async def testing(url: str) -> AsyncIterator[Case]:
    """Test the server at a URL."""
    parts = urlsplit(url)
    host, port = str(parts.hostname), int(parts.port or 80)

    async def case(chance: random.Random) -> Counts:
        requests = [draw(chance) for _ in range(chance.choice((1, 5, 20)))]
        crowd = [draw(chance) * 20 for _ in range(chance.choice((0, 0, 0, 10, 160)))]
        async with _idle_clients(host, port, crowd):
            if len(crowd) < 100:  # beyond that number the server closes new connections at once, and so do we
                sizes = await asyncio.gather(*(_exchange(host, port, request) for request in requests))
                answered = sum(size > 0 for size in sizes)
            else:
                answered = 0
            await _probe(host, port)
        return Counter(requests=len(requests) + len(crowd), answered=answered)

    yield case


@asynccontextmanager
async def target(directory: Path) -> AsyncIterator[Case]:
    """Run a daemon with a market and without a database."""
    async with Simulator(port=0, rate=50) as simulator:
        configuration = settings(simulator, _UNAVAILABLE, spool_dir=directory, http_port=0, stop_timeout="1s")
        async with running(configuration) as daemon:
            while not daemon.http.is_bound:
                await asyncio.sleep(0.01)
            async with testing(daemon.http.url) as case:
                yield case
