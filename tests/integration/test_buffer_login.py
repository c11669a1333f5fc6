"""The login at NATS and its encryption, with real servers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import nkeys  # type: ignore[import-untyped]
import pytest
import trustme

from ingestor.errors import ConfigurationError
from ingestor.jetstream.link import Link
from ingestor.settings import Settings, load_settings
from tests.clocks import HANG_SECONDS
from tests.nats_servers import Cluster, buffer_settings, running_cluster

SECRET = "an-unusual-secret"


async def connects(settings: Settings) -> str:
    """Return an empty text if the login works, else the error of an operator."""
    link = Link(settings, name="test", on_change=lambda _: None)
    running = asyncio.create_task(link.run())
    waiting = asyncio.create_task(link.wait(HANG_SECONDS))
    try:
        await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            assert await waiting
            await link.api("INFO")
            return ""
        error = running.exception()
        assert isinstance(error, ConfigurationError)
        return str(error)
    finally:
        waiting.cancel()
        running.cancel()
        await asyncio.gather(running, waiting, return_exceptions=True)


def with_file(cluster: Cluster, path: Path, text: str) -> Settings:
    """Return settings with a credentials file."""
    path.write_text(text, encoding="ascii")
    path.chmod(0o600)
    return buffer_settings(cluster, buffer_credentials_file=path)


@pytest.mark.parametrize(
    ("extra", "right", "wrong"),
    [
        (f"authorization {{ user: rec, password: {SECRET} }}", f"rec:{SECRET}\n", "rec:another\n"),
        (f"authorization {{ token: {SECRET} }}", SECRET, "another"),
    ],
    ids=["password", "token"],
)
async def test_a_login_by_a_secret(extra: str, right: str, wrong: str, tmp_path: Path) -> None:
    """The right secret works; a wrong or a missing one ends with the setting's name, and without the secret."""
    async with running_cluster(tmp_path / "nats", extra=extra) as cluster:
        file = tmp_path / "credentials"
        assert await connects(with_file(cluster, file, right)) == ""
        refused = await connects(with_file(cluster, file, wrong))
        assert "INGESTOR_BUFFER_CREDENTIALS_FILE" in refused
        assert "another" not in refused
        assert "INGESTOR_BUFFER_CREDENTIALS_FILE" in await connects(buffer_settings(cluster))


async def test_a_login_by_a_key(tmp_path: Path) -> None:
    """Of an NKey only a signature travels."""
    seed = nkeys.encode_seed(b"0123456789abcdef0123456789abcdef", nkeys.PREFIX_BYTE_USER)
    public = nkeys.from_seed(seed).public_key.decode()
    users = f"authorization {{ users: [{{ nkey: {public} }}] }}"
    async with running_cluster(tmp_path / "nats", extra=users) as cluster:
        assert await connects(with_file(cluster, tmp_path / "seed", seed.decode())) == ""
        assert "refuses the login" in await connects(buffer_settings(cluster))


async def test_encryption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tls://` checks the server's certificate, as for the stream."""
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    tls = f'tls {{ cert_file: "{tmp_path}/cert.pem", key_file: "{tmp_path}/key.pem" }}'
    async with running_cluster(tmp_path / "nats", extra=tls) as cluster:
        url = f"tls://localhost:{cluster.servers[0].port}"
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        assert await connects(load_settings(buffer_url=url)) == ""
        trustme.CA().cert_pem.write_to_path(str(tmp_path / "another.pem"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "another.pem"))
        problems: list[str | None] = []
        link = Link(load_settings(buffer_url=url), name="test", on_change=problems.append)
        running = asyncio.create_task(link.run())
        async with asyncio.timeout(HANG_SECONDS):
            while not problems:
                await asyncio.sleep(0.02)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert "certificate" in str(problems[0])


@pytest.mark.parametrize(
    ("url", "text", "words"),
    [
        ("nats://nats.example.org", "rec:secret-word", "would travel unencrypted"),
        ("nats://127.0.0.1", "", "no single line"),
        ("nats://127.0.0.1", "one\ntwo\n", "no single line"),
        ("nats://127.0.0.1", "-----BEGIN NATS USER JWT-----\nabc\n------END NATS USER JWT------\n", "no NKey seed"),
    ],
)
async def test_files_that_cannot_be_used(url: str, text: str, words: str, tmp_path: Path) -> None:
    """A file that is no login is named, without its content."""
    file = tmp_path / "credentials"
    file.write_text(text, encoding="ascii")
    file.chmod(0o600)
    error = await connects(load_settings(buffer_url=url, buffer_credentials_file=file))
    assert words in error
    assert "secret-word" not in error


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nats://user:password@localhost", "INGESTOR_BUFFER_CREDENTIALS_FILE"),
        ("http://localhost", "nats://HOST"),
        ("nats://a,tls://b", "unencrypted"),
        ("nats://a/path", "no path"),
        ("nats://a:99999", "nats://HOST"),
        ("", "nats://HOST"),
    ],
)
def test_addresses_that_cannot_be_used(url: str, words: str) -> None:
    """A wrong address is refused with the right form, and without a password that it holds."""
    with pytest.raises(ConfigurationError, match=words) as found:
        load_settings(buffer_url=url)
    assert "user:password" not in str(found.value)
