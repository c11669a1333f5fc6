"""The driver's errors in words of ours: what failed, and what a person can do about it. No secret is in any of them."""

from __future__ import annotations

import os
import re
import ssl

import asyncpg
from asyncpg.connect_utils import SessionAttribute

from ingestor.address import FORM
from ingestor.errors import DatabaseAccessError, StoreError
from ingestor.network import CERTIFICATE_NOT_YET_VALID
from ingestor.redaction import outside_text, system_words
from ingestor.store.retry import ENDS_SESSION, hint, needs_operator

SERVER_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""The driver's own errors. An OSError beside it may come from anything, such as the writing of a report."""

DRIVER_ERRORS = (*SERVER_ERRORS, OSError)
"""The driver's errors for a refusal of the server or a broken connection."""

ANSWERED = "The database answered: "
WRITE = f"Write {FORM}?sslmode=verify-full."
RUNS = "See that host and port are right, and that the server runs and lets this machine in."
_CLOCK = frozenset({CERTIFICATE_NOT_YET_VALID, 11})
"""A certificate, or a list of revoked ones, that is not valid yet: our own clock may be wrong after a boot."""


def unsuited(wanted: SessionAttribute, shown: str) -> StoreError:
    """Return the error for a server that is not of the kind that is needed."""
    if wanted is SessionAttribute.read_write:
        return StoreError(
            f"The database at {shown} takes no writes: only a standby, or a read-only server, answers there.",
            sqlstate="25006",
            hint=hint("25006"),
        )
    return StoreError(f"The database at {shown} is not what target_session_attrs={wanted.value} asks for.")


def refusal(exc: Exception, shown: str) -> StoreError:  # noqa: PLR0911 - a table
    """Return the error of ours for one of the driver's, in words of ours where it is about the address."""
    exc = _said(exc)
    match exc:
        case StoreError():
            return exc
        case asyncpg.ConnectionDoesNotExistError() | asyncpg.InternalClientError():
            why = "it closed the connection before it was ready"
        case asyncpg.PostgresError():
            refused = translated(exc)
            kind = DatabaseAccessError if needs_operator(refused.sqlstate, _message(exc)) else StoreError
            return kind(
                f"The database refused the connection: {_message(exc)}.", sqlstate=refused.sqlstate, hint=refused.hint
            )
        case asyncpg.ClientConfigurationError():
            why = outside_text(exc).rstrip(".")
            return DatabaseAccessError(f"The database URL {shown} cannot be used: {why}.", hint=WRITE)
        case KeyError():  # of the list of users
            return DatabaseAccessError(
                f"The database URL {shown} names no user, and the user id {os.getuid()} of this process has no name.",
                hint="Write postgresql://USER@HOST:PORT/DATABASE.",
            )
        case PermissionError() if exc.filename is not None:  # without a name it is the server's socket
            return DatabaseAccessError(
                f"{outside_text(exc.filename)}, which is read before connecting, cannot be: {system_words(exc)}.",
                hint="Let this user read it, or set HOME to a directory of its own.",
            )
        case ssl.SSLCertVerificationError() if exc.verify_code not in _CLOCK:
            return DatabaseAccessError(
                f"The database at {shown} cannot be trusted: {system_words(exc)}.",
                hint="See sslrootcert and the name in the database URL, and the server's certificate.",
            )
        case OSError():  # errors of certificates are values' errors as well
            # The driver's own, where a server has no TLS.
            why = "it has no encryption (TLS)" if type(exc) is ConnectionError else system_words(exc)
        case ValueError() | OverflowError():
            return DatabaseAccessError(f"The database URL {shown} cannot be used.", hint=WRITE)
        case _:
            why = outside_text(exc) or type(exc).__name__
    return StoreError(f"The database at {shown} cannot be reached: {why}.", hint=RUNS)


def translated(exc: Exception) -> StoreError:
    """Return the error of ours that says what the server said, or else what the driver's says."""
    exc = _said(exc)
    if isinstance(exc, asyncpg.InternalClientError | asyncpg.ConnectionDoesNotExistError):
        # The driver's words are about its own states, whatever the server said before it closed the connection.
        return StoreError(
            "The connection to the database broke: the server closed it in the middle of an operation.",
            hint="It may have been shut down or restarted: its log says why.",
        )
    if isinstance(exc, asyncpg.PostgresError):
        sqlstate = exc.sqlstate if re.fullmatch("[0-9A-Z]{5}", exc.sqlstate or "") else None
        ends = sqlstate is not None and sqlstate in ENDS_SESSION
        begin = "The database closed the connection: " if ends else ANSWERED
        return StoreError(
            f"{begin}{_message(exc)} ({sqlstate}).",
            sqlstate=sqlstate,
            constraint=getattr(exc, "constraint_name", None),
            hint=hint(sqlstate),
        )
    return StoreError(f"The connection to the database broke: {outside_text(exc) or type(exc).__name__}")


def _said(exc: Exception) -> Exception:
    """Return the server's own last words, where the driver puts its own about the closed connection before them."""
    cause = exc.__cause__
    is_closed = isinstance(exc, asyncpg.ConnectionDoesNotExistError)
    return cause if is_closed and isinstance(cause, asyncpg.PostgresError) else exc


def _message(exc: asyncpg.PostgresError) -> str:
    """Return what the server said, without its details: these may quote rows."""
    return outside_text(exc.args[0]) if exc.args else type(exc).__name__
