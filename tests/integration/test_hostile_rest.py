"""Hostile REST servers can neither exhaust memory or time nor falsify an answer."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import zlib
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import pytest

from ingestor.backfill import client as module
from ingestor.backfill.answers import MAX_VALUES
from ingestor.backfill.client import MAX_ANSWER, SourceError
from ingestor.model import SECOND
from ingestor.redaction import register_secret
from ingestor.simulator.server import TOKEN
from tests.clocks import ManualClock
from tests.integration.test_rest_client import MINUTE, START, bar, bars, client, minutes
from tests.rest import Endless, Reply, Request, answer, scripted

GOOD = json.dumps({"data": [bar(1)]}).encode()


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [
        ("gzip", gzip.compress),
        ("gzip, gzip", lambda body: gzip.compress(gzip.compress(body))),
        ("deflate", zlib.compress),
        ("br", bytes),
        ("zstd", bytes),
        ("identity, gzip", gzip.compress),
        ("x" * 5000, bytes),
    ],
)
async def test_a_compressed_answer(encoding: str, pack: Callable[[bytes], bytes]) -> None:
    """A compressed answer is refused before its body is read; the error names the encoding."""
    async with scripted(lambda _: answer(pack(GOOD), content_encoding=encoding)) as server:
        with pytest.raises(SourceError, match=rf"compressed \({encoding[:39]}"):
            await minutes(server.url)
        assert [asked.headers["accept-encoding"] for asked in server.asked] == ["identity"]


@pytest.mark.parametrize("encoding", ["identity", "Identity", ""])
async def test_an_answer_with_identity_encoding(encoding: str) -> None:
    """An answer with `Content-Encoding: identity` is accepted."""
    async with scripted(lambda _: answer(GOOD, content_encoding=encoding)) as server:
        assert await minutes(server.url) == [1]


@pytest.mark.parametrize(
    "reply",
    [
        Endless(b"HTTP/1.1 200 X\r\ncontent-length: 1000\r\n\r\n", b" ", 0.02),
        Endless(b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\n", b"1\r\n \r\n", 0.02),
        Endless(b"HTTP/1.1 200 X\r\n", b"x: y\r\n", 0.02),
        Endless(b"", b"H", 0.02),
        Endless(b"", b"HTTP/1.1 103 X\r\nx: y\r\n\r\n"),
    ],
    ids=["body", "chunks", "headers", "status line", "interim answers"],
)
async def test_an_answer_that_trickles(reply: Reply, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait ends however the answer continues: single bytes do not extend it."""
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    async with scripted(lambda _: reply) as server:
        with pytest.raises(SourceError, match="no complete answer"):
            await minutes(server.url, timeout=0.1)


async def test_a_server_that_never_shakes_hands(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TLS handshake without an answer times out."""
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    async with scripted(lambda _: b"") as server:
        with pytest.raises(SourceError, match="no complete answer"):
            await minutes(server.url.replace("http:", "https:"), timeout=0.1)


@pytest.mark.parametrize(
    "reply",
    [
        Endless(b"HTTP/1.1 200 X\r\n\r\n", b" " * 65536),
        Endless(b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\n", b"10000\r\n" + b" " * 65536 + b"\r\n"),
        Endless(f"HTTP/1.1 200 X\r\ncontent-length: {10**15}\r\n\r\n".encode(), b" " * 65536),
    ],
    ids=["until the end", "chunks", "length"],
)
async def test_an_endless_body(reply: Reply) -> None:
    """An endless body is read up to a fixed size."""
    async with scripted(lambda _: reply) as server:
        with pytest.raises(SourceError, match="larger than 4 MiB"):
            await minutes(server.url)


@pytest.mark.parametrize(
    "reply",
    [
        Endless(b"HTTP/1.1 200 X\r\n", b"x: " + b"y" * 5000 + b"\r\n"),
        Endless(b"HTTP/1.1 200 X\r\nx: ", b"y" * 5000),
        Endless(b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\n1;", b"x" * 5000),
        Endless(b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\n0\r\n", b"x: " + b"y" * 5000 + b"\r\n"),
        b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 X\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 X\r\ncontent-length: -5\r\n\r\n" + GOOD,
        b"HTTP/1.1 200 X\r\ncontent-length: 5\r\ncontent-length: 500\r\n\r\n" + GOOD,
        f"HTTP/1.1 200 X\r\ncontent-length: {len(GOOD) + 1}\r\n\r\n".encode() + GOOD,
        f"HTTP/1.1 200 X\r\ncontent-length: {len(GOOD) - 1}\r\n\r\n".encode() + GOOD,
        b"HTTP/1.1 101 X\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n" + GOOD,
        b"HTTP/1.1 20 X\r\n\r\n" + GOOD,
        answer(b"\x1f\x8b" + GOOD),
        TOKEN.encode() * 5000 + b"\r\n\r\n",
    ],
)  # fmt: skip
async def test_frames_that_are_broken(reply: Reply, monkeypatch: pytest.MonkeyPatch) -> None:
    """Endless headers, wrong lengths and broken chunks give a short error without secrets."""
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    register_secret(TOKEN)
    async with scripted(lambda _: reply) as server:
        with pytest.raises(SourceError) as caught:
            await minutes(server.url)
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()
    assert TOKEN not in str(caught.value)


async def test_an_unexpected_second_answer() -> None:
    """A second answer on a connection is not used for the next request, and no cookie is sent back."""
    other = answer({"data": [bar(7)]}).replace(b"connection: close\r\n", b"")
    first = answer({"data": [bar(1)]}, set_cookie="a=b").replace(b"connection: close\r\n", b"")
    async with scripted(lambda _: first + other) as server, client(server.url) as found:
        for _ in range(3):
            received = await found.minutes("AIR.NZ", START, START + 10 * MINUTE, "start")
            assert [each.time for each in received.bars] == [START + MINUTE]
        assert len(server.asked) == 3
        assert not any("cookie" in asked.headers for asked in server.asked)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("nan", 10), ("inf", 10), ("-inf", 10), ("1e999", 10), ("soon", 10), ("9" * 5000, 3600), ("1e308", 3600),
        ("-1e308", 1), ("-5", 1), ("0", 1), ("40", 40), ("Fri, 31 Dec 9999 23:59:59 GMT", 3600),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 1), ("Thu, 01 Jan 0001 00:00:00 GMT", 1), ("Thu, 99 Foo 1 9:9:9 X", 10),
        ("date", 40),
    ],
)  # fmt: skip
@pytest.mark.parametrize("header", ["retry_after", "x_ratelimit_reset"])
async def test_absurd_limits(text: str, seconds: float, header: str) -> None:
    """The wait for an invalid or distant reset is limited."""
    clock = ManualClock()
    waits: list[float] = []
    written = formatdate(clock.wall() / SECOND + 40, usegmt=True) if text == "date" else text
    limits: dict[str, Any] = {header: written}
    left = [answer({}, status=429, **limits)]

    def script(_: Request) -> bytes:
        return left.pop() if left else bars(1)

    async with scripted(script) as server:
        async with module.RestClient(
            server.url, TOKEN, timezone="Pacific/Auckland", clock=clock, on_wait=waits.append
        ) as found:
            await found.minutes("AIR.NZ", START, START + 5 * MINUTE, "start")
    assert waits == [pytest.approx(seconds, abs=2)]


MEASURE = """
import asyncio, resource
from tests.integration.test_hostile_rest import HOSTILE, SourceError, answer, minutes, module, scripted

async def main():
    module.ATTEMPTS = 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, (body, headers) in HOSTILE.items():
        async with scripted(lambda _: answer(body(), **headers)) as server:
            try:
                await minutes(server.url, timeout=60)
            except SourceError:
                pass
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)

asyncio.run(main())
"""


def filled(start: bytes, unit: bytes, end: bytes = b"]}") -> bytes:
    """Return a body just below the size limit."""
    return start + unit * ((MAX_ANSWER - len(start) - len(end)) // len(unit)) + end


def bomb() -> bytes:
    """Return a few kilobytes that unpack, in two steps, to two gigabytes."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    mebibyte = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return gzip.compress(b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + 2048 * mebibyte, 9)


HOSTILE: dict[str, tuple[Callable[[], bytes], dict[str, Any]]] = {
    "lists": (lambda: filled(b'{"data": [[]', b",[]"), {}),
    "objects": (lambda: filled(b'{"data": [{}', b",{}"), {}),
    "numbers": (lambda: filled(b'{"data": [1', b",1"), {}),
    "not numbers": (lambda: filled(b'{"data": [NaN', b",NaN"), {}),
    "names": (lambda: filled(b'{"data": [NaN', b',{"":"abcdefghijklmno"}'), {}),
    "nested": (lambda: filled(b'{"data": [', b"[" * 500 + b"]" * 500 + b","), {}),
    "a long name": (lambda: filled(b'{"data": [], "ticker": "', b"\\u0000", b'"}'), {}),
    "a long timestamp": (lambda: filled(b'{"data": [{"timestamp": "', b"\\u0000", b'"}]}'), {}),
    "a long number": (lambda: filled(b'{"data": [{"timestamp": "2026-11-20T10:01:00", "open":', b"9", b"}]}"), {}),
    "wrong records": (lambda: b'{"data": [NaN' + b",{}" * (MAX_VALUES // 2 - 10) + b"]}", {}),
    "too large": (lambda: b" " * (2 * MAX_ANSWER), {}),
}
HOSTILE["bomb"] = (bomb, {"content_encoding": "gzip, gzip"})


def test_limits_of_an_answer() -> None:
    """An answer takes a few times its own size of memory, whatever its content; its size is limited."""
    found = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, timeout=120)
    assert int(found.stdout) < 200
