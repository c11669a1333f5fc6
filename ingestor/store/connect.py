"""Connections to the database, without a secret in any error."""

from __future__ import annotations

import re
from pathlib import Path

import asyncpg
from asyncpg.connect_utils import SessionAttribute

from ingestor.address import FORM, AddressError, DatabaseAddress, parse_database_address, redact_url
from ingestor.errors import StoreError
from ingestor.redaction import outside_text, register_password_file, register_url, system_words
from ingestor.store.judge import hint
from ingestor.store.queries import QUERIES

CONNECT_TIMEOUT = 10.0

STARTUP = {"timezone": "UTC", "standard_conforming_strings": "on"}
"""What our SQL takes for granted, and an administrator may have set otherwise for the role or the database; with
`set_isolation` all of it. Only what a connection pooler knows may be given when connecting."""

DRIVER_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)
"""What the driver raises when the server refuses, or the connection breaks."""

_WRITE = f"Write {FORM}?sslmode=verify-full."


def driver_url(url: str) -> str:
    """Return the URL as asyncpg reads it rightly; SQLAlchemy's `postgresql+asyncpg://` is accepted too.

    Raises AddressError.
    """
    return parse_database_address(url).driver_url


async def connect(
    url: str,
    *,
    timeout: float = CONNECT_TIMEOUT,
    application_name: str = "ingestor",
    read_write: bool = False,
) -> asyncpg.Connection:
    """Connect to the first of the URL's hosts that will do; with `read_write`, only one that takes writes does.

    Each host has `timeout` seconds of its own. Raises StoreError, with what a person can do about it and without
    the password.
    """
    register_url(url)
    address = _parsed(url)
    if passfile := address.parameter("passfile"):
        register_password_file(Path(passfile))
    errors: list[StoreError] = []
    for each in address.each_host():
        found = await _connect(each, timeout, application_name, read_write=read_write)
        if not isinstance(found, StoreError):
            return found
        errors.append(found)
    raise max(errors, key=_telling)


def _parsed(url: str) -> DatabaseAddress:
    try:
        return parse_database_address(url)
    except AddressError as exc:  # which says nothing of the address
        raise StoreError(
            f"The database URL {outside_text(redact_url(url))} cannot be used: {exc}.", hint=_WRITE
        ) from None


def _telling(error: StoreError) -> int:
    """Return how much an error says: that a server refuses, more than that it is a standby or that none answers."""
    match error.sqlstate:
        case None:
            return 0
        case "25006":
            return 1
        case _:
            return 2


async def _connect(
    address: DatabaseAddress, timeout: float, application_name: str, *, read_write: bool
) -> asyncpg.Connection | StoreError:
    """Connect, or return why not: without the driver's error behind it, which may quote pieces of the address."""
    try:
        connection: asyncpg.Connection = await asyncpg.connect(
            address.driver_url,
            timeout=timeout,
            server_settings={"application_name": application_name, **STARTUP},
            target_session_attrs=SessionAttribute.read_write if read_write else SessionAttribute.any,
        )
        try:
            await connection.execute(QUERIES["set_isolation"], timeout=timeout)
        except BaseException:
            connection.terminate()
            raise
    except (ValueError, OverflowError, *DRIVER_ERRORS) as exc:
        return _refusal(exc, outside_text(address.shown))
    return connection


def _refusal(exc: Exception, shown: str) -> StoreError:
    """Return the error of ours for one of the driver's, in words of ours where it is about the address."""
    match exc:
        case asyncpg.PostgresError():
            refused = translated(exc)
            return StoreError(
                f"The database refused the connection: {_message(exc)}.", sqlstate=refused.sqlstate, hint=refused.hint
            )
        case asyncpg.TargetServerAttributeNotMatched():
            return StoreError(
                f"The database at {shown} takes no writes: only a standby, or a read-only server, answers there.",
                sqlstate="25006",
                hint=hint("25006"),
            )
        case asyncpg.ClientConfigurationError():
            return StoreError(f"The database URL {shown} cannot be used: {outside_text(exc).rstrip('.')}.", hint=_WRITE)
        case OSError():  # errors of certificates are values' errors as well
            # The driver's own, where a server has no TLS.
            why = "it has no encryption (TLS)" if type(exc) is ConnectionError else system_words(exc)
        case ValueError() | OverflowError():
            return StoreError(f"The database URL {shown} cannot be used.", hint=_WRITE)
        case _:
            why = outside_text(exc) or type(exc).__name__
    return StoreError(
        f"The database at {shown} cannot be reached: {why}.",
        hint="See that host and port are right, and that the server runs and lets this machine in.",
    )


def translated(exc: Exception) -> StoreError:
    """Return the error of ours that says what the driver's says."""
    if isinstance(exc, asyncpg.PostgresError):
        sqlstate = exc.sqlstate if re.fullmatch("[0-9A-Z]{5}", exc.sqlstate or "") else None
        return StoreError(
            f"The database answered: {_message(exc)} ({sqlstate}).",
            sqlstate=sqlstate,
            constraint=getattr(exc, "constraint_name", None),
            hint=hint(sqlstate),
        )
    return StoreError(f"The connection to the database broke: {outside_text(exc) or type(exc).__name__}")


def _message(exc: asyncpg.PostgresError) -> str:
    """Return what the server said, without its details: these may quote rows."""
    return outside_text(exc.args[0]) if exc.args else type(exc).__name__
