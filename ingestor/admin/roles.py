"""Logins for analysts: members of `market_read`, whose sessions read, and end what takes too long."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from collections.abc import Callable
from urllib.parse import quote, urlencode

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from ingestor.address import parse_database_address
from ingestor.admin.engine import as_owner
from ingestor.errors import StoreError
from ingestor.redaction import register_secret
from ingestor.store.retry import MIGRATE
from ingestor.store.target import target_of

READER = "market_read"
ITERATIONS = 4096
"""PostgreSQL's default for SCRAM."""

MAX_NAME_BYTES = 63
"""PostgreSQL cuts longer names."""

CARRIED = ("sslmode", "sslnegotiation", "hostaddr")
"""The parameters of a connection that an analyst needs too."""

_ROLE = """
SELECT r.rolcanlogin AND pg_has_role(r.oid, g.oid, 'MEMBER') AS is_analyst,
       r.oid = g.oid OR r.rolsuper OR r.rolcreaterole OR r.rolcreatedb OR r.rolreplication OR r.rolbypassrls OR EXISTS (
           SELECT FROM pg_roles more WHERE pg_has_role(r.oid, more.oid, 'MEMBER') AND (
               more.rolname IN ('market_write', 'pg_write_all_data', 'pg_execute_server_program',
                                'pg_read_server_files', 'pg_write_server_files')
               OR more.oid IN (SELECT nspowner FROM pg_namespace WHERE nspname IN ('market', 'ingest')))) AS is_more
FROM pg_roles r, pg_roles g WHERE r.rolname = :name AND g.rolname = 'market_read'
"""
_HAS_READER = "SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = 'market_read')"
_MAY_CONNECT = "SELECT has_database_privilege(CAST(:name AS name), current_database(), 'CONNECT')"
_QUOTED = "SELECT format('%I', CAST(:name AS text)), format('%I', current_database()), current_database()"


def verifier(password: str, salt: bytes | None = None) -> str:
    """Return what PostgreSQL stores of a password (RFC 5802, RFC 7677), so that the password itself never leaves us.

    Of visible ASCII characters only: others would have to be prepared as PostgreSQL does it.
    """
    salt = salt or secrets.token_bytes(16)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode("ascii"), salt, ITERATIONS)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")
    salt64, stored64, server64 = (base64.b64encode(value).decode() for value in (salt, stored, server))
    return f"SCRAM-SHA-256${ITERATIONS}:{salt64}${stored64}:{server64}"


async def grant_analyst(
    url: str, name: str, *, password: str | None, statement_timeout: float, report: Callable[[str], None]
) -> None:
    """Make a login that may read `market` in this database, and nothing else.

    `statement_timeout` is in seconds. Without a password the login has to be let in by another way. Of one that is an
    analyst's already the password and the limits are changed. Raises StoreError, also for any other that is there.
    """
    async with (
        as_owner(url, failure="The login could not be made", verb="Do it") as engine,
        engine.begin() as connection,
    ):
        is_new = await _check(connection, name)
        role, database, plain = (await connection.execute(sa.text(_QUOTED), {"name": name})).one()
        stored = "" if password is None else verifier(password)
        register_secret(stored)  # the password can be guessed by it
        secret = f" PASSWORD '{stored}'" if stored else ""
        # A group's settings are not inherited by its members, so they are the login's own: here, not on all databases.
        for statement in (
            f"{'CREATE' if is_new else 'ALTER'} ROLE {role} LOGIN{secret}",
            f"GRANT {READER} TO {role}",
            f"ALTER ROLE {role} IN DATABASE {database} SET default_transaction_read_only = on",
            f"ALTER ROLE {role} IN DATABASE {database} SET statement_timeout = {round(statement_timeout * 1000)}",
            f"ALTER ROLE {role} IN DATABASE {database} SET idle_in_transaction_session_timeout = '10min'",
            # Compiling takes longer than most of these queries.
            f"ALTER ROLE {role} IN DATABASE {database} SET jit = off",
        ):
            await connection.exec_driver_sql(statement)
        # Everybody may connect, unless that was taken away. Not granted twice, so that DROP ROLE undoes all of it.
        if not await connection.scalar(sa.text(_MAY_CONNECT), {"name": name}):
            await connection.exec_driver_sql(f"GRANT CONNECT ON DATABASE {database} TO {role}")
    report(f"{name} was {'made' if is_new else 'there already'}, and may read the schema market of {plain}.")
    report(f"Its sessions are read-only, and a query ends after {statement_timeout:g} s.")
    report(f"psql '{analyst_url(url, name, plain)}'")


def analyst_url(url: str, name: str, database: str) -> str:
    """Return the address by which a login reaches a database on the server of `url`, without a password.

    Everything that says where the server is counts, as for a connection of our own: the URL, a service file and the
    PG… variables. Of the rest, what the server may insist on for everybody. Files of certificates are
    each machine's own.
    """
    target = target_of(parse_database_address(url))
    hosts = ",".join(f"{_authority(host.name)}:{host.port}" for host in target.hosts)
    kept = {key: value for key in CARRIED if (value := target.parameters.get(key))}
    if target.parameters.get("sslrootcert") == "system":
        kept["sslrootcert"] = "system"
    query = f"?{urlencode(kept, safe=',:')}" if kept else ""
    return f"postgresql://{quote(name, safe='')}@{hosts}/{quote(database, safe='')}{query}"


def _authority(host: str) -> str:
    """Return a host as it stands in a URL: a name, an address, or the directory of a Unix socket."""
    return f"[{quote(host, safe=':')}]" if ":" in host else quote(host, safe="")


async def _check(connection: AsyncConnection, name: str) -> bool:
    """Return whether there is no such role yet. Raises StoreError where it can't be, or must not be, an analyst's."""
    if not name or len(name.encode()) > MAX_NAME_BYTES or name.startswith("pg_") or "\0" in name:
        raise StoreError(f"{name!r} can't be the name of a role.", hint=f"1 to {MAX_NAME_BYTES} bytes, not pg_….")
    if not await connection.scalar(sa.text(_HAS_READER)):
        raise StoreError(f"There is no role {READER}.", hint=f"{MIGRATE} It makes it, or says who can.")
    found = (await connection.execute(sa.text(_ROLE), {"name": name})).one_or_none()
    if found is None:
        return True
    if found.is_more:
        raise StoreError(
            f"{name} may do more than an analyst: it owns or writes data, makes roles, or is the group itself.",
            hint="Choose another name.",
        )
    if not found.is_analyst:
        raise StoreError(
            f"{name} is there already, for something else.",
            hint=f"Choose another name; or, if it is to be an analyst's login, GRANT {READER} TO it first.",
        )
    return False
