from __future__ import annotations

import errno
import socket
import ssl

import pytest
from websockets.datastructures import Headers
from websockets.exceptions import InvalidHandshake, InvalidMessage, InvalidStatus, InvalidUpgrade, InvalidURI
from websockets.http11 import Response

from ingestor.errors import ConfigurationError, StreamError
from ingestor.model import EndReason
from ingestor.stream.decoder import ServerError
from ingestor.stream.retry import RetryPolicy, check_token, classify, server_error


def status(code: int, *headers: tuple[str, str]) -> InvalidStatus:
    return InvalidStatus(Response(code, "", Headers(headers)))


def certificate(code: int, text: str) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code, error.verify_message = code, text
    return error


def closed(code: int) -> StreamError:
    return StreamError("closed", reason=EndReason.CLOSED, close_code=code)


TABLE: list[tuple[Exception, RetryPolicy]] = [
    # The network.
    (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), RetryPolicy.BACKOFF),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), RetryPolicy.BACKOFF),
    (OSError(errno.ENETUNREACH, "Network is unreachable"), RetryPolicy.BACKOFF),
    (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), RetryPolicy.BACKOFF),
    (TimeoutError("timed out during opening handshake"), RetryPolicy.BACKOFF),
    (InvalidMessage("did not receive a valid HTTP response"), RetryPolicy.BACKOFF),
    # TLS.
    (ssl.SSLError(1, "unexpected eof while reading"), RetryPolicy.BACKOFF),
    (ssl.SSLEOFError(8, "EOF occurred in violation of protocol"), RetryPolicy.BACKOFF),
    (certificate(9, "certificate is not yet valid"), RetryPolicy.BACKOFF),
    (certificate(10, "certificate has expired"), RetryPolicy.FATAL),
    (certificate(62, "hostname mismatch"), RetryPolicy.FATAL),
    (certificate(18, "self-signed certificate"), RetryPolicy.FATAL),
    # The handshake.
    *[(status(code), RetryPolicy.BACKOFF) for code in (429, 500, 502, 503, 504)],
    *[(status(code), RetryPolicy.FATAL) for code in (200, 301, 302, 307, 308, 400, 401, 403, 404, 426)],
    (InvalidUpgrade("Upgrade", "h2c"), RetryPolicy.FATAL),
    (InvalidHandshake("no"), RetryPolicy.FATAL),
    (InvalidURI("http://x", "scheme isn't ws or wss"), RetryPolicy.FATAL),
    # Errors that the server sends.
    (StreamError("x", reason=EndReason.STREAM_LIMIT), RetryPolicy.SLOW),
    (StreamError("x", reason=EndReason.NOT_AUTHORISED), RetryPolicy.FATAL),
    (StreamError("x", reason=EndReason.NO_ACCESS), RetryPolicy.FATAL),
    (StreamError("x", reason=EndReason.SERVER_ERROR), RetryPolicy.BACKOFF),
    # The end of a session.
    *[(closed(code), RetryPolicy.BACKOFF) for code in (1000, 1001, 1006, 1008, 1011, 1012, 1013, 4000, 4999)],
    (StreamError("x", reason=EndReason.KEEPALIVE), RetryPolicy.BACKOFF),
    (StreamError("x", reason=EndReason.STALL), RetryPolicy.BACKOFF),
    (StreamError("x", reason=EndReason.CLOCK_STEP), RetryPolicy.BACKOFF),
    (StreamError("x", reason=EndReason.MESSAGE_TOO_BIG), RetryPolicy.BACKOFF),
    (StreamError("x", reason=EndReason.PROTOCOL_ERROR), RetryPolicy.BACKOFF),
    (StreamError("x", reason=EndReason.BUFFER_FULL), RetryPolicy.BACKOFF),
    (StreamError("x", reason=EndReason.AUTHENTICATION_TIMEOUT), RetryPolicy.BACKOFF),
    # Errors of ours.
    (ConfigurationError("INGESTOR_TOKEN: a token for this host begins with pk_"), RetryPolicy.FATAL),
    (RuntimeError("a bug"), RetryPolicy.BACKOFF),
]


@pytest.mark.parametrize(("error", "policy"), TABLE, ids=lambda value: repr(value)[:60])
def test_table(error: Exception, policy: RetryPolicy) -> None:
    """An error that was there from the start requires operator action; all others are retried."""
    decision = classify(error, accepted_before=False, now=0)
    assert decision.policy is policy
    assert decision.message
    assert "\n" not in decision.message


@pytest.mark.parametrize(("error", "policy"), TABLE, ids=lambda value: repr(value)[:60])
def test_accepted_before(error: Exception, policy: RetryPolicy) -> None:
    """If endpoint and token were accepted before, no error is fatal, and a fatal one becomes an alert."""
    expected = RetryPolicy.ALERT if policy is RetryPolicy.FATAL else policy
    assert classify(error, accepted_before=True, now=0).policy is expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("You are not authorised to use this stream", EndReason.NOT_AUTHORISED),
        ("Not Authorized", EndReason.NOT_AUTHORISED),
        ("Your plan has no access to streams", EndReason.NO_ACCESS),
        ("Stream limit of 1 reached", EndReason.STREAM_LIMIT),
        ("Maintenance", EndReason.SERVER_ERROR),
        ("", EndReason.SERVER_ERROR),
    ],
)
def test_server_errors(text: str, reason: EndReason) -> None:
    """The documented errors differ only in their text."""
    assert server_error(ServerError(text)).reason is reason


def test_a_long_error_is_cut() -> None:
    """A server can't flood the log by one message."""
    assert len(str(server_error(ServerError("x" * 100_000)))) < 300


@pytest.mark.parametrize(
    ("host", "token", "accepted"),
    [
        ("stream.financefeast.io", "pk_1", True),
        ("stream.financefeast.io", "tk_1", False),
        ("stream.test.financefeast.io", "tk_1", True),
        ("stream.test.financefeast.io", "pk_1", False),
        ("localhost", "anything", True),
    ],
)
def test_token_prefix(host: str, token: str, accepted: bool) -> None:
    """The prefix is checked for Financefeast's own hosts only, and the message does not show the token."""
    if accepted:
        check_token(host, token)
    else:
        with pytest.raises(ConfigurationError) as caught:
            check_token(host, token)
        assert token not in str(caught.value)


@pytest.mark.parametrize("code", [403, 429, 500, 503])
def test_retry_after(code: int) -> None:
    """A refused handshake is retried after the server's time, which the message names."""
    decision = classify(status(code, ("Retry-After", "60")), accepted_before=True, now=0)
    assert decision.retry_after == 60
    assert "asks to wait for 60 s" in decision.message
    assert classify(status(code), accepted_before=True, now=0).retry_after == 0
