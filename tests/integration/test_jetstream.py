"""Publishing and reading with real NATS servers: each message has its place, and is read once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import nkeys
import pytest
import trustme

from ingestor.clock import SystemClock
from ingestor.errors import BufferUnavailableError, ConfigurationError
from ingestor.jetstream.login import login_options
from ingestor.jetstream.outlet import Outlet, SequenceError
from ingestor.jetstream.reader import Received, StreamReader
from ingestor.jetstream.setup import wanted
from ingestor.jetstream.survey import prepare, survey
from ingestor.model import Batch, Session
from ingestor.redaction import redact
from ingestor.service.checks import Severity, check_buffer
from ingestor.settings import load_settings
from tests.clocks import HANG_SECONDS
from tests.nats_servers import Cluster, api, buffer_settings, connected, free_ports, linked, running_cluster

SEED = "SUACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY"
"""A key of NATS's documentation."""


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """Yield one server."""
    async with running_cluster(tmp_path / "nats") as cluster:
        yield cluster


def new_session() -> Session:
    return Session(uuid4(), "test", "ws://localhost/ws", 5)


def batch(session: Session, number: int, *, before: int | None = None, size: int = 100) -> Batch:
    return Batch(session, number, b"r" * size, 1, messages_before=number - 1 if before is None else before)


async def read_all(reader: StreamReader, count: int) -> list[Received]:
    """Read so many messages."""
    found: list[Received] = []
    async with asyncio.timeout(HANG_SECONDS):
        while len(found) < count:
            found += await reader.read(0.5)
    return found


async def test_batches_are_read_as_published(cluster: Cluster) -> None:
    """Batches come out in order, equal to what was published, large ones too."""
    settings = buffer_settings(cluster)
    async with linked(settings) as link:
        outlet, reader = Outlet(link, "ingestor"), StreamReader(link, "ingestor", SystemClock())
        session = new_session()
        outlet.expect(session.id, 0)
        batches = [batch(session, 1), batch(session, 2, size=3 * 2**20), batch(session, 3)]
        for each in batches:
            await outlet.publish([each])
        found = await read_all(reader, 3)
        assert [each.batches for each in found] == [(each,) for each in batches]
        assert (await outlet.last_message(session.id)).batch == 3
        assert (await reader.state()).last == reader.position > 3


async def test_a_message_out_of_order_is_refused(cluster: Cluster) -> None:
    """A message that does not follow the session's last one is refused; a repeated one is not stored again."""
    settings = buffer_settings(cluster)
    async with linked(settings) as link:
        outlet = Outlet(link, "ingestor")
        session = new_session()
        outlet.expect(session.id, 0)
        first = await outlet.publish([batch(session, 1)])
        outlet.expect(session.id, 0)
        with contextlib.suppress(SequenceError):  # servers without a cluster look at the order first
            assert await outlet.publish([batch(session, 1)]) == first
        outlet.expect(session.id, first + 7)
        with pytest.raises(SequenceError):
            await outlet.publish([batch(session, 2)])
        last = await outlet.last_message(session.id)
        assert (last.batch, last.sequence) == (1, first)
        async with connected(cluster) as client:
            assert (await api(client, "STREAM.INFO.ingestor"))["state"]["messages"] == 1


async def test_check_names_the_risks(tmp_path: Path) -> None:
    """`ingestor check` names too few copies, disks that are synced late, and settings that endanger batches."""
    async with running_cluster(tmp_path / "nats", sync="sync_interval: 2m") as cluster:
        settings = buffer_settings(cluster)

        async def results() -> dict[str, tuple[Severity, str]]:
            port = cluster.servers[0].http_port
            return {
                each.check: (each.severity, each.text) async for each in check_buffer(settings, monitoring_port=port)
            }

        assert "has no stream ingestor yet" in (await results())["buffer"][1]
        assert (await prepare(settings)).created
        assert not (await prepare(settings)).created
        found = await results()
        assert found["buffer"][0] is Severity.OK
        assert found["replicas"][0] is found["sync"][0] is Severity.WARNING
        async with connected(cluster) as client:
            config = wanted(settings) | {"max_age": 600_000_000_000}
            await api(client, "STREAM.UPDATE.ingestor", config)
        severity, text = (await results())["buffer"]
        assert severity is Severity.WARNING
        assert "max_age is 600000000000 instead of 0" in text
        assert (await prepare(settings)).differences


async def test_disks_that_are_synced_always(cluster: Cluster) -> None:
    """A server with `sync_interval: always` passes; one without monitoring is unknown."""
    settings = buffer_settings(cluster)
    facts = await survey(settings, monitoring_port=cluster.servers[0].http_port)
    assert facts.sync_always == {"127.0.0.1": True}
    assert (await survey(settings, monitoring_port=free_ports(1)[0])).sync_always == {"127.0.0.1": None}


async def test_too_many_copies_need_an_operator(cluster: Cluster) -> None:
    """Copies on more servers than there are end with one line that names the setting."""
    with pytest.raises(ConfigurationError, match="INGESTOR_BUFFER_REPLICAS: the NATS servers cannot keep 3 copies"):
        await prepare(buffer_settings(cluster, buffer_replicas=3))


async def test_the_login(tmp_path: Path) -> None:
    """USER:PASSWORD, a token and an NKey log in; a wrong one ends with 78 and without the secret; so does none."""
    user, password = "recorder", "s3cret-of-nats"
    extra = f'authorization {{ user: {user}, password: "{password}" }}'
    async with running_cluster(tmp_path / "nats", extra=extra) as cluster:
        file = tmp_path / "login"
        file.write_text(f"{user}:{password}\n", encoding="utf-8")
        assert (await prepare(buffer_settings(cluster, buffer_credentials_file=file))).created
        file.write_text(f"{user}:wrong-{password}", encoding="utf-8")
        with pytest.raises(ConfigurationError, match="refuses the login") as refused:
            await prepare(buffer_settings(cluster, buffer_credentials_file=file))
        assert refused.value.exit_code == 78
        assert password not in redact(str(refused.value))
        with pytest.raises(ConfigurationError, match="refuses the login"):
            await prepare(buffer_settings(cluster))
    pair = nkeys.from_seed(SEED.encode())
    extra = f"authorization {{ users: [ {{ nkey: {pair.public_key.decode()} }} ] }}"
    async with running_cluster(tmp_path / "nkey", extra=extra) as cluster:
        file.write_text(SEED, encoding="utf-8")
        assert (await prepare(buffer_settings(cluster, buffer_credentials_file=file))).created
    assert SEED not in redact(f"the seed is {SEED}")


def test_a_password_needs_tls(tmp_path: Path) -> None:
    """A password never travels unencrypted to another machine."""
    file = tmp_path / "login"
    file.write_text("user:secret-password", encoding="utf-8")
    settings = load_settings(buffer_url="nats://nats.example.org", buffer_credentials_file=file)
    with pytest.raises(ConfigurationError, match="would travel unencrypted"):
        login_options(settings, "nats", "nats.example.org")
    assert login_options(settings, "tls", "nats.example.org") == {"user": "user", "password": "secret-password"}


async def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tls:// the server's certificate is verified, against SSL_CERT_FILE too."""
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    key, chain = tmp_path / "key.pem", tmp_path / "cert.pem"
    certificate.private_key_pem.write_to_path(key)
    for each in certificate.cert_chain_pems:
        each.write_to_path(chain, append=True)
    extra = f'tls {{ cert_file: "{chain}", key_file: "{key}" }}'
    async with running_cluster(tmp_path / "nats", extra=extra) as cluster:
        settings = buffer_settings(cluster, buffer_url=cluster.url.replace("nats://", "tls://"))
        with pytest.raises(BufferUnavailableError, match="certificate"):
            await prepare(settings)
        authority.cert_pem.write_to_path(tmp_path / "ca.pem")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        assert (await prepare(settings)).created


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nats://user:password@host", "must not contain a user or a password"),
        ("http://host", "not a list of NATS servers"),
        ("nats://a,tls://b", "mixes"),
        ("nats://a/path", "no path"),
        ("nats://a:0", "not a list of NATS servers"),
        ("nats://a, ,nats://b", "not a list of NATS servers"),
    ],
)
def test_wrong_addresses(url: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong address is refused with its setting and the reason."""
    monkeypatch.setenv("INGESTOR_BUFFER_URL", url)
    with pytest.raises(ConfigurationError, match=f"INGESTOR_BUFFER_URL: .*{words}"):
        load_settings()


def test_several_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several servers are separated by commas."""
    monkeypatch.setenv("INGESTOR_BUFFER_URL", "tls://a:4222, tls://b , tls://[::1]:4222/")
    assert load_settings().buffer_url == "tls://a:4222,tls://b,tls://[::1]:4222"
