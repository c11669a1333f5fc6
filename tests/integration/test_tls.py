from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest
import trustme

from ingestor.errors import ConfigurationError
from ingestor.model import Tick
from ingestor.service.daemon import Daemon
from ingestor.service.process import StopRequest
from ingestor.simulator.server import Simulator
from tests.clocks import HANG_SECONDS
from tests.proxy import Proxy
from tests.recording import NOW, running, settings, until


def encrypted(proxy: Proxy) -> str:
    """Yield the address of a simulator behind TLS."""
    return f"wss://localhost:{proxy.port}/ws"


def certificate(tmp_path: Path, name: str) -> ssl.SSLContext:
    """Make a certificate for a host name, and write its authority to `ca.pem`."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(name).configure_cert(context)
    return context


async def test_a_valid_certificate(
    writer_url: str, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wss:// works with a certificate of a trusted authority."""
    context = certificate(tmp_path, "localhost")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    async with Simulator(port=0, rate=0) as simulator, Proxy(simulator.stream_url, context=context) as proxy:
        async with running(settings(simulator, writer_url, stream_url=encrypted(proxy))):
            await simulator.wait_connected()
            simulator.send([Tick("AIR.NZ", NOW, 0.5, 100)])
            await until(database, "SELECT count(*) FROM market.ticks", 1)


@pytest.mark.parametrize(("name", "trusted"), [("localhost", False), ("example.org", True)])
async def test_an_invalid_certificate(
    writer_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, trusted: bool
) -> None:
    """An unknown authority or a wrong name requires operator action; the token is not sent."""
    context = certificate(tmp_path, name)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    async with Simulator(port=0, rate=0) as simulator, Proxy(simulator.stream_url, context=context) as proxy:
        daemon = Daemon(settings(simulator, writer_url, stream_url=encrypted(proxy)))
        with pytest.raises(ConfigurationError, match="certificate is not valid"):
            await asyncio.wait_for(daemon.run(StopRequest()), HANG_SECONDS)
        assert simulator.accounts == []
