from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trustme

from ingestor.errors import ConfigurationError
from ingestor.model import Tick
from ingestor.service.daemon import Daemon
from ingestor.service.signals import StopRequest
from ingestor.simulator.server import Simulator
from tests.integration.test_daemon import NOW, running, settings, until


@contextlib.asynccontextmanager
async def encrypted(simulator: Simulator, context: ssl.SSLContext) -> AsyncIterator[str]:
    """Put TLS in front of the simulator; yield the wss:// address."""
    target = urlsplit(simulator.stream_url)

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection(target.hostname, target.port)
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    server = await asyncio.start_server(serve, "localhost", 0, ssl=context, family=2)
    async with server:
        yield f"wss://localhost:{server.sockets[0].getsockname()[1]}/ws"


def certificate(tmp_path: Path, name: str) -> ssl.SSLContext:
    """Make a certificate for a host name, and leave its authority in `ca.pem`."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(name).configure_cert(context)
    return context


async def test_a_valid_certificate(
    writer_url: str, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wss:// works with a certificate of an authority that this machine trusts."""
    context = certificate(tmp_path, "localhost")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    async with Simulator(port=0, rate=0) as simulator, encrypted(simulator, context) as url:
        async with running(settings(simulator, writer_url, stream_url=url)):
            await simulator.wait_connected()
            simulator.send([Tick("AIR.NZ", NOW, 0.5, 100)])
            await until(database, "SELECT count(*) FROM market.ticks", 1)


@pytest.mark.parametrize(("name", "trusted"), [("localhost", False), ("example.org", True)])
async def test_an_invalid_certificate(
    writer_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, trusted: bool
) -> None:
    """An unknown authority, or the wrong name, needs a person; the token is not sent."""
    context = certificate(tmp_path, name)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    async with Simulator(port=0, rate=0) as simulator, encrypted(simulator, context) as url:
        daemon = Daemon(settings(simulator, writer_url, stream_url=url))
        with pytest.raises(ConfigurationError, match="certificate is not valid"):
            await asyncio.wait_for(daemon.run(StopRequest()), 10)
        assert simulator.accounts == []
