"""What to do about an error of the database: one function, held by a table in the tests.

The default is to try again, for ever: a daemon with a good stream keeps the ticks rather than judge or exit.
"""

from __future__ import annotations

from enum import Enum

from ingestor.errors import SchemaError, StoreError


class Remedy(Enum):
    """What the store or its caller does next."""

    RETRY = "retry"  # again, soon: the server restarts, the network failed, or nobody knows
    RETRY_SLOWLY = "retry_slowly"  # again, every few seconds: a person must act first
    STAGED = "staged"  # again, through the temporary table: a row is there already
    MAKE_PARTITION = "make_partition"  # again, once the month has its partition


MIGRATE = "Run `ingestor migrate`."

_HINTS = {
    "28": "The server refuses this user: check the user, the password and pg_hba.conf.",
    "3D000": "The database does not exist: create it, then run `ingestor migrate`.",
    "42501": "The role lacks a privilege: GRANT market_write TO it (see `ingestor migrate --help`).",
    "42P01": MIGRATE,
    "42703": MIGRATE,
    "42883": MIGRATE,
    "3F000": MIGRATE,
}


def hint(sqlstate: str | None) -> str:
    """Return what a person can do about an SQLSTATE, or nothing."""
    if sqlstate is None:
        return ""
    return _HINTS.get(sqlstate) or _HINTS.get(sqlstate[:2], "")


def judge(error: StoreError) -> Remedy:
    """Return the remedy for what a write, or an attempt to connect, failed with.

    SQLSTATEs are listed at https://www.postgresql.org/docs/current/errcodes-appendix.html.
    """
    if isinstance(error, SchemaError):
        return Remedy.RETRY_SLOWLY
    match error.sqlstate:
        case "23505":
            return Remedy.STAGED
        case "23514" if error.constraint is None:  # "no partition of relation found for row" names none
            return Remedy.MAKE_PARTITION
        case state if hint(state):
            return Remedy.RETRY_SLOWLY
        case _:
            return Remedy.RETRY
