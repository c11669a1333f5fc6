"""Connections to the database: one URL for asyncpg and for SQLAlchemy, and no secret in any error."""

from __future__ import annotations

import re
from urllib.parse import unquote

import asyncpg
from asyncpg.connect_utils import SessionAttribute
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from ingestor.errors import StoreError
from ingestor.settings import has_unencoded_password
from ingestor.store.judge import hint
from ingestor.telemetry import hide, scrub

CONNECT_TIMEOUT = 10.0

DRIVER_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)
"""What the driver raises when the server refuses, or the connection breaks."""

# By pattern and not by parsing: a password with a `/` or `#` that was not encoded must not show either.
_USERINFO = re.compile(r"(?<=://)([^:@/?]*):(.*)@")
_SECRET_PARAMETER = re.compile(r"([?&][^=&]*pass[^=&]*=)([^&]*)", re.IGNORECASE)


def driver_url(url: str) -> str:
    """Return the URL as asyncpg wants it: SQLAlchemy's `postgresql+asyncpg://` is accepted too."""
    return re.sub(r"^postgres(ql)?(\+asyncpg)?://", "postgresql://", url)


def redact(url: str) -> str:
    """Return the URL without its passwords, for people and logs, however badly it is written."""
    return _SECRET_PARAMETER.sub(r"\1[hidden]", _USERINFO.sub(r"\1:[hidden]@", driver_url(url)))


async def connect(
    url: str,
    *,
    timeout: float = CONNECT_TIMEOUT,
    application_name: str = "ingestor",
    read_write: bool = False,
) -> asyncpg.Connection:
    """Connect within `timeout` seconds. With `read_write`, of several hosts only one that takes writes will do.

    Raises StoreError, with what a person can do about it and without the password.
    """
    _hide_passwords(url)
    if has_unencoded_password(url):  # the driver would quote a piece of it
        raise StoreError(f"The database URL {redact(url)} cannot be read.", hint="Percent-encode its password.")
    try:
        connection: asyncpg.Connection = await asyncpg.connect(
            driver_url(url),
            timeout=timeout,
            server_settings={"application_name": application_name, "timezone": "UTC"},
            target_session_attrs=SessionAttribute.read_write if read_write else SessionAttribute.any,
        )
    except asyncpg.PostgresError as exc:
        raise StoreError(
            f"The database refused the connection: {scrub(str(exc))}.",
            sqlstate=exc.sqlstate,
            hint=hint(exc.sqlstate),
        ) from None
    except asyncpg.TargetServerAttributeNotMatched:
        raise StoreError(
            f"The database at {redact(url)} takes no writes: only a standby, or a read-only server, answers there.",
            sqlstate="25006",
            hint=hint("25006"),
        ) from None
    except (ValueError, OverflowError) as exc:
        raise StoreError(
            f"The database URL {redact(url)} cannot be used: {scrub(str(exc)).rstrip('.')}.",
            hint="Write postgresql://USER:PASSWORD@HOST:PORT/DATABASE?sslmode=verify-full.",
        ) from None
    except DRIVER_ERRORS as exc:
        why = "it did not answer in time" if isinstance(exc, TimeoutError) else scrub(str(exc)) or repr(exc)
        raise StoreError(
            f"The database at {redact(url)} cannot be reached: {why}.",
            hint="See that host and port are right, and that the server runs and lets this machine in.",
        ) from None
    return connection


def translated(exc: Exception) -> StoreError:
    """Return the error of ours that says what the driver's says."""
    if isinstance(exc, asyncpg.PostgresError):
        return StoreError(
            f"The database answered: {exc.args[0] if exc.args else type(exc).__name__} ({exc.sqlstate}).",
            sqlstate=exc.sqlstate,
            constraint=getattr(exc, "constraint_name", None),
            hint=hint(exc.sqlstate),
        )
    return StoreError(f"The connection to the database broke: {str(exc) or type(exc).__name__}")


def create_engine(url: str) -> AsyncEngine:
    """Return a SQLAlchemy engine that connects by the same URL in the same way.

    SQLAlchemy's own reading of a URL knows neither `sslmode` nor several hosts.
    """

    async def creator() -> asyncpg.Connection:
        return await connect(url, application_name="ingestor migrate", read_write=True)

    return create_async_engine("postgresql+asyncpg://", async_creator=creator, poolclass=NullPool)


def _hide_passwords(url: str) -> None:
    """Keep the passwords out of the logs, as they are written in the URL and as they are meant."""
    text = driver_url(url)
    found = [match[2] for pattern in (_USERINFO, _SECRET_PARAMETER) for match in pattern.finditer(text)]
    for password in found:
        hide(password)
        hide(unquote(password))
