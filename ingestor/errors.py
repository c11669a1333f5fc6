"""The tree of errors. Facts are attributes; `hint` says what an operator can do.

Errors of drivers and libraries are translated where they appear, with ``raise … from exc``. Two
modules decide which are retried: `ingestor.stream.retry` and `ingestor.store.retry`.
"""

from __future__ import annotations

from uuid import UUID

from ingestor.model import EndReason

EXIT_UNAVAILABLE = 69
"""EX_UNAVAILABLE of sysexits.h: the command could not do its work, so neither 0 nor 1 would be an answer."""

EXIT_SOFTWARE = 70
"""EX_SOFTWARE of sysexits.h: a bug; the traceback is on standard error."""

EXIT_CONFIGURATION = 78
"""EX_CONFIG of sysexits.h: an operator must act; a service manager must not restart."""


class IngestorError(Exception):
    """The base of all expected errors. `exit_code` is the status of a command that ends with one."""

    exit_code = EXIT_UNAVAILABLE

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """Return the message and the hint in one line."""
        return f"{self.message} {self.hint}" if self.hint else self.message


class ConfigurationError(IngestorError):
    """The configuration is wrong. `problems` holds one line for each problem to fix."""

    exit_code = EXIT_CONFIGURATION

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class MessagesLostError(IngestorError):
    """The daemon received messages that it could write neither to the database nor to the spool."""

    exit_code = 1


class NoDataError(IngestorError):
    """The database has no data for the request: an answer of commands that show data."""

    exit_code = 1


class OutputError(IngestorError):
    """Standard output accepts no more: its reader is gone, or its disk is full."""


class UnreachableError(IngestorError):
    """None of the addresses of a server answers. The message names them."""


class StreamError(IngestorError):
    """The stream ended or did not begin. `reason` goes into the session's record."""

    def __init__(self, message: str, *, reason: EndReason, close_code: int | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.reason = reason
        self.close_code = close_code


class StoreError(IngestorError):
    """The database did not accept a batch, and may accept it later.

    `sqlstate` and `constraint` (its name) are set if the database reported them. `is_smaller_next`: the next attempt
    sends less, because this one may have been too large.
    """

    is_smaller_next = False

    def __init__(
        self, message: str, *, sqlstate: str | None = None, constraint: str | None = None, hint: str = ""
    ) -> None:
        super().__init__(message, hint=hint)
        self.sqlstate = sqlstate
        self.constraint = constraint


class DatabaseAccessError(StoreError):
    """The database can't be used by this URL: an operator must act on the URL, the login, or a certificate."""

    exit_code = EXIT_CONFIGURATION


class SchemaError(StoreError):
    """The schema is missing, too old, or too new for this daemon."""

    exit_code = EXIT_CONFIGURATION


class PoolerError(DatabaseAccessError):
    """A connection pooler in front of the database makes transactions impossible."""


class BufferUnavailableError(IngestorError):
    """The replicated buffer does not answer, or refuses, and may accept later.

    `is_unserved`: no server leads the stream now, or there is no such stream.
    """

    def __init__(self, message: str, *, hint: str = "", is_unserved: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.is_unserved = is_unserved


class HoleError(IngestorError):
    """Earlier messages of a session are neither in the database nor in what is being written.

    `session` is its id, `last_batch` the number of its last complete batch in the database.
    """

    def __init__(self, session: UUID, last_batch: int) -> None:
        super().__init__(f"Session {session}: messages after batch {last_batch} are missing.")
        self.session = session
        self.last_batch = last_batch


class StandbyError(IngestorError):
    """Another `ingestor write` is the active one."""


class CursorError(IngestorError):
    """A relay cannot go on from a client's cursor: the log of commits no longer has what followed it."""


class EmbeddedServerError(IngestorError):
    """The embedded PostgreSQL could not be found or started."""
