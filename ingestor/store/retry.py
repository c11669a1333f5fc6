"""Retry policy of the database. A table in the tests holds it.

The default is to retry indefinitely: a daemon that receives ticks keeps them.
"""

from __future__ import annotations

from enum import Enum

from ingestor.errors import DatabaseAccessError, SchemaError, StoreError


class RetryAction(Enum):
    """The next action of the store or its caller."""

    RETRY = "retry"  # again, soon: the server restarts, the network failed, or the cause is unknown
    RETRY_AT_ONCE = "retry_at_once"  # again, now: another transaction was in the way, and nothing is wrong
    RETRY_SLOWLY = "retry_slowly"  # again, every few seconds: requires operator action
    RECONNECT = "reconnect"  # again, on another connection: this server is a standby
    USE_STAGING = "use_staging"  # again, through the temporary table: a row is there already
    MAKE_PARTITION = "make_partition"  # again, once the month has its partition
    QUARANTINE = "quarantine"  # again, without the row that is at fault


MIGRATE = "Run `ingestor migrate`."
UPDATE = "psql -X, and as its first command ALTER EXTENSION timescaledb UPDATE"

_SLOW_HINTS = {
    "28": "The server refuses this user: check the user, the password and pg_hba.conf.",
    "3D000": "The database does not exist: create it, then run `ingestor migrate`.",
    "42501": "The role lacks a privilege: GRANT market_write TO it (see `ingestor migrate --help`).",
    "42P01": MIGRATE,
    "42703": MIGRATE,
    "42883": MIGRATE,
    "3F000": MIGRATE,
}
_HINTS = {
    "25006": "Name the primary in the database URL too.",
    "58P01": f"A library of the server is missing. After an upgrade of TimescaleDB's package: {UPDATE}.",
    "53100": "The server's disk is full: make room on it.",
    "57P01": "The server was shut down or restarted, or an administrator ended this session: its log says which.",
    "57P02": "Another process of the server crashed or was killed: the server's log says why.",
    "53300": "The server has no connection left: raise max_connections, or end other clients.",
}

ENDS_SESSION = frozenset({"25P03", "25P04", "57P01", "57P02", "57P05"})
"""With these the server ends the session: limits of time, a shutdown, an administrator, another process's crash."""

ROW_FAULTS = frozenset(
    {
        "22003",  # numeric value out of range
        "22007",  # invalid datetime format
        "22008",  # datetime field overflow
        "22021",  # character not in repertoire
        "22P05",  # untranslatable character
        "23502",  # not-null violation
        "23514",  # check violation: with a constraint's name, for without one it is a missing partition
    }
)
"""The codes that only a row can cause. With every other code the batch is kept as it is, and tried again."""


_CONFIGURATION = frozenset(
    {
        "3D000",  # no such database
        "42501",  # no CONNECT on it, or no right to a setting of `options`
        "42704",  # an unknown setting in `options`
        "42601",  # `options` that can't be read
        "22023",  # a wrong value in `options`
        "55P02",  # a setting that a client cannot change
    }
)
_POOLER = ("unsupported startup parameter", "no such database", "no such user", "password authentication failed")
"""A pooler's words for the same; its code, 08P01, stands for everything."""


def needs_operator(sqlstate: str | None, message: str) -> bool:
    """Whether a refusal of a connection stays until an operator acts: on the URL, the login or the server's rights."""
    if sqlstate == "08P01":
        return message.startswith(_POOLER)
    return sqlstate is not None and (sqlstate in _CONFIGURATION or sqlstate.startswith("28"))


SIZE_FAULTS = frozenset(
    {
        "25P03",  # idle-in-transaction session timeout: on a slow link, the server waits for us
        "25P04",  # transaction timeout
        "53000",  # insufficient resources
        "53200",  # out of memory, locks included
        "53400",  # configuration limit exceeded
        "57014",  # query cancelled, by a statement timeout most likely
        "57P01",  # terminated by an administrator, or by a watchdog for long transactions
        "57P02",  # another process of the server crashed, or was killed for its memory
        "57P05",  # idle session timeout
    }
)
_SIZE_CLASSES = ("08", "54")  # connection exceptions, which poolers send for their limits; program limits exceeded


def may_be_too_large(error: StoreError) -> bool:
    """Return whether a smaller transaction may succeed where this one failed. If it does not, trying it did no harm.

    Without an SQLSTATE the server was given up, or the connection broke in the middle of the transaction.
    """
    state = error.sqlstate
    return state is None or state in SIZE_FAULTS or state[:2] in _SIZE_CLASSES


def hint(sqlstate: str | None) -> str:
    """Return what a person can do about an SQLSTATE, or nothing."""
    return _slow_hint(sqlstate) or _HINTS.get(sqlstate or "", "")


def _slow_hint(sqlstate: str | None) -> str:
    if sqlstate is None:
        return ""
    return _SLOW_HINTS.get(sqlstate) or _SLOW_HINTS.get(sqlstate[:2], "")


def classify(error: StoreError) -> RetryAction:  # noqa: PLR0911 - a table
    """Return the remedy for what a write, or an attempt to connect, failed with.

    SQLSTATEs are listed at https://www.postgresql.org/docs/current/errcodes-appendix.html.
    """
    if isinstance(error, SchemaError | DatabaseAccessError):
        return RetryAction.RETRY_SLOWLY
    match error.sqlstate:
        case "40001" | "40P01":  # serialization failure, deadlock
            return RetryAction.RETRY_AT_ONCE
        case "23505":
            return RetryAction.USE_STAGING
        case "23514" if error.constraint is None:  # "no partition of relation found for row" names none
            return RetryAction.MAKE_PARTITION
        case "25006":
            return RetryAction.RECONNECT
        case state if state in ROW_FAULTS:
            return RetryAction.QUARANTINE
        case state if _slow_hint(state):
            return RetryAction.RETRY_SLOWLY
        case _:
            return RetryAction.RETRY
