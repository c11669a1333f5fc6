"""Every connection of the daemon and the commands works with a name that has several addresses, some of them dead."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
import trustme
from websockets.exceptions import InvalidProxyStatus

from ingestor import dial
from ingestor.backfill.client import RestClient
from ingestor.errors import ConfigurationError, DatabaseAccessError, StoreError
from ingestor.service.checks import check
from ingestor.service.daemon import Daemon
from ingestor.service.process import StopRequest
from ingestor.simulator.server import TOKEN, Simulator
from ingestor.store.connect import connect
from ingestor.stream.connection import open_connection
from ingestor.stream.retry import RetryPolicy, classify
from tests.addresses import free_port, resolve, swallowing
from tests.clocks import HANG_SECONDS, ManualClock
from tests.integration.test_connect import SSL_REQUEST
from tests.proxy import pump
from tests.recording import Market, running, settings, stored
from tests.servers import TestServer, with_parts

DEAD, LIVE, OTHER = "127.0.0.2", "127.0.0.3", "127.0.0.4"


@contextlib.asynccontextmanager
async def relay(
    url: str, context: ssl.SSLContext | None = None, host: str = LIVE, dead: str = DEAD
) -> AsyncIterator[int]:
    """Forward another address of this machine to a server and yield its port; with `context`, offer TLS."""
    target = urlsplit(url)
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if context is not None:
            assert await reader.readexactly(8) == SSL_REQUEST
            writer.write(b"S")
            with contextlib.suppress(OSError):
                await writer.start_tls(context)
        far_reader, far_writer = await asyncio.open_connection(target.hostname, target.port)
        tasks.update((asyncio.create_task(pump(far_reader, writer)), asyncio.create_task(pump(reader, far_writer))))

    reader = await asyncio.start_server(serve, host, free_port(host, dead))
    yield reader.sockets[0].getsockname()[1]
    reader.close()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def named(url: str, name: str, port: int, query: str = "") -> str:
    """Replace the host and the port of a database URL and keep the password."""
    parts = urlsplit(url)
    return f"postgresql://{parts.netloc.rpartition('@')[0]}@{name}:{port}{parts.path}{query}"


async def test_the_daemon_and_the_checks(writer_url: str, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stream and database are reached by the second address if the first swallows all packets."""
    async with Simulator(port=0, rate=0) as simulator, relay(simulator.stream_url) as feed, relay(writer_url) as port:
        resolve(monkeypatch, {"localhost": [DEAD, LIVE], "db.test": [DEAD, LIVE]})
        with swallowing(DEAD, feed), swallowing(DEAD, port):
            changes = {"stream_url": f"ws://localhost:{feed}/ws"}
            configuration = settings(simulator, named(writer_url, "db.test", port), **changes)
            async with running(configuration):
                await simulator.wait_connected()
                market = Market(simulator)
                market.trade()
                await stored(database, market)
            found = {each.check: each async for each in check(configuration)}
            assert "answers as a WebSocket" in found["endpoint"].text
            assert "PostgreSQL" in found["database"].text


async def test_the_rest_api(monkeypatch: pytest.MonkeyPatch) -> None:
    """The REST client reaches the second address if the first swallows all packets."""
    async with Simulator(port=0, rate=0) as simulator, relay(simulator.rest_url) as port:
        resolve(monkeypatch, {"localhost": [DEAD, LIVE]})
        with swallowing(DEAD, port):
            base = f"http://localhost:{port}{urlsplit(simulator.rest_url).path}"
            async with RestClient(base, TOKEN, timezone="UTC", clock=ManualClock()) as client:
                since = datetime(2026, 11, 19, tzinfo=UTC)
                await client.instruments()
                await client.minutes("AIR.NZ", since, since + timedelta(minutes=5), "start")


async def test_a_certificate_is_checked_for_the_name(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`verify-full` checks the certificate against the name, whichever address answers; so does the password file."""
    authority, other = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    other.cert_pem.write_to_path(str(tmp_path / "other.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("db.test").configure_cert(context)
    names = {"db.test": [DEAD, LIVE], "wrong.test": [DEAD, LIVE]}
    resolve(monkeypatch, names)
    async with relay(database, context) as port:
        query = f"?sslmode=verify-full&sslrootcert={tmp_path}"
        with swallowing(DEAD, port):
            await (await connect(named(database, "db.test", port, f"{query}/ca.pem"))).close()
            for name, file in (("wrong.test", "ca.pem"), ("db.test", "other.pem")):
                with pytest.raises(DatabaseAccessError, match="certificate"):
                    await connect(named(database, name, port, f"{query}/{file}&connect_timeout=4"))
        hostaddr = f"{query}/ca.pem&hostaddr={LIVE}"
        names["db.test"] = [DEAD]
        await (await connect(named(database, "db.test", port, hostaddr))).close()


async def test_a_password_file_knows_the_name(
    server: TestServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The password is looked up by name, addresses are resolved per connection, and connection limits hold."""
    role = server.new_name()
    await server.run(f"CREATE ROLE {role} LOGIN PASSWORD 'a:b'")
    file = tmp_path / "passwords"
    names = {"db.test": [DEAD, LIVE, OTHER]}
    resolve(monkeypatch, names)
    try:
        async with relay(server.url) as port:
            file.write_text(f"{LIVE}:*:*:*:wrong\ndb.test:{port}:postgres:{role}:a\\:b\n")
            file.chmod(0o600)
            query = f"?passfile={quote(str(file))}&connect_timeout=5&options=-c%20geqo%3Doff&load_balance_hosts=random"
            url = f"postgresql://{role}@db.test:{port}/postgres{query}&channel_binding=prefer&client_encoding=auto"
            with swallowing(DEAD, port):
                connection = await connect(url)
                assert await connection.fetchval("SHOW geqo") == "off"
                await connection.close()
            names["db.test"] = [OTHER, LIVE]
            await (await connect(url)).close()
    finally:
        await server.run(f"DROP ROLE {role}")


async def test_addresses_that_swallow_packets(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that accepts and stays silent does not keep the next one from being tried, for stream and database."""
    never = asyncio.Event()

    async def hang(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            await never.wait()

    resolve(monkeypatch, {"localhost": [OTHER, LIVE]})
    async with Simulator(port=0, rate=0) as simulator, relay(database) as port, relay(simulator.stream_url) as feed:
        silent = [await asyncio.start_server(hang, OTHER, each) for each in (port, feed)]
        await (await connect(named(database, "localhost", port))).close()
        async with open_connection(f"ws://localhost:{feed}/ws"):
            pass
        never.set()
        for each in silent:
            each.close()


@pytest.mark.parametrize(("dead", "live"), [("::1", "127.0.0.1"), ("127.0.0.1", "::1")])
async def test_two_families(dead: str, live: str, writer_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the addresses of one family swallow packets, stream and database are reached by the other."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    resolve(monkeypatch, {"localhost": [dead, live], "db.test": [dead, live]})
    async with (
        Simulator(port=0, rate=0) as simulator,
        relay(simulator.stream_url.replace("localhost", "127.0.0.1"), host=live, dead=dead) as feed,
        relay(writer_url, host=live, dead=dead) as port,
    ):
        with swallowing(dead, feed), swallowing(dead, port):
            await (await connect(named(writer_url, "db.test", port))).close()
            async with open_connection(f"ws://localhost:{feed}/ws"):
                pass


@pytest.mark.parametrize("fault", ["silent", "closes"])
async def test_a_rest_address_that_does_not_answer(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an address that accepts and does not answer, the next one is asked, with the name and its certificate."""
    hosts: list[str] = []
    faults = 0

    async def fails(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal faults
        faults += 1
        with contextlib.closing(writer):
            while fault == "silent" and await reader.read(1000):
                pass

    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            hosts.extend(line for line in head.split("\r\n") if line.lower().startswith("host:"))
            writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n{"data": []}')
            await writer.drain()

    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("rest.test").configure_cert(context)
    resolve(monkeypatch, {"rest.test": [OTHER, LIVE]})
    live = await asyncio.start_server(answers, LIVE, 0, ssl=context)
    port = live.sockets[0].getsockname()[1]
    dead = await asyncio.start_server(fails, OTHER, port)
    url = f"https://rest.test:{port}"
    async with RestClient(url, TOKEN, timezone="UTC", clock=ManualClock(), timeout=1) as client:
        for _ in range(3):
            assert (await client.instruments()).listed == ()
    assert faults == 1
    assert hosts == [f"Host: rest.test:{port}"] * 3
    live.close()
    dead.close()


async def test_a_proxy_with_a_dead_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy's addresses are tried in turn, and the proxy receives the server's name."""
    asked: list[bytes] = []

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            asked.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
            await writer.drain()

    resolve(monkeypatch, {"proxy.test": [DEAD, LIVE]})
    server = await asyncio.start_server(proxy, LIVE, 0)
    port = server.sockets[0].getsockname()[1]
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:secret@proxy.test:{port}")
    with swallowing(DEAD, port), pytest.raises(InvalidProxyStatus):
        async with open_connection("wss://stream.test/ws"):
            pass
    server.close()
    assert asked[0].startswith(b"CONNECT stream.test:443 ")
    assert b"Proxy-Authorization: Basic" in asked[0]


async def test_every_address_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names each address with its failure, and the stream is retried."""
    resolve(monkeypatch, {"localhost": [LIVE, OTHER]})
    with pytest.raises(StoreError) as caught:
        await connect("postgresql://u:hunter2@localhost:1/d")
    assert f"{LIVE} Connection refused; {OTHER} Connection refused" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(Exception, match="none of the 2 addresses") as stream:
        async with open_connection("ws://localhost:1/ws"):
            pass
    decision = classify(stream.value, accepted_before=False, now=0)
    assert decision.policy is RetryPolicy.BACKOFF
    assert f"{LIVE} Connection refused; {OTHER} Connection refused" in decision.message


async def test_losing_connections_are_closed() -> None:
    """If two attempts succeed at once, one connection is used and the other is closed."""
    begun: list[str] = []
    dropped: list[str] = []
    together = asyncio.Event()

    async def attempt(address: str) -> str:
        begun.append(address)
        if len(begun) == 2:
            together.set()
        await together.wait()
        return address

    async def discard(address: str) -> None:
        dropped.append(address)

    assert await dial.first_that_works(["a", "b", "c"], attempt, discard=discard, stagger=0) == "a"
    assert begun[:2] == ["a", "b"]
    assert "b" in dropped


@pytest.mark.parametrize("case", ["password", "database", "role", "setting", "parameter", "service"])
async def test_operator_errors(server: TestServer, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A permanent refusal ends a daemon that was never accepted with 78; an accepted daemon keeps what it received."""
    role = server.new_name()
    await server.run(f"CREATE ROLE {role} LOGIN PASSWORD 'right'")
    url = with_parts(server.url, database="postgres", user=role, password="right")
    joint = "&" if "?" in url else "?"
    url, state = {
        "password": (with_parts(server.url, database="postgres", user=role, password="wrong"), "28P01"),
        "database": (with_parts(server.url, database="no_such", user=role, password="right"), "3D000"),
        "role": (with_parts(server.url, database="postgres", user="no_such", password="right"), "28"),
        "setting": (f"{url}{joint}options=-c%20no_such%3D1", "42704"),
        "parameter": (f"{url}{joint}channel_binding=require", "remove channel_binding"),
        "service": (f"{url}{joint}service=none", "service"),
    }[case]
    try:
        if case == "password" and server.edition != "plain":
            pytest.skip("a server named by a URL may not require a password")
        with pytest.raises(DatabaseAccessError) as caught:
            await connect(url)
        assert caught.value.exit_code == 78
        assert state in f"{caught.value} {caught.value.sqlstate}"
        async with Simulator(port=0, rate=0) as simulator:
            daemon = Daemon(settings(simulator, url))
            with pytest.raises((DatabaseAccessError, ConfigurationError)) as ended:
                await asyncio.wait_for(daemon.run(StopRequest()), HANG_SECONDS)
            assert ended.value.exit_code == 78
            assert not daemon.buffer.in_memory
    finally:
        await server.run(f"DROP ROLE {role}")


async def test_a_login_that_is_refused_later(writer_url: str, server: TestServer, database: str) -> None:
    """A daemon that was accepted before retries with an error in the log, and continues once the login is fixed."""
    role = server.new_name()
    await server.run(f"CREATE ROLE {role} LOGIN PASSWORD 'right' IN ROLE market_write")
    name = urlsplit(database).path[1:]
    url = with_parts(writer_url, database=name, user=role, password="right")
    try:
        async with Simulator(port=0, rate=0) as simulator, running(settings(simulator, url)) as daemon:
            await simulator.wait_connected()
            market = Market(simulator)
            market.trade()
            await stored(database, market)
            await server.run(f"ALTER ROLE {role} NOLOGIN")
            await server.run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{role}'")
            market.trade()
            async with asyncio.timeout(HANG_SECONDS):
                while not any(role in each.detail for each in daemon.telemetry.readiness.problems):
                    await asyncio.sleep(0.02)
            await server.run(f"ALTER ROLE {role} LOGIN")
            await stored(database, market)
    finally:
        await server.run(f"DROP ROLE {role}")
