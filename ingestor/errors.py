"""The tree of errors. Facts are attributes; `hint` says what a person can do about it.

Errors of drivers and libraries are translated where they appear, with ``raise … from exc``. Which of them
are worth another try is decided in two places only: `ingestor.stream.retry` and `ingestor.store.retry`.
"""

from __future__ import annotations

from ingestor.model import EndReason

EXIT_UNAVAILABLE = 69
"""EX_UNAVAILABLE of sysexits.h: the command could not do its work, so its own status 0 or 1 would be no answer."""

EXIT_SOFTWARE = 70
"""EX_SOFTWARE of sysexits.h: a bug; the traceback is on standard error."""

EXIT_CONFIGURATION = 78
"""EX_CONFIG of sysexits.h: an operator must act; a service manager must not restart."""


class IngestorError(Exception):
    """Everything this package raises on purpose. `exit_code` is the status of a command that ends with it."""

    exit_code = EXIT_UNAVAILABLE

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """Return the message and the hint in one line."""
        return f"{self.message} {self.hint}" if self.hint else self.message


class ConfigurationError(IngestorError):
    """Something was wrong from the start. `problems` holds one line for each thing to mend."""

    exit_code = EXIT_CONFIGURATION

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class MessagesLostError(IngestorError):
    """The daemon received messages that it could write neither to the database nor to the spool."""

    exit_code = 1


class NoDataError(IngestorError):
    """Nothing is on record of what was asked for. The answer of a command that shows data."""

    exit_code = 1


class OutputError(IngestorError):
    """Standard output accepts no more: its reader is gone, or its disk is full."""


class UnreachableError(IngestorError):
    """None of the addresses of a server answers. The message names them."""


class StreamError(IngestorError):
    """The stream ended, or never began. `reason` is what the session's record will say."""

    def __init__(self, message: str, *, reason: EndReason, close_code: int | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.reason = reason
        self.close_code = close_code


class StoreError(IngestorError):
    """The database did not take a batch, and may take it later.

    `sqlstate` and the name of the `constraint` where it said one. `is_smaller_next` tells that the next try sends less,
    since this one may have been too much.
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
    """The database has no schema of ours, an older one, or one that asks for a newer daemon."""

    exit_code = EXIT_CONFIGURATION


class PoolerError(DatabaseAccessError):
    """A connection pooler stands before the database, in a way that no transaction can work through."""


class EmbeddedServerError(IngestorError):
    """The embedded PostgreSQL could not be found or started."""
