"""Connections to the database, without a secret in any error."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

import asyncpg
from asyncpg.connect_utils import SessionAttribute

from ingestor.errors import StoreError
from ingestor.settings import has_unencoded_password
from ingestor.store.judge import hint
from ingestor.telemetry.log import hide, scrub

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
    """Connect to the first of the URL's hosts that will do; with `read_write`, only one that takes writes does.

    Each host has `timeout` seconds of its own. Raises StoreError, with what a person can do about it and without
    the password.
    """
    _hide_passwords(url)
    if has_unencoded_password(url):  # the driver would quote a piece of it
        raise StoreError(f"The database URL {redact(url)} cannot be read.", hint="Percent-encode its password.")
    errors: list[StoreError] = []
    for host in each_host(url):
        try:
            return await _connect(host, timeout, application_name, read_write=read_write)
        except StoreError as error:
            errors.append(error)
    raise max(errors, key=_telling)


def each_host(url: str) -> list[str]:
    """Return a URL for each of the hosts that a URL names, in their order.

    The driver can try several hosts itself, but one that hangs would use up the time of all of them, and one that
    refuses for another reason than that it starts up would be the last.
    """
    try:
        parts = urlsplit(driver_url(url))
        parameters = dict(parse_qsl(parts.query))
    except ValueError:  # the driver says what is wrong
        return [url]
    userinfo, at, hosts = parts.netloc.rpartition("@")
    if "," in hosts:
        return [urlunsplit(parts._replace(netloc=f"{userinfo}{at}{host}")) for host in hosts.split(",")]
    names, ports = parameters.get("host", "").split(","), parameters.get("port", "").split(",")
    if hosts or len(names) == 1 or len(ports) not in {1, len(names)}:
        return [url]
    if len(ports) == 1:
        ports *= len(names)
    base, _, _ = driver_url(url).partition("?")
    return [
        f"{base}?{urlencode({**parameters, 'host': name} | ({'port': port} if port else {}))}"
        for name, port in zip(names, ports, strict=True)
    ]


def _telling(error: StoreError) -> int:
    """Return how much an error says: that a server refuses, more than that it is a standby or that none answers."""
    match error.sqlstate:
        case None:
            return 0
        case "25006":
            return 1
        case _:
            return 2


async def _connect(url: str, timeout: float, application_name: str, *, read_write: bool) -> asyncpg.Connection:
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


def _hide_passwords(url: str) -> None:
    """Keep the passwords out of the logs, as they are written in the URL and as they are meant."""
    text = driver_url(url)
    found = [match[2] for pattern in (_USERINFO, _SECRET_PARAMETER) for match in pattern.finditer(text)]
    for password in found:
        hide(password)
        hide(unquote(password))
