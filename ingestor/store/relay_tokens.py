"""The tokens of relays' clients: random, shown once, and stored as hashes."""

from __future__ import annotations

import hashlib
import secrets
import string
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

import asyncpg

from ingestor.redaction import register_secret
from ingestor.store.connect import connect
from ingestor.store.connection import GuardedConnection
from ingestor.store.queries import QUERIES

PREFIX = "rk_"
LENGTH = 20
"""Characters of a token, with the prefix: as many as the provider's have."""

TIMEOUT = 10.0


@dataclass(frozen=True, slots=True)
class TokenGrant:
    """A client that a token admits: its name and its limit of streams at once. `hash` identifies the token."""

    hash: bytes
    name: str
    max_streams: int


@dataclass(frozen=True, slots=True)
class ListedToken:
    """A token as an operator sees it."""

    name: str
    max_streams: int
    created_at: datetime
    expires_at: datetime | None
    is_expired: bool


def new_token() -> str:
    """Return a random token, registered as a secret: 17 letters and digits hold 101 bits."""
    alphabet = string.ascii_letters + string.digits
    token = PREFIX + "".join(secrets.choice(alphabet) for _ in range(LENGTH - len(PREFIX)))
    register_secret(token)
    return token


def is_well_formed(token: str) -> bool:
    """Return whether a text may be a token. The provider's are none, so they are never looked up."""
    return len(token) == LENGTH and token.startswith(PREFIX) and token.isascii()


def hash_of(token: str) -> bytes:
    """Return the hash that is stored. A random token needs no salt and no slow function."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


async def find(connection: asyncpg.Connection, token: str) -> TokenGrant | None:
    """Return the client of a token; None if there is no such token, or it is expired."""
    digest = hash_of(token)
    row = await connection.fetchrow(QUERIES["relay_token"], digest)
    return None if row is None else TokenGrant(digest, *row)


async def valid_hashes(connection: asyncpg.Connection) -> set[bytes]:
    """Return the hashes of all tokens that are not expired."""
    return {row[0] for row in await connection.fetch(QUERIES["valid_relay_tokens"])}


class TokenStore:
    """Makes, lists and revokes tokens, on a connection for each call. Raises StoreError."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def add(self, name: str, *, max_streams: int, lifetime: timedelta | None) -> str | None:
        """Store a new token and return it; None if the name has one already."""
        token = new_token()
        async with self._connection() as connection:
            row = await connection.fetchrow(QUERIES["add_relay_token"], name, hash_of(token), max_streams, lifetime)
        return None if row is None else token

    async def list(self) -> list[ListedToken]:
        """Return all tokens by name."""
        async with self._connection() as connection:
            return [ListedToken(*row) for row in await connection.fetch(QUERIES["list_relay_tokens"])]

    async def revoke(self, name: str) -> bool:
        """Delete a token; return whether there was one."""
        async with self._connection() as connection:
            status = await connection.execute(QUERIES["revoke_relay_token"], name)
        return status == "DELETE 1"

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[asyncpg.Connection]:
        guarded = GuardedConnection(
            await connect(self._url, application_name="ingestor relay-token", read_write=True), TIMEOUT
        )
        try:
            async with guarded as connection, connection.transaction():
                yield connection
        finally:
            await guarded.close()
