"""Logins for analysts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

import asyncpg
import pytest
from psycopg.conninfo import conninfo_to_dict

from ingestor.address import parse_database_address
from ingestor.admin.roles import analyst_url, grant_analyst
from ingestor.errors import StoreError
from ingestor.store.connect import connect
from tests.commands import ingestor
from tests.servers import TestServer, query, with_parts

PASSWORD = "a-Long_password:with/@?#$%"


@pytest.fixture
async def name(server: TestServer, database: str) -> AsyncIterator[str]:
    """Return the name of a login that is dropped after the test."""
    name = f"{server.new_name()} Ω%"
    yield name
    await server.run(f'DROP ROLE "{name}"')


def as_analyst(url: str, name: str, password: str = PASSWORD) -> str:
    database = url.rpartition("/")[2].partition("?")[0]
    return with_parts(url, database=database, user=quote(name), password=quote(password, safe=""))


async def grant(url: str, name: str, password: str | None = PASSWORD, timeout: float = 60.0) -> list[str]:
    lines: list[str] = []
    await grant_analyst(url, name, password=password, statement_timeout=timeout, report=lines.append)
    return lines


async def test_an_analyst_reads(database: str, name: str) -> None:
    """An analyst reads all of `market` and nothing else, writes nothing, and has a time limit."""
    lines = await grant(database, name, timeout=77.5)
    assert lines[0].startswith(f"{name} was made")
    assert not any(PASSWORD in line for line in lines)
    assert await query(as_analyst(database, name), "SELECT count(*) FROM market.bars_1m") == [(0,)]
    printed = lines[-1].removeprefix("psql '").removesuffix("'")
    assert parse_database_address(printed).password is None
    reached = printed.replace("@", f":{quote(PASSWORD, safe='')}@", 1)
    assert await query(reached, "SELECT current_user::text, current_database()::text") == [
        (name, database.rpartition("/")[2].partition("?")[0])
    ]
    connection = await connect(as_analyst(database, name))
    for forbidden, error in (
        ("CREATE TEMPORARY TABLE x ()", asyncpg.ReadOnlySQLTransactionError),
        ("SELECT * FROM ingest.settings", asyncpg.InsufficientPrivilegeError),
    ):
        with pytest.raises(error):
            await connection.execute(forbidden)
    assert await connection.fetchval("SHOW jit") == "off"
    assert await connection.fetchval("SHOW statement_timeout") == "77500ms"
    await connection.close()


@pytest.mark.parametrize(
    ("url", "variables", "expected"),
    [
        ("postgresql://o:geheim@db.example.org/x", {}, "postgresql://a%20b@db.example.org:5432/m%2Fx"),
        (
            "postgresql://o:geheim@db.example.org:6543/x?sslmode=verify-full&sslrootcert=/etc/ca.pem",
            {},
            "postgresql://a%20b@db.example.org:6543/m%2Fx?sslmode=verify-full",
        ),
        (
            "postgresql://o@one,two:5433/x?sslrootcert=system&target_session_attrs=read-write&password=geheim",
            {},
            "postgresql://a%20b@one:5432,two:5433/m%2Fx?sslmode=verify-full&sslrootcert=system",
        ),
        (
            "postgresql://o@/x?host=/run/postgresql&port=5433",
            {"PGPASSWORD": "geheim"},
            "postgresql://a%20b@%2Frun%2Fpostgresql:5433/m%2Fx",
        ),
        ("postgresql://o@%2Ftmp,[::1]:7/x", {}, "postgresql://a%20b@%2Ftmp:5432,[::1]:7/m%2Fx"),
        (
            "postgresql:///x",
            {"PGHOST": "db", "PGPORT": "6000", "PGSSLMODE": "require", "PGPASSWORD": "geheim"},
            "postgresql://a%20b@db:6000/m%2Fx?sslmode=require",
        ),
        ("postgresql:///x?host=db&ssl=true", {}, "postgresql://a%20b@db:5432/m%2Fx?sslmode=require"),
        ("postgresql:///x", {"PGPORT": "5444"}, "postgresql://a%20b@:5444/m%2Fx"),
        ("postgresql://o@db/x?hostaddr=10.0.0.9", {}, "postgresql://a%20b@db:5432/m%2Fx?hostaddr=10.0.0.9"),
    ],
)
def test_the_address_of_an_analyst(
    monkeypatch: pytest.MonkeyPatch, url: str, variables: dict[str, str], expected: str
) -> None:
    """The printed address names the server with what its TLS needs, and never a password."""
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    found = analyst_url(url, "a b", "m/x")
    assert found == expected
    read = conninfo_to_dict(found)  # as psql reads it
    assert (read["user"], read["dbname"], "password" in read) == ("a b", "m/x", False)
    assert analyst_url(found, "a b", "m/x") == expected


async def test_a_second_run(database: str, name: str, server: TestServer) -> None:
    """A second run changes the analyst's password and limits; any other login stays as it is."""
    for options in ("LOGIN PASSWORD 'its own'", "IN ROLE market_read"):
        await server.run(f'CREATE ROLE "{name}" {options}')
        with pytest.raises(StoreError, match=r"is there already, for something else\. Choose another name; or"):
            await grant(database, name)
        await server.run(f'DROP ROLE "{name}"')
    await server.run(f'CREATE ROLE "{name}" LOGIN IN ROLE market_read')
    assert "was there already" in (await grant(database, name))[0]
    await grant(database, name, "another-Password", 5.0)
    shown = await query(as_analyst(database, name, "another-Password"), "SHOW statement_timeout")
    assert shown == [("5s",)]
    if server.edition == "plain":  # the tests' other server accepts any login
        with pytest.raises(StoreError, match="password authentication failed"):
            await connect(as_analyst(database, name))
    ((stored,),) = await query(database, f"SELECT rolpassword FROM pg_authid WHERE rolname = '{name}'")
    assert stored.startswith("SCRAM-SHA-256$4096:")
    assert "was there already" in (await grant(database, name, None))[0]
    assert await query(as_analyst(database, name, "another-Password"), "SELECT 1") == [(1,)]


async def test_connect_privilege_is_granted(database: str, name: str, server: TestServer) -> None:
    """If the database refuses connections by default, the analyst is granted CONNECT."""
    short = database.rpartition("/")[2].partition("?")[0]
    await server.run(f"REVOKE CONNECT ON DATABASE {short} FROM PUBLIC")
    await grant(database, name)
    assert await query(as_analyst(database, name), "SELECT 1") == [(1,)]
    await server.run(f'REVOKE CONNECT ON DATABASE {short} FROM "{name}"')


async def test_logins_refused_as_analysts(database: str, server: TestServer) -> None:
    """Owners and writers are refused as analysts; invalid names are refused in one line."""
    ((owner,),) = await query(database, "SELECT current_user::text")
    boss = server.new_name()
    await server.run(f"CREATE ROLE {boss} LOGIN IN ROLE market_read, pg_write_all_data")
    for refused in (owner, server.prefix, "market_read", "market_write", boss):
        with pytest.raises(StoreError, match="may do more than an analyst"):
            await grant(database, refused)
    await server.run(f"DROP ROLE {boss}")
    for impossible in ("", "pg_analyst", "x" * 64):
        with pytest.raises(StoreError, match="can't be the name of a role"):
            await grant(database, impossible)


async def test_without_the_privilege(writer_url: str) -> None:
    """A role without CREATEROLE gets an error that names the missing privilege."""
    with pytest.raises(StoreError, match="The login could not be made: permission denied"):
        await grant(writer_url, "someone")


async def test_on_the_command_line(database: str, name: str, tmp_path: Path) -> None:
    """The password is read from a file and never shown; without a reader, no password is generated."""
    file = tmp_path / "password"
    file.write_text(f"{PASSWORD}\n", encoding="utf-8")
    status, output, errors = await ingestor("grant-analyst", name, "--password-file", str(file), DATABASE_URL=database)
    assert (status, errors) == (0, "")
    assert PASSWORD not in output
    assert await query(as_analyst(database, name), "SELECT 1") == [(1,)]
    file.write_text("short", encoding="utf-8")
    for arguments in (
        (),
        ("--password-file", str(file)),
        ("--password-file", "/nowhere"),
        ("--statement-timeout", "x"),
    ):
        status, output, errors = await ingestor("grant-analyst", name, *arguments, DATABASE_URL=database)
        assert status == 2, errors
        assert "short" not in output + errors.replace("shortly", "")
