"""Connections to the database, without a secret in any error."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import asyncpg
from asyncpg.connect_utils import SessionAttribute

from ingestor.address import AddressError, parse_database_address, redact_url
from ingestor.dial import addresses_of, first_that_works
from ingestor.errors import DatabaseAccessError, PoolerError, StoreError
from ingestor.libpq import ParameterError
from ingestor.redaction import outside_text, register_url, system_words
from ingestor.store.driver_loop import driver_loop
from ingestor.store.queries import QUERIES
from ingestor.store.refusal import DRIVER_ERRORS, RUNS, WRITE, refusal, unsuited
from ingestor.store.target import Host, password_of, target_of
from ingestor.store.tls import OptionalContext, context_for

CONNECT_TIMEOUT = 10.0

STARTUP = {"timezone": "UTC", "standard_conforming_strings": "on"}
"""Settings that our SQL relies on, and that an administrator may have changed for the role or the database; with
`look_around` all of it. Only what a connection pooler knows may be given when connecting."""

STATEMENTS = 100
"""Prepared statements that a connection of our own keeps."""

POOL_MODE = "The connection pooler before the database allows no transactions: its pool_mode is statement."

_CERTIFICATES = "a file of its certificates cannot be read, or holds something else"


class PooledConnection(asyncpg.Connection):
    """A connection to a pooler, which may give each transaction another connection to the server.

    Nothing of a session lasts from one transaction to the next: no setting, lock, temporary table or named statement.
    """

    __slots__ = ()


_connections: WeakSet[asyncpg.Connection] = WeakSet()


def own_backends() -> tuple[list[int], list[str]]:
    """Return the server's processes that work for this one, and the names of this one's connections to poolers."""
    standing = [connection for connection in list(_connections) if not connection.is_closed()]
    return (
        [connection.get_server_pid() for connection in standing if not is_pooled(connection)],
        [connection.get_settings().application_name for connection in standing if is_pooled(connection)],
    )


def is_pooled(connection: object) -> bool:
    """Whether this is a connection to a pooler. `isinstance` does not tell: the driver says yes to all its classes."""
    return type(connection) is PooledConnection


def driver_url(url: str) -> str:
    """Return the URL as asyncpg reads it rightly; SQLAlchemy's `postgresql+asyncpg://` is accepted too.

    Raises AddressError.
    """
    return parse_database_address(url).driver_url


async def connect(
    url: str,
    *,
    timeout: float | None = None,
    application_name: str = "ingestor",
    read_write: bool = False,
) -> asyncpg.Connection:
    """Connect to the first of the URL's hosts that will do; with `read_write`, only one that takes writes does.

    Each address has `timeout` seconds of its own, or fewer by `connect_timeout`; without `timeout` as many as that
    says, or ten. Raises StoreError, with what a person can do about it and without the password: DatabaseAccessError
    where nothing else helps.
    """
    register_url(url)
    shown = outside_text(redact_url(url))
    try:
        target = target_of(parse_database_address(url))
        wanted = _session_attributes(target.parameters, read_write=read_write)
    except (AddressError, ParameterError) as exc:  # which say nothing of the address
        why = outside_text(exc)
        raise DatabaseAccessError(f"The database URL {shown} cannot be used: {why}.", hint=WRITE) from None
    limit = min(timeout or target.limit or CONNECT_TIMEOUT, target.limit or math.inf)
    name = target.parameters.get("application_name") or target.parameters.get("fallback_application_name")
    settings = {"application_name": name or application_name, **STARTUP}
    if options := target.parameters.get("options"):
        settings["options"] = options
    errors: list[StoreError] = []
    for attributes in wanted:
        for host in target.hosts:
            found = await _Attempt(host, target.parameters, settings, attributes, limit).run()
            if not isinstance(found, StoreError):
                return found
            errors.append(found)
    raise _most_telling(errors)


def _session_attributes(parameters: Mapping[str, str], *, read_write: bool) -> list[SessionAttribute]:
    """Return what a host must be, in the order of preference. Raises ParameterError."""
    given = parameters.get("target_session_attrs") or "any"
    if read_write:
        if given in {"standby", "read-only"}:
            raise ParameterError("remove target_session_attrs: what is written needs a server that takes writes")
        return [SessionAttribute.read_write]
    if given == "prefer-standby":  # of all hosts, where the driver looks at one
        return [SessionAttribute.standby, SessionAttribute.any]
    return [SessionAttribute(given)]


def _most_telling(errors: list[StoreError]) -> StoreError:
    """Return the error to raise of several hosts, one that requires operator action only if no other host may help.

    Roles and databases are the same on all servers of a cluster; pg_hba.conf and certificates are each server's own.
    """
    worst = max(errors, key=_telling)
    if all(isinstance(each, DatabaseAccessError) for each in errors) or worst.sqlstate in {"28P01", "3D000"}:
        return worst
    return StoreError(worst.message, sqlstate=worst.sqlstate, hint=worst.hint)


def _telling(error: StoreError) -> int:
    """Return how much an error says: that a server refuses, more than that it is a standby or that none answers."""
    match error:
        case DatabaseAccessError():
            return 3
        case StoreError(sqlstate=None):
            return 0
        case StoreError(sqlstate="25006"):
            return 1
        case _:
            return 2


@dataclass(frozen=True)
class _Attempt:
    """One host, with all its addresses. `limit` is in seconds, for each of them."""

    host: Host
    parameters: Mapping[str, str]
    settings: dict[str, str]
    attributes: SessionAttribute
    limit: float

    async def run(self) -> asyncpg.Connection | StoreError:
        """Connect, or return why not: without the driver's error behind it, which may quote pieces of the address."""
        shown = outside_text(self.host.address.shown)
        try:
            addresses = await self._addresses()
            if len(addresses) < 2 and not self.host.pinned:
                return await self._connect(None)
            return await first_that_works(addresses, self._connect, discard=_discard)
        except StoreError as error:
            return error
        except ExceptionGroup as group:
            failures = [refusal(each, shown) for each in group.exceptions if isinstance(each, Exception)]
            worst = max(failures, key=_telling)
            if _telling(worst) or len(failures) == 1:
                return worst
            each = "; ".join(f"{where} {_why(why)}" for where, why in zip(addresses, group.exceptions, strict=True))
            return StoreError(f"The database at {shown} cannot be reached at any of its addresses: {each}.", hint=RUNS)
        except (KeyError, ValueError, OverflowError, *DRIVER_ERRORS) as exc:
            return refusal(exc, shown)

    async def _addresses(self) -> list[str]:
        if self.host.pinned:
            return [self.host.pinned]
        if not self.host.name or self.host.name.startswith("/"):
            return []
        async with asyncio.timeout(self.limit):
            found = await addresses_of(self.host.name, self.host.port)
        if self.parameters.get("load_balance_hosts") == "random":
            random.shuffle(found)
        return found

    async def _connect(self, address: str | None) -> asyncpg.Connection:
        try:
            options = self._options(address)
        except PermissionError:
            raise
        except (OSError, ValueError) as exc:
            raise asyncpg.ClientConfigurationError(_CERTIFICATES) from exc
        connection = await self._open(options)
        try:
            server = await _look_around(connection, self.limit)
            if not server.suits(self.attributes):
                raise unsuited(self.attributes, outside_text(self.host.address.shown))
            if server.is_behind_pooler:
                connection.terminate()
                connection = await self._open(options, pooled=True)
                await _try_transaction(connection, self.limit)
            _connections.add(connection)
        except BaseException:
            connection.terminate()
            raise
        return connection

    async def _open(self, options: Mapping[str, Any], *, pooled: bool = False) -> asyncpg.Connection:
        """Connect, without TLS if it is optional and the server has none. `pooled` as in `_open_once`."""
        try:
            return await self._open_once(options, pooled=pooled)
        except ConnectionError as error:
            # The driver's own error for a server without TLS; those of the system are of subclasses.
            if type(error) is not ConnectionError or not isinstance(options.get("ssl"), OptionalContext):
                raise
        return await self._open_once({**options, "ssl": False}, pooled=pooled)

    async def _open_once(self, options: Mapping[str, Any], *, pooled: bool) -> asyncpg.Connection:
        """Connect; `pooled` without prepared statements that have a name, which last as long as a session."""
        connection: asyncpg.Connection = await asyncpg.connect(
            self.host.address.driver_url,
            timeout=self.limit,
            server_settings=self.settings,
            target_session_attrs=SessionAttribute.any,  # the driver would ask by a prepared statement with a name
            statement_cache_size=0 if pooled else STATEMENTS,
            connection_class=PooledConnection if pooled else asyncpg.Connection,
            loop=driver_loop(),
            **options,
        )
        return connection

    def _options(self, address: str | None) -> dict[str, Any]:
        """Return what makes the driver connect to one address, and still check and look up the name."""
        options: dict[str, Any] = {}
        if address is not None:
            options = {"host": address, "port": self.host.port}
            if password := password_of(self.host, self.parameters):
                options["password"] = password
        name = self.host.name or self.host.pinned
        if name and not name.startswith("/"):
            context = context_for(name, self.parameters)
            if context is not None:
                options["ssl"] = context
        return options


async def _discard(connection: asyncpg.Connection) -> None:
    connection.terminate()


def _why(error: Exception) -> str:
    return system_words(error) if isinstance(error, OSError) else type(error).__name__


@dataclass(frozen=True, slots=True)
class _Server:
    """The other side of a connection, as it describes itself."""

    is_behind_pooler: bool
    takes_writes: bool
    is_standby: bool

    def suits(self, wanted: SessionAttribute) -> bool:
        """Whether it is a server of the kind that `target_session_attrs` names."""
        return {
            SessionAttribute.read_write: self.takes_writes,
            SessionAttribute.read_only: not self.takes_writes,
            SessionAttribute.primary: not self.is_standby,
            SessionAttribute.standby: self.is_standby,
        }.get(wanted, True)


async def _look_around(connection: asyncpg.Connection, timeout: float) -> _Server:
    """Ask what answers. In one round trip without a prepared statement, where only the number of rows comes back.

    A pooler makes up the process id that it gives to a client.
    """
    pid = connection.get_server_pid()
    status = await connection.execute(QUERIES["look_around"].replace("$1", str(pid)), timeout=timeout)
    found = int(status.rsplit(" ", 1)[1])
    return _Server(bool(found & 1), not found & 2, bool(found & 4))


async def _try_transaction(connection: asyncpg.Connection, timeout: float) -> None:
    """Raise PoolerError where the pooler allows no transactions."""
    try:
        async with asyncio.timeout(timeout), connection.transaction():
            pass
    except asyncpg.PostgresError as exc:
        if "statement pooling" not in outside_text(exc):
            raise
        raise PoolerError(POOL_MODE, hint="Set pool_mode=transaction (or session) for this database.") from None
