"""No outsider makes a secret visible: a server that repeats the token, a proxy, an unreachable database."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import html
import json
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
import structlog
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import WebSocketException

from ingestor.address import parse_database_address
from ingestor.errors import ConfigurationError
from ingestor.service.daemon import Daemon
from ingestor.settings import load_settings
from ingestor.simulator.server import TOKEN
from ingestor.store.connect import connect
from ingestor.stream.connection import open_connection
from ingestor.stream.retry import classify
from ingestor.telemetry.log import configure
from tests.clocks import HANG_SECONDS
from tests.commands import environment_with, ingestor, ingestor_in_process, start
from tests.recording import running
from tests.servers import TestServer, query, with_parts
from tests.sessions import BEGINS, ENDS, MINUTE, at, record_session

AZURE = "postgresql://user@server:Unmistakable-Qz9@127.0.0.1:1/db"
HOSTILE = "Qz1@Qz2:Qz3 %Qz4'Qz5\"Qz6\\Qz7üQz8"

Talk = Callable[[ServerConnection, str], Awaitable[None]]


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    yield
    structlog.reset_defaults()


async def test_the_password_of_an_azure_url(tmp_path: Path) -> None:
    """Real processes name the unreachable address without its password, in every output."""
    settings = {
        "DATABASE_URL": AZURE,
        "TOKEN": TOKEN,
        "STREAM_URL": "ws://127.0.0.1:1/ws",
        "LOG_LEVEL": "debug",
        "SPOOL_DIR": str(tmp_path / "spool"),
    }
    process = await start("run", **settings)
    assert process.stderr is not None
    log = ""
    while not ("http_listening" in log and "database_write_failed" in log):
        log += (await asyncio.wait_for(process.stderr.readline(), HANG_SECONDS)).decode()
    (url,) = {event["url"] for event in map(json.loads, log.splitlines()) if event["event"] == "http_listening"}
    pages = "".join([text async for text in all_pages(url)])
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    output, errors = await asyncio.wait_for(process.communicate(), HANG_SECONDS)
    _, *checked = await ingestor("check", **settings)
    migrated = await asyncio.to_thread(ingestor_in_process, "migrate", INGESTOR_DATABASE_URL=AZURE)
    missing = await asyncio.to_thread(ingestor_in_process, "gaps", INGESTOR_DATABASE_URL=AZURE)
    for text in (log, pages, str(checked), str(migrated), str(missing)):
        assert "user@server:[hidden]@127.0.0.1:1/db" in text
        assert "Qz9" not in text
        assert "Unmistakable" not in text
    assert "Qz9" not in output.decode() + errors.decode()


async def all_pages(url: str) -> AsyncIterator[str]:
    """Yield the answer of each route, and the first event of the endless one."""
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
        for path in ("/", "/healthz", "/readyz", "/metrics", "/status"):
            yield (await client.get(path)).text
        async with client.stream("GET", "/events") as events:
            async for line in events.aiter_lines():
                yield line
                if line.startswith("data:"):
                    break


@pytest.mark.parametrize("encoded", [False, True])
async def test_a_user_and_a_password_with_special_characters(server: TestServer, encoded: bool) -> None:
    """An address in Azure's form works, percent-encoded or not, and so does a second host."""
    name = f"{server.new_name()}@server"
    literal = HOSTILE.replace("'", "''")
    await server.run(f"CREATE ROLE \"{name}\" LOGIN PASSWORD '{literal}'")
    try:
        url = parse_database_address(with_parts(server.url, database="postgres"))
        (host,) = url.hosts
        user, password = (
            (quote(each, safe="") for each in (name, HOSTILE)) if encoded else (name, HOSTILE.replace("%", "%25"))
        )
        for hosts in (f"{host[0]}:{host[1]}", f"127.0.0.1:1,{host[0]}:{host[1]}"):
            connection = await connect(f"postgresql://{user}:{password}@{hosts}/postgres")
            assert await connection.fetchval("SELECT current_user") == name
            await connection.close()
    finally:
        await server.run(f'DROP ROLE "{name}"')


@contextlib.asynccontextmanager
async def repeating(talk: Talk) -> AsyncIterator[str]:
    """Run a stream that does `talk` with the token, and yield its URL."""

    async def handle(connection: ServerConnection) -> None:
        token = json.loads(await connection.recv())["data"]["token"]
        await talk(connection, token)

    async with serve(handle, "127.0.0.1", 0) as reader:
        yield f"ws://127.0.0.1:{reader.sockets[0].getsockname()[1]}/ws"


def error(text: str) -> str:
    return json.dumps({"type": "error", "data": {"message": text}})


async def says(connection: ServerConnection, token: str) -> None:
    """Refuse with the token in the text, in several forms."""
    forms = (token, quote(token, safe=""), repr(token), json.dumps(token), html.escape(token))
    await connection.send(error(f"not now, \x1b[31m{' '.join(forms)}\u202e"))


async def says_at_the_edge(connection: ServerConnection, token: str) -> None:
    """Refuse with a text in which the token lies where it would be cut."""
    await connection.send(error("x" * (200 - len(token) + 3) + token + "y"))


async def closes(connection: ServerConnection, token: str) -> None:
    """Close with the token as the reason."""
    await connection.close(4000, f"bad {token}")


async def trades(connection: ServerConnection, token: str) -> None:
    """Accept, and then trade in a symbol that is the token."""
    await connection.send(json.dumps({"type": "authenticated"}))
    data = {"date": "2026-03-02T10:00:00", "price": 0.5, "volume": 100, "symbol": token}
    await connection.send(json.dumps({"type": "price", "data": data}))
    await connection.wait_closed()


@pytest.mark.parametrize("form", ["json", "console"])
@pytest.mark.parametrize("talk", [says, says_at_the_edge, closes, trades])
async def test_a_server_that_repeats_the_token(
    writer_url: str, database: str, talk: Talk, form: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither the page nor the log nor the session's records hold the token or a part of it."""
    token = "tk_Qz1\"Qz2'Qz3\\Qz4<&>%Qz5"
    configure("debug", "json" if form == "json" else "console")
    async with repeating(talk) as stream:
        settings = load_settings(
            token=token,
            stream_url=stream,
            database_url=writer_url,
            exchange_calendar="always",
            reconnect_max_delay="50ms",
            heartbeat="50ms",
        )
        async with running(settings) as daemon:
            await wait_for_end_or_commit(daemon, database)
            pages = "".join([text async for text in all_pages(daemon.http.url)])
            line = daemon.status.line()
    log = "".join(capfd.readouterr())
    assert "session_ended" in log
    for shown in (pages, log, line, str(await query(database, "SELECT s::text FROM ingest.stream_sessions s"))):
        assert "qz" not in shown.lower()
        assert "\u202e" not in shown
        assert "\x1b[31mtk" not in shown


async def wait_for_end_or_commit(daemon: Daemon, database: str) -> None:
    """Wait until a session has ended, or a tick was committed."""
    async with asyncio.timeout(HANG_SECONDS):
        while not daemon.http.is_bound or not (
            daemon.telemetry.counts.ends or await query(database, "SELECT 1 FROM market.ticks")
        ):
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def proxy(answer: bytes) -> AsyncIterator[tuple[int, list[bytes]]]:
    """Run a proxy that gives each request this answer; yield its port and the requests."""
    asked: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            asked.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(answer)
            await writer.drain()

    reader = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield reader.sockets[0].getsockname()[1], asked
    finally:
        reader.close()


ANSWERS = {
    "refuses": b"HTTP/1.1 407 %s\r\ncontent-length: 0\r\n\r\n",
    "talks nonsense": b"%s\r\n\r\n",
    "closes": b"",
    "goes on": b"HTTP/1.1 200 OK\r\n\r\n%s",
}


@pytest.mark.parametrize("kind", ["wss_proxy", "HTTPS_PROXY", "https_proxy"])
@pytest.mark.parametrize("answer", ANSWERS)
async def test_the_password_of_a_proxy(answer: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy gets user and password decoded; no error shows them, whatever it answers."""
    password = "Qz1@Qz2/Qz3:Qz4 Qz5?#Qz6"
    said = password.encode() + b" Basic " + base64.b64encode(b"user@corp:" + password.encode())
    async with proxy(ANSWERS[answer].replace(b"%s", said)) as (port, asked):
        monkeypatch.setenv(kind, f"http://user@corp:{password}@127.0.0.1:{port}")
        monkeypatch.setenv("no_proxy", "")
        load_settings()
        with pytest.raises((WebSocketException, OSError)) as caught:
            async with open_connection("wss://stream.invalid/ws"):
                pass
    (header,) = re.findall(rb"Proxy-Authorization: Basic (\S+)", asked[0])
    assert base64.b64decode(header).decode() == f"user@corp:{password}"
    shown = classify(caught.value, accepted_before=False, now=0).message
    assert "qz" not in shown.lower()
    assert header.decode()[-8:] not in shown


@pytest.mark.parametrize(
    "address",
    [
        "http://user:Qz1@",
        "ftp://user:Qz1@127.0.0.1",
        "http://user:Qz1@127.0.0.1:port",
        "http://user:Qz1@127.0.0.1/Qz2",
        "user:Qz1/Qz2",
        "http://user:Qz1@\u2100.example:1",
    ],
)
async def test_a_proxy_that_cannot_be_one(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An invalid proxy is an error that requires operator action; it names the variable and no part of the address."""
    monkeypatch.setenv("HTTPS_PROXY", address)
    load_settings()
    with pytest.raises((ConfigurationError, OSError)) as caught:
        async with open_connection("wss://stream.invalid/ws"):
            pass
    assert "qz" not in classify(caught.value, accepted_before=False, now=0).message.lower()
    if isinstance(caught.value, ConfigurationError):
        assert str(caught.value).startswith("HTTPS_PROXY: ")


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        (["migrate", "postgresql://user@server:Qz1@h/db"], {}),
        (["gaps", "--since", "postgresql://user:Qz1@h/db"], {}),
        (["--postgresql://user:Qz1@h/db"], {}),
        (["gaps", "--since", "Qz1-or-so"], {"TOKEN": "Qz1-or-so"}),
        (["check"], {"TOKEN_FILE": "tk_Qz1_234567890"}),
        (["check"], {"DATABASE_URL_FILE": "postgresql://user:Qz1@h/db"}),
        (["run"], {"STREAM_URL": "wss://user:12/Qz1@h/ws"}),
        (["run"], {"REST_URL": "https://user:Qz1@h"}),
        (["run"], {"TOKEN": "Qz1 and more"}),
        (["run"], {"DATABASE_URL": "postgresql://user@server:12/Qz1@h/db"}),
    ],
)
def test_a_secret_in_the_wrong_place(arguments: list[str], settings: dict[str, str]) -> None:
    """A token given as an option or to another setting is not repeated in the error."""
    status, output, errors = ingestor_in_process(
        *arguments, **{f"INGESTOR_{name}": value for name, value in settings.items()}
    )
    assert status in {2, 78}
    assert "qz" not in (output + errors).lower()
    assert "Traceback" not in errors


async def test_an_unexpected_error(tmp_path: Path) -> None:
    """The traceback that Python prints by itself holds no secret."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nimport ingestor.admin.migrate as module\nfrom ingestor.cli import main\n"
        "async def migrate(url, *_):\n    raise RuntimeError(f'who knows {url}') from KeyError(url)\n"
        "module.migrate = migrate\nsys.argv[1:] = ['migrate']\nmain()\n"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(script)),
        env=environment_with(INGESTOR_DATABASE_URL=AZURE),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 70
    assert b"who knows postgresql://user@server:[hidden]@127.0.0.1:1/db" in errors
    assert b"Qz9" not in output + errors


@pytest.mark.parametrize("form", ["table", "json", "csv", "html"])
async def test_a_reason_with_a_secret(database: str, form: str) -> None:
    """A cause that an operator has recorded is redacted and printable in each form of the report."""
    await record_session(database, BEGINS - MINUTE, at(100))
    await record_session(database, at(102), ENDS + MINUTE)
    reason = 'outage,\x1b[31m see tk_Qz1"Qz2'
    settings = {"INGESTOR_DATABASE_URL": database, "INGESTOR_TOKEN": 'tk_Qz1"Qz2'}
    day = ("--since", "2026-11-20", "--until", "2026-11-21")
    arguments = ("gaps", *day, "--format", form, "--exclude", at(100).isoformat(), at(102).isoformat(), reason)
    _, output, errors = await asyncio.to_thread(ingestor_in_process, *arguments, COLUMNS="300", **settings)
    assert errors == ""
    assert "[hidden]" in output
    assert "Qz" not in output
    assert "\x1b[31m" not in output
