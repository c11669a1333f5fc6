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
from ingestor.stream.judge import Pace, check_token, judge, server_error


def status(code: int, *headers: tuple[str, str]) -> InvalidStatus:
    return InvalidStatus(Response(code, "", Headers(headers)))


def certificate(code: int, text: str) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code, error.verify_message = code, text
    return error


def closed(code: int) -> StreamError:
    return StreamError("closed", reason=EndReason.CLOSED, close_code=code)


TABLE: list[tuple[Exception, Pace]] = [
    # The network.
    (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), Pace.BACKOFF),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), Pace.BACKOFF),
    (OSError(errno.ENETUNREACH, "Network is unreachable"), Pace.BACKOFF),
    (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), Pace.BACKOFF),
    (TimeoutError("timed out during opening handshake"), Pace.BACKOFF),
    (InvalidMessage("did not receive a valid HTTP response"), Pace.BACKOFF),
    # TLS.
    (ssl.SSLError(1, "unexpected eof while reading"), Pace.BACKOFF),
    (ssl.SSLEOFError(8, "EOF occurred in violation of protocol"), Pace.BACKOFF),
    (certificate(9, "certificate is not yet valid"), Pace.BACKOFF),
    (certificate(10, "certificate has expired"), Pace.NEVER),
    (certificate(62, "hostname mismatch"), Pace.NEVER),
    (certificate(18, "self-signed certificate"), Pace.NEVER),
    # The handshake.
    *[(status(code), Pace.BACKOFF) for code in (429, 500, 502, 503, 504)],
    *[(status(code), Pace.NEVER) for code in (200, 301, 302, 307, 308, 400, 401, 403, 404, 426)],
    (InvalidUpgrade("Upgrade", "h2c"), Pace.NEVER),
    (InvalidHandshake("no"), Pace.NEVER),
    (InvalidURI("http://x", "scheme isn't ws or wss"), Pace.NEVER),
    # The server's own words.
    (StreamError("x", reason=EndReason.STREAM_LIMIT), Pace.SLOW),
    (StreamError("x", reason=EndReason.NOT_AUTHORISED), Pace.NEVER),
    (StreamError("x", reason=EndReason.NO_ACCESS), Pace.NEVER),
    (StreamError("x", reason=EndReason.SERVER_ERROR), Pace.BACKOFF),
    # The end of a session.
    *[(closed(code), Pace.BACKOFF) for code in (1000, 1001, 1006, 1008, 1011, 1012, 1013, 4000, 4999)],
    (StreamError("x", reason=EndReason.KEEPALIVE), Pace.BACKOFF),
    (StreamError("x", reason=EndReason.STALL), Pace.BACKOFF),
    (StreamError("x", reason=EndReason.CLOCK_STEP), Pace.BACKOFF),
    (StreamError("x", reason=EndReason.MESSAGE_TOO_BIG), Pace.BACKOFF),
    (StreamError("x", reason=EndReason.PROTOCOL_ERROR), Pace.BACKOFF),
    (StreamError("x", reason=EndReason.BUFFER_FULL), Pace.BACKOFF),
    (StreamError("x", reason=EndReason.AUTHENTICATION_TIMEOUT), Pace.BACKOFF),
    # Ours.
    (ConfigurationError("INGESTOR_TOKEN: a token for this host begins with pk_"), Pace.NEVER),
    (RuntimeError("a bug"), Pace.BACKOFF),
]


@pytest.mark.parametrize(("error", "pace"), TABLE, ids=lambda value: repr(value)[:60])
def test_table(error: Exception, pace: Pace) -> None:
    """What is wrong from the start needs a person; all else is tried again."""
    judgement = judge(error, accepted_before=False, now=0)
    assert judgement.pace is pace
    assert judgement.message
    assert "\n" not in judgement.message


@pytest.mark.parametrize(("error", "pace"), TABLE, ids=lambda value: repr(value)[:60])
def test_accepted_before(error: Exception, pace: Pace) -> None:
    """Where endpoint and token were accepted before, nothing is fatal, and what was is loud."""
    expected = Pace.LOUD if pace is Pace.NEVER else pace
    assert judge(error, accepted_before=True, now=0).pace is expected


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
    """A server can't flood the log with one message."""
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
    """The prefix is judged for Financefeast's own hosts only, and the message does not show the token."""
    if accepted:
        check_token(host, token)
    else:
        with pytest.raises(ConfigurationError) as caught:
            check_token(host, token)
        assert token not in str(caught.value)


@pytest.mark.parametrize("code", [403, 429, 500, 503])
def test_retry_after(code: int) -> None:
    """A refused handshake that is repeated is not repeated before the server wants it; the message says so."""
    judgement = judge(status(code, ("Retry-After", "60")), accepted_before=True, now=0)
    assert judgement.retry_after == 60
    assert "asks to wait for 60 s" in judgement.message
    assert judge(status(code), accepted_before=True, now=0).retry_after == 0
