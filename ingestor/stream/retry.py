"""Retry policy of the stream: whether and when to connect again. A table in the tests holds it.

A fatal error requires operator action. If the endpoint accepted this token before, the same error is retried every
minute: the fault is then the provider's, and must not stop the recording.
"""

from __future__ import annotations

import random
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from http import HTTPStatus

from tenacity import RetryCallState
from websockets.exceptions import (
    InvalidHandshake,
    InvalidMessage,
    InvalidProxy,
    InvalidProxyStatus,
    InvalidStatus,
    InvalidURI,
    ProxyError,
)

from ingestor.errors import ConfigurationError, StoreError, StreamError, UnreachableError
from ingestor.model import EndReason, Micros
from ingestor.network import CERTIFICATE_NOT_YET_VALID, proxy_hint
from ingestor.redaction import outside_text, system_words
from ingestor.retry_after import MAX_RETRY_AFTER, retry_after
from ingestor.stream.decoder import ServerError


class RetryPolicy(Enum):
    """How soon to try again."""

    BACKOFF = "backoff"  # exponential with full jitter, the first retry within a second
    SLOW = "slow"  # from 15 s on: the server may still count our previous session
    ALERT = "alert"  # every minute, and an error in the log for the operator
    FATAL = "fatal"  # exit 78


@dataclass(frozen=True, slots=True)
class RetryDecision:
    """The policy for one error, with a message on its cause and remedy.

    `retry_after` is the least wait that the server asks for, in seconds.
    """

    policy: RetryPolicy
    message: str
    retry_after: float = 0.0


_FATAL_REASONS = {
    EndReason.NOT_AUTHORISED: "Check INGESTOR_TOKEN, and that it is for the region of INGESTOR_STREAM_URL.",
    EndReason.NO_ACCESS: "The plan behind this token has no stream access: change the plan or the token.",
}


def classify(error: BaseException, *, accepted_before: bool, now: Micros) -> RetryDecision:
    """Return the decision on an error that ended a session, or prevented one, at the instant `now`."""
    policy, message = _classify(error)
    if policy is RetryPolicy.FATAL and accepted_before:
        policy = RetryPolicy.ALERT
        message = f"{message} The server accepted this token before, so ingestor retries every minute."
    seconds = _retry_after(error, now)
    if seconds is None or policy is RetryPolicy.FATAL:
        return RetryDecision(policy, message)
    return RetryDecision(policy, f"{message} It asks to wait for {seconds:g} s.", seconds)


def _retry_after(error: BaseException, now: Micros) -> float | None:
    """Return the seconds of `Retry-After` in a refusal by server or proxy, whatever its status; None without one."""
    if not isinstance(error, InvalidStatus | InvalidProxyStatus):
        return None
    headers = error.response.headers
    return retry_after(headers.get_all("Retry-After"), date=next(iter(headers.get_all("Date")), None), now=now)


def _classify(error: BaseException) -> tuple[RetryPolicy, str]:  # noqa: C901, PLR0911, PLR0912 - a table, a line for each error
    match error:
        case StreamError(reason=EndReason.STREAM_LIMIT):
            return RetryPolicy.SLOW, f"{error} Another stream may use this token, or our last one is still counted."
        case StreamError(reason=reason) if reason in _FATAL_REASONS:
            return RetryPolicy.FATAL, f"{error} {_FATAL_REASONS[reason]}"
        case StreamError():
            return RetryPolicy.BACKOFF, str(error)
        case ConfigurationError():
            return RetryPolicy.FATAL, str(error)
        case StoreError():
            return RetryPolicy.BACKOFF, f"The database, which knows where to go on, does not answer: {error}"
        case InvalidURI() | InvalidProxy():
            return RetryPolicy.FATAL, "INGESTOR_STREAM_URL, or the proxy of the environment, is not a valid URL."
        case InvalidStatus():
            return _classify_status(error.response.status_code)
        case ssl.SSLCertVerificationError() if error.verify_code != CERTIFICATE_NOT_YET_VALID:
            return RetryPolicy.FATAL, f"The server's certificate is not valid: {outside_text(error.verify_message)}."
        case InvalidProxyStatus():
            return _classify_proxy_status(error.response.status_code)
        case ProxyError():
            return RetryPolicy.BACKOFF, f"The proxy of the environment failed: {outside_text(error)}."
        case InvalidMessage():
            return RetryPolicy.BACKOFF, f"The connection was cut during the handshake: {outside_text(error)}."
        case InvalidHandshake():
            return RetryPolicy.FATAL, f"INGESTOR_STREAM_URL is not a WebSocket endpoint: {outside_text(error)}."
        case UnreachableError():
            return RetryPolicy.BACKOFF, f"The server cannot be reached: {error}."
        case TimeoutError():
            return RetryPolicy.BACKOFF, "The server did not answer in time."
        case OSError():
            return RetryPolicy.BACKOFF, f"The server cannot be reached: {system_words(error)}."
        case _:
            return RetryPolicy.BACKOFF, f"The session failed: {type(error).__name__}: {outside_text(error)}"


def cause_of(error: BaseException) -> str:  # noqa: C901, PLR0911 - a table, a line for each error
    """Return the cause of an error as a label for metrics: the session's end reason, or why no session began."""
    match error:
        case StreamError():
            return str(error.reason)
        case ConfigurationError() | InvalidURI() | InvalidProxy():
            return "configuration"
        case StoreError():
            return "database"
        case InvalidStatus():
            return f"http_{error.response.status_code // 100}xx"
        case ssl.SSLCertVerificationError():
            return "certificate"
        case ProxyError():
            return "proxy"
        case InvalidMessage():
            return "handshake_cut"
        case InvalidHandshake():
            return "not_a_websocket"
        case TimeoutError():
            return "timeout"
        case OSError() | UnreachableError():
            return "unreachable"
        case _:
            return str(EndReason.INTERNAL_ERROR)


def _classify_status(status: int) -> tuple[RetryPolicy, str]:
    """Return the policy and message for the HTTP status of a refused handshake."""
    answer = f"The server answered the handshake with HTTP {status}."
    if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
        return RetryPolicy.FATAL, f"{answer} {_FATAL_REASONS[EndReason.NOT_AUTHORISED]}"
    if status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return RetryPolicy.BACKOFF, answer
    if 300 <= status < 400:
        return RetryPolicy.FATAL, f"{answer} Redirects are refused: set INGESTOR_STREAM_URL to the real endpoint."
    return RetryPolicy.FATAL, f"{answer} INGESTOR_STREAM_URL is not a WebSocket endpoint."


def _classify_proxy_status(status: int) -> tuple[RetryPolicy, str]:
    """Return the policy and message for the HTTP status of a proxy."""
    hint = proxy_hint(status)
    policy = RetryPolicy.FATAL if hint else RetryPolicy.BACKOFF
    return policy, f"The proxy of the environment answered HTTP {status}. {hint}".strip()


def server_error(error: ServerError) -> StreamError:
    """Return the error for an error message of the server; the documented ones differ only in their text."""
    text, shown = error.text.lower(), outside_text(error.text, limit=200)
    for reason, words in (
        (EndReason.STREAM_LIMIT, "stream limit"),
        (EndReason.NO_ACCESS, "no access"),
        (EndReason.NOT_AUTHORISED, "not authorised"),
        (EndReason.NOT_AUTHORISED, "not authorized"),
    ):
        if words in text:
            return StreamError(f"The server refused: '{shown}'.", reason=reason)
    return StreamError(f"The server reported an error: '{shown}'.", reason=EndReason.SERVER_ERROR)


def check_token(endpoint_host: str, token: str) -> None:
    """Raise ConfigurationError if the token's prefix is wrong for a Financefeast host."""
    expected = {"stream.financefeast.io": "pk_", "stream.test.financefeast.io": "tk_"}.get(endpoint_host)
    if expected is not None and not token.startswith(expected):
        raise ConfigurationError(
            f"INGESTOR_TOKEN: a token for {endpoint_host} begins with {expected}; this one does not."
        )


ALERT_WAIT = 60.0
SLOW_WAIT = 15.0

RETRY_AFTER_SPREAD = 0.1
"""A random share, up to this, is added to a server's `Retry-After`, so that its clients do not return together."""


class Backoff:
    """A wait strategy for tenacity, with full jitter, so that the clients of a restarted server do not return at once.

    The backoff starts again only after a session of at least `max_delay` seconds: a server that accepts a session and
    closes it must not be contacted every second.
    """

    def __init__(self, decide: Callable[[BaseException], RetryDecision], *, max_delay: float) -> None:
        self._decide = decide
        self._max_delay = max_delay
        self._failures = 0

    def session_ended(self, lived: float) -> None:
        """Record the end of a session that was authenticated for `lived` seconds."""
        if lived >= self._max_delay:
            self._failures = 0

    def __call__(self, state: RetryCallState) -> float:
        """Return the seconds to wait after a failed attempt."""
        assert state.outcome is not None
        error = state.outcome.exception()
        assert error is not None
        decision = self._decide(error)
        self._failures += 1
        requested = decision.retry_after * (1 + _random_up_to(RETRY_AFTER_SPREAD))
        return max(self._seconds(decision.policy), min(requested, MAX_RETRY_AFTER))

    def _seconds(self, policy: RetryPolicy) -> float:
        match policy:
            case RetryPolicy.SLOW:
                return SLOW_WAIT + self._exponential(5.0, 45.0)
            case RetryPolicy.ALERT:
                return ALERT_WAIT + _random_up_to(5.0)
            case _:
                return self._exponential(1.0, self._max_delay)

    def _exponential(self, first: float, most: float) -> float:
        """Return a random wait up to `first` seconds, doubled with each failure, and to `most`."""
        doublings = min(self._failures - 1, 30)  # more would overflow a float, and `most` is reached long before
        return _random_up_to(min(first * 2**doublings, most))


def _random_up_to(bound: float) -> float:
    return random.uniform(0, bound)  # noqa: S311 - a wait, not a secret
