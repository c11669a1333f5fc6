"""Fixtures of all tests: a clean environment, and real databases."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling

from ingestor import redaction
from ingestor.admin import maintenance
from ingestor.admin.migrate import migrate
from ingestor.coverage.calendar import xnze
from ingestor.service import writer
from ingestor.settings import load_settings
from ingestor.store.connect import connect
from tests.locks import ServerLock
from tests.processes import ServerProcess
from tests.servers import TestServer, plain_server

WORKERS = 4
"""Processes at most: each has a PostgreSQL server of its own."""

TOGETHER = {
    "tests/integration/test_community.py": "community",  # one database, test by test, over one connection at a time
    "tests/integration/test_examples.py": "community",
    "tests/integration/test_official_client.py": "official client",  # it has one fixed port
    "tests/integration/test_wheel.py": "wheel",  # it is built once
}
"""Files whose tests run in one process, with those of the same group. Every other test runs in any process."""

NAMED_SERVERS = {
    "plain": os.environ.get("INGESTOR_TEST_DATABASE_URL"),
    "timescale": os.environ.get("INGESTOR_TEST_TIMESCALE_URL"),
}
"""Servers that the processes share."""

# Processes share the cores: the duration of an example proves nothing.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")

EDITIONS = ["plain", *(["timescale"] if "INGESTOR_TEST_TIMESCALE_URL" in os.environ else [])]


class _Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # the library has no types
    """Hands out tests one by one, except for `TOGETHER`: pytest 9.2 overlooks the groups of xdist 3.8."""

    def _split_scope(self, nodeid: str) -> str:
        return TOGETHER.get(nodeid.partition("::")[0], nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Let each process take the next test when it is idle."""
    return _Scheduling(config, log)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Use a process for each core, and at least two since tests wait a lot; one alone for single files or tests."""
    if any(not Path(argument).is_dir() for argument in config.option.file_or_dir):
        return 0
    return min(max(2, os.cpu_count() or 1), WORKERS)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Run the tests that stop a shared server, with their fixtures, apart from all others on it."""
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    fixtures = getattr(item, "fixturenames", ())
    used = {*fixtures, parameters.get("server"), "timescale" if "community" in fixtures else None}
    with contextlib.ExitStack() as locks:
        for name, url in NAMED_SERVERS.items():
            if url is not None and name in used:
                locks.enter_context(ServerLock(url).held(alone="process" in fixtures))
        return (yield)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Remove the developer's settings and any `.env`."""
    for name in list(os.environ):
        if name.startswith("INGESTOR_") and not name.startswith("INGESTOR_TEST_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("INGESTOR_SPOOL_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("INGESTOR_HTTP_PORT", "0")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _own_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unregister the secrets of a test at its end."""
    monkeypatch.setattr(redaction, "_registry", redaction.Registry())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the writer retry sooner after errors that require operator action."""
    monkeypatch.setattr(writer, "MAX_WAIT", 0.3)


def _prepared(url: str, edition: str) -> Iterator[TestServer]:
    server = TestServer(url, edition)
    asyncio.run(server.prepare())
    yield server
    lock: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if url in NAMED_SERVERS.values():  # the process's last test may have used another server, or none
        lock = ServerLock(url).held(alone=False)
    with lock:
        asyncio.run(server.close())


@pytest.fixture(scope="session")
def plain() -> Iterator[TestServer]:
    """Yield PostgreSQL without the extension (unless the named server has it)."""
    with plain_server() as url:
        yield from _prepared(url, "plain")


@pytest.fixture(scope="session")
def timescale() -> Iterator[TestServer]:
    """Yield the server of INGESTOR_TEST_TIMESCALE_URL."""
    yield from _prepared(os.environ["INGESTOR_TEST_TIMESCALE_URL"], "timescale")


@pytest.fixture(params=EDITIONS)
def server(request: pytest.FixtureRequest) -> TestServer:
    """Yield each edition in turn."""
    found: TestServer = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def process(server: TestServer) -> AsyncIterator[ServerProcess]:
    """Yield the server's process, for tests that stop it; it is restarted after them."""
    process = await ServerProcess.of(server.url)
    yield process
    await process.ensure_running()


@pytest.fixture
async def database(server: TestServer) -> AsyncIterator[str]:
    """Yield the owner's URL of a migrated database."""
    name = server.new_name()
    yield await server.create(name, server.template)
    await server.drop(name)


@pytest.fixture
async def empty_database(server: TestServer) -> AsyncIterator[str]:
    """Yield the owner's URL of an empty database."""
    name = server.new_name()
    yield await server.create(name)
    await server.drop(name)


@pytest.fixture
def writer_url(server: TestServer, database: str) -> str:
    """Return the URL of the same database for the daemon's login, which owns nothing."""
    return server.writer_url(database)


@pytest.fixture
def bundled_calendar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let maintenance use the bundled calendar, since the import of the library takes seconds."""
    monkeypatch.setattr(maintenance, "known_sessions", lambda: ("the bundled snapshot", list(xnze())))


@pytest.fixture(scope="module")
def community(request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield a migrated database of a server with the Community edition."""
    if url := os.environ.get("INGESTOR_TEST_COMMUNITY_URL"):
        asyncio.run(_empty(url))
        asyncio.run(migrate(url, load_settings(), lambda _: None))
        yield url
        return
    server: TestServer | None = request.getfixturevalue("timescale") if "timescale" in EDITIONS else None
    if server is None or not server.is_community:
        pytest.skip("no TimescaleDB Community: set INGESTOR_TEST_COMMUNITY_URL, or INGESTOR_TEST_TIMESCALE_URL to one")
    name = server.new_name()
    yield asyncio.run(server.create(name, server.template))
    asyncio.run(server.drop(name))


async def _empty(url: str) -> None:
    connection = await connect(url)
    for name in ("rolled", "stored_1m", "stored_5m", "stored_1h", "stored_1d"):  # TimescaleDB drops no view on its own
        await connection.execute(f"DROP VIEW IF EXISTS ingest.{name} CASCADE")
    await connection.execute("DROP SCHEMA IF EXISTS market CASCADE")
    await connection.execute("DROP SCHEMA IF EXISTS ingest CASCADE")
    await connection.execute("CREATE EXTENSION IF NOT EXISTS timescaledb")
    await connection.close()
