"""Stream and REST API use the environment's proxy and certificate authorities by one rule."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib.util
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trustme
from websockets.exceptions import WebSocketException

from ingestor.backfill.client import RestClient, SourceError
from ingestor.clock import SystemClock
from ingestor.errors import ConfigurationError
from ingestor.network import is_excepted, proxy_for
from ingestor.settings import load_settings
from ingestor.simulator.server import TOKEN, Simulator
from ingestor.stream.connection import open_connection
from ingestor.stream.retry import RetryPolicy, classify
from tests.commands import ingestor
from tests.proxy import Proxy, pump

HOST = "feed.invalid"
PASSWORD = "Qz1@Qz2"
SOCKS = importlib.util.find_spec("socksio") is not None or importlib.util.find_spec("python_socks") is not None


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "WSS_PROXY", "SOCKS_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@contextlib.asynccontextmanager
async def tunnel(port: int, status: str = "200 OK") -> AsyncIterator[tuple[str, list[str]]]:
    """Run a CONNECT proxy that leads every host to one port; yield its address and the requests."""
    asked: list[str] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(f"HTTP/1.1 {status}\r\n\r\n".encode())
        if not status.startswith("200"):
            writer.close()
            return
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.closing(writer), contextlib.closing(far_writer):
            await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))

    reader = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://user:{PASSWORD}@127.0.0.1:{reader.sockets[0].getsockname()[1]}", asked
    finally:
        reader.close()


@contextlib.asynccontextmanager
async def encrypted(tmp_path: Path) -> AsyncIterator[int]:
    """Run a simulator behind TLS and yield its port; its authority is in `ca.pem`."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(HOST, "localhost").configure_cert(context)
    async with Simulator(port=0, rate=0) as simulator, Proxy(simulator.stream_url, context=context) as proxy:
        yield proxy.port


async def stream(port: int, host: str = HOST) -> None:
    async with open_connection(f"wss://{host}:{port}/ws"):
        pass


async def rest(port: int, host: str = HOST) -> None:
    url = f"https://{host}:{port}"
    async with RestClient(url, TOKEN, timezone="UTC", clock=SystemClock(), timeout=5) as client:
        await client.validate()


Way = Callable[..., Awaitable[None]]
BOTH = pytest.mark.parametrize("way", [stream, rest])


@BOTH
@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])
async def test_a_proxy(way: Way, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both use the proxy with its user and password, encrypted end to end; the proxy never sees the token."""
    async with encrypted(tmp_path) as port, tunnel(port) as (address, asked):
        monkeypatch.setenv(name, address)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        await way(port)
    (request,) = asked
    assert request.startswith(f"CONNECT {HOST}:{port} ")
    assert base64.b64encode(f"user:{PASSWORD}".encode()).decode() in request
    assert TOKEN not in request


@BOTH
async def test_no_proxy(way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host of NO_PROXY is reached without the proxy."""
    async with encrypted(tmp_path) as port, tunnel(port) as (address, asked):
        monkeypatch.setenv("HTTPS_PROXY", address)
        monkeypatch.setenv("NO_PROXY", f"example.org, localhost:{port}")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        await way(port, "localhost")
    assert asked == []


@BOTH
@pytest.mark.parametrize(
    ("status", "words", "fatal"),
    [("407 Qz1@Qz2", "HTTP 407. Check the user", True), ("403 No", "NO_PROXY", True), ("502 No", "HTTP 502", False)],
)
async def test_a_proxy_that_refuses(
    way: Way, status: str, words: str, fatal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the proxy and, if the proxy is wrong from the start, the remedy; it shows no password."""
    async with tunnel(1, status) as (address, _):
        monkeypatch.setenv("HTTPS_PROXY", address)
        load_settings()
        with pytest.raises((WebSocketException, ConfigurationError, SourceError)) as caught:
            await way(443)
    decided = classify(caught.value, accepted_before=False, now=0)
    message = decided.message if way is stream else str(caught.value)
    assert "roxy of the environment" in message
    assert words in message
    assert "Qz" not in message
    assert fatal is (
        decided.policy is RetryPolicy.FATAL if way is stream else isinstance(caught.value, ConfigurationError)
    )


@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Service Unavailable"])
async def test_retry_after_of_a_proxy(status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy proxy that sends Retry-After is not tried earlier."""
    async with tunnel(1, f"{status}\r\nRetry-After: 60") as (address, _):
        monkeypatch.setenv("HTTPS_PROXY", address)
        with pytest.raises(WebSocketException) as caught:
            await stream(443)
    decision = classify(caught.value, accepted_before=False, now=0)
    assert decision.policy is RetryPolicy.BACKOFF
    assert decision.retry_after == 60
    assert decision.message.endswith(f"answered HTTP {status[:3]}. It asks to wait for 60 s.")


@BOTH
async def test_trusted_certificate_authorities(way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the system's authorities or SSL_CERT_FILE are trusted; an unreadable file is named."""
    async with encrypted(tmp_path) as port:
        with pytest.raises((ssl.SSLCertVerificationError, ConfigurationError)) as caught:
            await way(port, "localhost")
        assert "certificate is not valid" in classify(caught.value, accepted_before=False, now=0).message
        (tmp_path / "no.pem").write_text("x")
        for name in ("no.pem", "missing.pem"):
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / name))
            with pytest.raises(ConfigurationError, match=f"SSL_CERT_FILE: .*{name}"):
                await way(port, "localhost")


@pytest.mark.skipif(SOCKS, reason="the packages are installed here")
@BOTH
@pytest.mark.parametrize("address", ["socks5://127.0.0.1:1", "socks://127.0.0.1:1", "socks5h://u:Qz1@127.0.0.1:1"])
async def test_a_socks_proxy_without_its_package(way: Way, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing package is an error that requires operator action and names what to install."""
    monkeypatch.setenv("ALL_PROXY", address)
    with pytest.raises(ConfigurationError, match=r"ALL_PROXY: .*pip install 'python-socks\[asyncio\]' 'socksio'"):
        await way(443)


@pytest.mark.parametrize(
    ("exceptions", "host", "expected"),
    [
        ("", "a.example.org", False),
        ("*", "a.example.org", True),
        ("x, *", "a.example.org", True),
        ("example.org", "a.example.org", True),
        (".example.org", "a.example.org", True),
        ("*.example.org", "A.Example.org.", True),
        ("ample.org", "a.example.org", False),
        ("b.org  example.org:443", "a.example.org", True),
        ("example.org:8443", "a.example.org", False),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("10.0.0.0/8", "ten.example.org", False),
        ("10.1.*", "10.1.2.3", True),
        ("2001:db8::/32", "2001:db8::1", True),
        ("[2001:db8::1]:443", "2001:DB8:0::1", True),
        ("10.1.2.3:80", "10.1.2.3", False),
    ],
)
def test_exceptions(exceptions: str, host: str, expected: bool) -> None:
    """NO_PROXY holds hosts, domains, addresses, networks and ports, separated by commas or spaces."""
    assert is_excepted(exceptions, host, 443) is expected


def test_unencrypted_loopback_bypasses_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unencrypted loopback addresses bypass the proxy; encrypted ones use it."""
    monkeypatch.setenv("ALL_PROXY", "http://proxy.invalid:1")
    assert proxy_for("http://localhost:5005") is None
    assert proxy_for("ws://localhost:5005/ws") is None
    assert proxy_for("https://localhost:5005") == "http://proxy.invalid:1"


async def test_check_names_the_failure(writer_url: str) -> None:
    """`check` asks the REST API: a refused token is an error, an unavailable provider a warning."""
    async with Simulator(port=0, rate=0) as simulator:
        common = {"STREAM_URL": simulator.stream_url, "DATABASE_URL": writer_url}
        wrong = await ingestor("check", TOKEN="tk_0123456789abcdefg", REST_URL=simulator.rest_url, **common)
        away = await ingestor("check", TOKEN=TOKEN, REST_URL="http://127.0.0.1:1", **common)
    assert wrong[0] == 78
    assert "problem  rest" in wrong[1]
    assert "INGESTOR_TOKEN: 127.0.0.1 refused it (403" in wrong[1].replace("localhost", "127.0.0.1")
    assert away[0] == 0
    assert "warning  rest" in away[1]
    assert "Connection refused" in away[1]
