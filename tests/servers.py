"""Real PostgreSQL servers for the tests, one database for each test, cloned from a migrated template."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from ingestor.admin.migrate import migrate
from ingestor.embedded import EmbeddedServer
from ingestor.settings import load_settings
from ingestor.store.connect import connect, driver_url

MINIMUM = 15
IS_COMMUNITY = "SELECT coalesce(current_setting('timescaledb.license', true) = 'timescale', false)"
STOP_JOBS = """
SELECT alter_job(job_id, scheduled => false) FROM timescaledb_information.jobs WHERE job_id >= 1000
"""
_numbers = count(1)


def with_parts(url: str, *, database: str, user: str | None = None, password: str = "") -> str:
    """Return the URL of another database on the same server, for another user if one is named."""
    parts = urlsplit(driver_url(url))
    host = parts.netloc.rpartition("@")[2]
    netloc = parts.netloc if user is None else f"{user}:{password}@{host}"
    return urlunsplit((parts.scheme, netloc, f"/{database}", parts.query, ""))


async def execute_all(url: str, *statements: str) -> None:
    """Run statements, each on its own."""
    connection = await connect(url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


async def query(url: str, sql: str) -> list[tuple[Any, ...]]:
    """Return a query's rows."""
    connection = await connect(url)
    try:
        return [tuple(row) for row in await connection.fetch(sql)]
    finally:
        await connection.close()


def local_binaries() -> Path | None:
    """Return the directory of the named PostgreSQL, else of the newest on the PATH or in Debian's place, else None."""
    if named := os.environ.get("INGESTOR_TEST_POSTGRESQL"):
        return Path(named)
    places = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if (path / "postgres").exists()]
    if found := shutil.which("postgres"):
        places.append(Path(found).resolve().parent)
    versions = {int(path.parent.name): path for path in places if path.parent.name.isdigit()}
    newest = max(versions, default=0)
    return versions[newest] if newest >= MINIMUM else None


@contextmanager
def plain_server() -> Iterator[str]:
    """Yield the URL of a server: the named one, else a local one, else the embedded one."""
    if url := os.environ.get("INGESTOR_TEST_DATABASE_URL"):
        yield url
        return
    with EmbeddedServer(local_binaries()) as server:
        try:
            yield server.url()
        finally:
            # After a test has restarted it, it has no parent here.
            with contextlib.suppress(OSError):
                pid = int((server.directory / "data/postmaster.pid").read_text(encoding="ascii").split()[0])
                os.kill(pid, signal.SIGQUIT)


@dataclass
class TestServer:
    """One server of one edition. `prefix` separates the databases of concurrent runs."""

    __test__ = False

    url: str
    edition: str
    prefix: str = field(default_factory=lambda: f"ingestor_test_{os.getpid()}_{next(_numbers)}")
    template: str = ""
    is_community: bool = False
    """Whether the server's TimescaleDB has continuous aggregates and the columnstore."""

    async def run(self, statement: str, database: str | None = None) -> None:
        """Run a statement as the owner."""
        connection = await connect(with_parts(self.url, database=database) if database else self.url)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    async def prepare(self) -> None:
        """Make the template and the daemon's login: a member of market_write that owns nothing."""
        self.template = f"{self.prefix}_template"
        await self.create(self.template)
        template = with_parts(self.url, database=self.template)
        await migrate(template, load_settings(), lambda _: None)
        self.is_community = (await query(template, IS_COMMUNITY)) == [(True,)]
        if self.is_community:  # else they would run in every clone at any time: tests run them by hand
            await self.run(STOP_JOBS, self.template)
        await self.run(f"CREATE ROLE {self.prefix} LOGIN PASSWORD 'writer' IN ROLE market_write")
        # No more connections: TimescaleDB's workers would keep the template from being cloned.
        await self.run(f"ALTER DATABASE {self.template} ALLOW_CONNECTIONS false")
        await self._disconnect(self.template)

    async def create(self, name: str, template: str = "template0") -> str:
        """Create a database and return its owner's URL."""
        await self._alone(template, f"CREATE DATABASE {name} TEMPLATE {template}")
        return with_parts(self.url, database=name)

    async def move(self, name: str, tablespace: str) -> None:
        """Move a database to a tablespace, while no connection, TimescaleDB's workers included, can be opened."""
        await self.run(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        await self._disconnect(name)
        await self._alone(name, f"ALTER DATABASE {name} SET TABLESPACE {tablespace}")
        await self.run(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")

    async def drop(self, name: str) -> None:
        """Drop a database and end its connections."""
        await self.run(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    async def close(self) -> None:
        """Drop the objects of `prepare`."""
        await self.drop(self.template)
        await self.run(f"DROP ROLE IF EXISTS {self.prefix}")

    def writer_url(self, owner_url: str) -> str:
        """Return the daemon's URL of a database."""
        name = urlsplit(owner_url).path.lstrip("/")
        return with_parts(self.url, database=name, user=self.prefix, password="writer")

    def new_name(self) -> str:
        """Return an unused name."""
        return f"{self.prefix}_{next(_numbers)}"

    async def _alone(self, name: str, statement: str) -> None:
        """Run a statement that needs a database without connections, up to ten times while others still connect."""
        for _ in range(9):
            with contextlib.suppress(asyncpg.ObjectInUseError):
                return await self.run(statement)
            await self._disconnect(name)
        return await self.run(statement)

    async def _disconnect(self, name: str) -> None:
        await self.run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
