"""Retry or give up: one function for all that can go wrong with the stream, held by a table in the tests.

Fatal means: wrong from the start, so a person must act. Where this endpoint and token were accepted before, the
same signs are the other side's fault, and are retried every minute: a hiccup must not end a recorder.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from enum import Enum
from http import HTTPStatus

from websockets.exceptions import (
    InvalidHandshake,
    InvalidMessage,
    InvalidProxy,
    InvalidProxyStatus,
    InvalidStatus,
    InvalidURI,
    ProxyError,
)

from ingestor.errors import ConfigurationError, StreamError, UnreachableError
from ingestor.model import EndReason, Micros
from ingestor.network import CERTIFICATE_NOT_YET_VALID, proxy_hint
from ingestor.redaction import outside_text, system_words
from ingestor.retry_after import retry_after
from ingestor.stream.decoder import ServerError


class Pace(Enum):
    """How soon to try again."""

    BACKOFF = "backoff"  # exponential with full jitter, the first within a second
    SLOW = "slow"  # from 15 s: our own dead session may still be counted
    LOUD = "loud"  # every minute, with an error in the log: it should work, and a person should know
    NEVER = "never"  # exit 78


@dataclass(frozen=True, slots=True)
class Judgement:
    """What to do, and one line on what happened and what helps.

    `retry_after` is for how many seconds at least the server asks not to be tried again.
    """

    pace: Pace
    message: str
    retry_after: float = 0.0


_FATAL_REASONS = {
    EndReason.NOT_AUTHORISED: "Check INGESTOR_TOKEN, and that it is for the region of INGESTOR_STREAM_URL.",
    EndReason.NO_ACCESS: "The plan behind this token has no stream access: change the plan or the token.",
}


def judge(error: BaseException, *, accepted_before: bool, now: Micros) -> Judgement:
    """Return what to do about the end of a session, or about one that could not begin, at the time `now`."""
    pace, message = _judge(error)
    if pace is Pace.NEVER and accepted_before:
        pace, message = Pace.LOUD, f"{message} It was accepted before, so it is tried again every minute."
    seconds = _retry_after(error, now)
    if seconds is None or pace is Pace.NEVER:
        return Judgement(pace, message)
    return Judgement(pace, f"{message} It asks to wait for {seconds:g} s.", seconds)


def _retry_after(error: BaseException, now: Micros) -> float | None:
    """Return for how many seconds a refused handshake asks not to be repeated, whatever its status is."""
    if not isinstance(error, InvalidStatus):
        return None
    headers = error.response.headers
    return retry_after(headers.get_all("Retry-After"), date=next(iter(headers.get_all("Date")), None), now=now)


def _judge(error: BaseException) -> tuple[Pace, str]:  # noqa: C901, PLR0911, PLR0912 - a table, one line a sign
    match error:
        case StreamError(reason=EndReason.STREAM_LIMIT):
            return Pace.SLOW, f"{error} Another stream may use this token, or ours is still counted."
        case StreamError(reason=reason) if reason in _FATAL_REASONS:
            return Pace.NEVER, f"{error} {_FATAL_REASONS[reason]}"
        case StreamError():
            return Pace.BACKOFF, str(error)
        case ConfigurationError():
            return Pace.NEVER, str(error)
        case InvalidURI() | InvalidProxy():
            return Pace.NEVER, "INGESTOR_STREAM_URL or the proxy of the environment is no address that can be used."
        case InvalidStatus():
            return _judge_status(error.response.status_code)
        case ssl.SSLCertVerificationError() if error.verify_code != CERTIFICATE_NOT_YET_VALID:
            return Pace.NEVER, f"The server's certificate is not valid: {outside_text(error.verify_message)}."
        case InvalidProxyStatus():
            return _judge_proxy(error.response.status_code)
        case ProxyError():
            return Pace.BACKOFF, f"The proxy of the environment failed: {outside_text(error)}."
        case InvalidMessage():
            return Pace.BACKOFF, f"The connection was cut during the handshake: {outside_text(error)}."
        case InvalidHandshake():
            return Pace.NEVER, f"INGESTOR_STREAM_URL is not a WebSocket endpoint: {outside_text(error)}."
        case UnreachableError():
            return Pace.BACKOFF, f"The server cannot be reached: {error}."
        case TimeoutError():
            return Pace.BACKOFF, "The server did not answer in time."
        case OSError():
            return Pace.BACKOFF, f"The server cannot be reached: {system_words(error)}."
        case _:
            return Pace.BACKOFF, f"The session failed: {type(error).__name__}: {outside_text(error)}"


def cause_of(error: BaseException) -> str:  # noqa: PLR0911 - a table, one line a sign
    """Return a name for what `judge` judges, for metrics: the reason of a session's end, or why none began."""
    match error:
        case StreamError():
            return str(error.reason)
        case ConfigurationError() | InvalidURI() | InvalidProxy():
            return "configuration"
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


def _judge_status(status: int) -> tuple[Pace, str]:
    """Judge the HTTP status of a refused handshake."""
    answer = f"The server answered the handshake with HTTP {status}."
    if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
        return Pace.NEVER, f"{answer} {_FATAL_REASONS[EndReason.NOT_AUTHORISED]}"
    if status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return Pace.BACKOFF, answer
    if 300 <= status < 400:
        return Pace.NEVER, f"{answer} Redirects are refused: set INGESTOR_STREAM_URL to the real endpoint."
    return Pace.NEVER, f"{answer} INGESTOR_STREAM_URL is not a WebSocket endpoint."


def _judge_proxy(status: int) -> tuple[Pace, str]:
    """Judge the HTTP status with which a proxy refused to connect."""
    hint = proxy_hint(status)
    return (
        Pace.NEVER if hint else Pace.BACKOFF
    ), f"The proxy of the environment answered HTTP {status}. {hint}".strip()


def server_error(error: ServerError) -> StreamError:
    """Return the error behind a message of the server; the documented ones differ only in their text."""
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
    """Raise ConfigurationError where the token's prefix can't be right for a Financefeast host."""
    expected = {"stream.financefeast.io": "pk_", "stream.test.financefeast.io": "tk_"}.get(endpoint_host)
    if expected is not None and not token.startswith(expected):
        raise ConfigurationError(
            f"INGESTOR_TOKEN: a token for {endpoint_host} begins with {expected}, and this one does not."
        )
