from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
import trustme
from sqlalchemy import text

from ingestor.admin.engine import create_engine
from ingestor.embedded import EmbeddedServer
from ingestor.errors import StoreError
from ingestor.store.connect import connect
from tests.proxy import pump
from tests.servers import TestServer, with_parts

SSL_REQUEST = struct.pack("!ii", 8, 80877103)
PASSWORD = "p@ss/w:rd%é ?#&=+"


async def works(url: str) -> None:
    """Connect by both drivers with the same URL."""
    connection = await connect(url)
    assert await connection.fetchval("SELECT 1") == 1
    await connection.close()
    engine = create_engine(url)
    async with engine.connect() as alchemy:
        assert (await alchemy.execute(text("SELECT 1"))).scalar() == 1
    await engine.dispose()


async def fails(url: str) -> list[StoreError]:
    """Fail by both drivers, and return the error of each."""
    with pytest.raises(StoreError) as direct:
        await connect(url, timeout=5)
    engine = create_engine(url)
    with pytest.raises(StoreError) as alchemy:
        async with engine.connect():
            pass
    await engine.dispose()
    return [direct.value, alchemy.value]


def everything(error: BaseException | None) -> str:
    """Return the whole text of an error and of its causes."""
    if error is None:
        return ""
    shown = f"{error} {error!r} {error.args!r} {vars(error)!r}"
    return shown + everything(error.__cause__) + everything(error.__context__)


@contextlib.asynccontextmanager
async def tls_proxy(url: str, context: ssl.SSLContext) -> AsyncIterator[int]:
    """Put a TLS server of PostgreSQL's protocol in front of any server, and yield its port."""
    target = urlsplit(url)
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.readexactly(8) != SSL_REQUEST:
            writer.close()
            return
        writer.write(b"S")
        await writer.drain()
        try:
            await writer.start_tls(context)
        except (OSError, ssl.SSLError):
            return
        server_reader, server_writer = await asyncio.open_connection(target.hostname, target.port or 5432)
        tasks.add(asyncio.create_task(pump(server_reader, writer)))
        await pump(reader, server_writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def at_port(url: str, port: int, query: str, host: str = "127.0.0.1") -> str:
    parts = urlsplit(url)
    userinfo = parts.netloc.rpartition("@")[0]
    return f"postgresql://{userinfo}@{host}:{port}{parts.path}?{query}"


async def test_schemes(database: str) -> None:
    """The three schemes of a URL are equivalent."""
    for scheme in ("postgres", "postgresql", "postgresql+asyncpg"):
        await works(database.replace("postgresql", scheme, 1))


@pytest.mark.parametrize("mode", ["disable", "allow", "prefer"])
async def test_sslmode_without_tls(database: str, mode: str) -> None:
    """Modes without required encryption work with a server that has none."""
    await works(f"{database}{'&' if '?' in database else '?'}sslmode={mode}")


async def test_sslmode_require_without_tls() -> None:
    """`require` and `verify-full` never continue unencrypted."""
    with EmbeddedServer() as server:
        await works(server.url())
        for mode in ("require", "verify-full&sslrootcert=/dev/null"):
            await fails(f"{server.url()}?sslmode={mode}")


async def test_sslmode_with_tls(database: str, tmp_path: Path) -> None:
    """`prefer` and `require` encrypt; `verify-full` checks the authority and the name of the certificate."""
    authority, other = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    other.cert_pem.write_to_path(str(tmp_path / "other.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    async with tls_proxy(database, context) as port:
        await works(at_port(database, port, "sslmode=prefer"))
        await works(at_port(database, port, "sslmode=require"))
        await fails(at_port(database, port, "sslmode=disable"))
        full = f"sslmode=verify-full&sslrootcert={tmp_path}"
        await works(at_port(database, port, f"{full}/ca.pem", host="localhost"))
        for query, host in ((f"{full}/other.pem", "localhost"), (f"{full}/ca.pem", "127.0.0.1")):
            for error in await fails(at_port(database, port, query, host)):
                assert "certificate" in str(error).lower()


async def test_session_settings_of_the_administrator(database: str, server: TestServer) -> None:
    """Both drivers override the database's settings that our SQL depends on."""
    name = database.rpartition("/")[2]
    expected = {
        "transaction_isolation": "read committed",
        "standard_conforming_strings": "on",
        "TimeZone": "UTC",
    }
    await server.run(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
    await server.run(f"ALTER DATABASE {name} SET standard_conforming_strings = off")
    await server.run(f"ALTER DATABASE {name} SET timezone = 'Asia/Kathmandu'")
    settings = ", ".join(f"current_setting('{each}')" for each in expected)
    connection = await connect(database)
    (row,) = await connection.fetch(f"SELECT {settings}")
    assert tuple(row) == tuple(expected.values())
    await connection.close()
    engine = create_engine(database)
    async with engine.begin() as alchemy:
        assert tuple((await alchemy.execute(text(f"SELECT {settings}"))).one()) == tuple(expected.values())
    await engine.dispose()


async def test_several_hosts(database: str) -> None:
    """The first host that answers is used."""
    parts = urlsplit(database)
    userinfo, _, host = parts.netloc.rpartition("@")
    await works(f"postgresql://{userinfo}@127.0.0.1:1,{host}{parts.path}")


async def test_a_host_that_hangs_or_refuses_is_left_for_the_next(database: str) -> None:
    """A host that never answers, or refuses the user, does not keep the next one from being tried."""
    parts = urlsplit(database)
    userinfo, _, host = parts.netloc.rpartition("@")
    never = asyncio.Event()

    async def hang(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            await never.wait()

    with EmbeddedServer() as refusing:
        reader = await asyncio.start_server(hang, "127.0.0.1", 0)
        hanging = f"127.0.0.1:{reader.sockets[0].getsockname()[1]}"
        hosts = f"{hanging},127.0.0.1:{refusing.port},{host}"
        connection = await connect(f"postgresql://{userinfo}@{hosts}{parts.path}", timeout=2)
        assert await connection.fetchval("SELECT current_database()") == parts.path.strip("/")
        await connection.close()
        with pytest.raises(StoreError, match="refused the connection"):  # the first error says more
            await connect(
                f"postgresql://stranger:known@127.0.0.1:{refusing.port},{hanging}/postgres",
                timeout=2,
                read_write=True,
            )
        never.set()
        reader.close()


async def test_the_writable_host_is_chosen() -> None:
    """The writable host is found at any position; if there is none, the error says so."""
    with EmbeddedServer(settings={"default_transaction_read_only": "on"}) as one, EmbeddedServer() as two:
        for server in (one, two):
            admin = await connect(server.url())
            await admin.execute("SET default_transaction_read_only = off")
            await admin.execute("CREATE ROLE same LOGIN PASSWORD 'same'")
            await admin.close()
        for hosts in (f"127.0.0.1:{one.port},127.0.0.1:{two.port}", f"127.0.0.1:{two.port},127.0.0.1:{one.port}"):
            connection = await connect(f"postgresql://same:same@{hosts}/postgres", read_write=True)
            assert await connection.fetchval("SHOW port") == str(two.port)
            await connection.close()
        with pytest.raises(StoreError, match="only a standby, or a read-only server") as caught:
            await connect(f"postgresql://same:same@127.0.0.1:{one.port}/postgres", read_write=True)
        assert caught.value.sqlstate == "25006"
        assert "Name the primary" in caught.value.hint


async def test_socket_and_percent_encoded_password() -> None:
    """A Unix socket works with a percent-encoded password of every special character."""
    with EmbeddedServer() as server:
        admin = await connect(server.url())
        await admin.execute(f"CREATE ROLE awkward LOGIN PASSWORD '{PASSWORD}'")
        await admin.close()
        password = quote(PASSWORD, safe="")
        await works(f"postgresql://awkward:{password}@127.0.0.1:{server.port}/postgres")
        await works(f"postgresql://awkward:{password}@/postgres?host={server.directory}&port={server.port}")


async def test_errors_hold_no_password(server: TestServer) -> None:
    """A refused, a missing and an unreachable database are reported with a remedy and without the password."""
    name = server.new_name()
    await server.run(f"CREATE ROLE {name} LOGIN PASSWORD 'right'")
    try:
        for url in (
            with_parts(server.url, database="postgres", user="stranger", password="hunter2"),
            with_parts(server.url, database="no_such_database", user=name, password="hunter2"),
            "postgresql://someone:hunter2@127.0.0.1:1/x",
            "postgresql://someone:hunter2[@127.0.0.1:1/x",
            "postgresql://someone:hunt/er2@127.0.0.1:1/x",
            "postgresql://someone@127.0.0.1:1/x?password=hunter2",
        ):
            for error in await fails(url):
                assert "hunter2" not in everything(error)
                assert "hunt/er2" not in everything(error)
    finally:
        await server.run(f"DROP ROLE {name}")


async def test_errors_name_the_remedy() -> None:
    """A wrong password and a missing database are reported with SQLSTATE and hint, a dead host with its address."""
    with EmbeddedServer() as server:
        wrong = f"postgresql://postgres:{quote(PASSWORD, safe='')}@127.0.0.1:{server.port}"
        for url, sqlstate, words in (
            (f"{wrong}/postgres", "28P01", "check the user, the password"),
            (server.url("missing"), "3D000", "create it, then run `ingestor migrate`"),
        ):
            for error in await fails(url):
                assert error.sqlstate == sqlstate
                assert words in error.hint
                assert error.hint in str(error)
                assert PASSWORD not in everything(error)
                assert quote(PASSWORD, safe="") not in everything(error)
        port, dead = server.port, f"{wrong}/postgres"
    for error in await fails(dead):
        assert f"127.0.0.1:{port}" in str(error)
        assert "that the server runs" in error.hint
        assert PASSWORD not in everything(error)
        assert quote(PASSWORD, safe="") not in everything(error)


@pytest.mark.parametrize("rest", ["127.0.0.1:1/x?sslmode=bogus", "127.0.0.1:99999/x", "[127.0.0.1:1/x"])
async def test_a_url_that_cannot_be_used(rest: str) -> None:
    """A wrong option, an impossible port and a malformed address differ from an unavailable server."""
    for error in await fails(f"postgresql://someone:hunter2@{rest}"):
        assert "cannot be used" in error.message
        assert "postgresql://USER" in error.hint
        assert "hunter2" not in everything(error)


@pytest.mark.parametrize("password", ["hunt/er2", "hunt#er2", "hunt?er2"])
async def test_errors_hold_no_part_of_a_password(password: str) -> None:
    """No part of a password that was not percent-encoded is shown."""
    for error in await fails(f"postgresql://someone:{password}@127.0.0.1:1/x"):
        assert "hunt" not in everything(error)
        assert "er2" not in everything(error)
