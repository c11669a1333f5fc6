"""The provider's REST API over HTTP: within its rate limit, with bounds on time and size.

Compressed answers are refused, since a few kilobytes can expand to gigabytes. Each request has its own connection: if
a server answered twice, the second answer would be taken for that of the next request. No cookie is kept.

The library connects to the first address of a name that accepts. If that address then stays silent or breaks the
connection, the next request goes to the next address.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from http import HTTPStatus
from http.cookiejar import CookieJar, DefaultCookiePolicy
from types import TracebackType
from typing import Self, TypeVar
from zoneinfo import ZoneInfo

import httpx
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from ingestor import __version__
from ingestor.backfill.answers import MalformedAnswerError, UnreadableAnswerError, shown
from ingestor.backfill.bars import EXCHANGE, Bars, Question, parse_bars
from ingestor.backfill.limit import RateLimit
from ingestor.backfill.listing import Instruments, parse_instruments
from ingestor.clock import Clock
from ingestor.dial import addresses_of
from ingestor.errors import ConfigurationError, IngestorError
from ingestor.model import Label
from ingestor.network import CERTIFICATE_NOT_YET_VALID, proxy_for, proxy_hint, tls_context
from ingestor.redaction import outside_text, system_words
from ingestor.retry_after import retry_after

TIMEOUT = 30.0
"""Seconds of silence after which a request is retried; a complete answer may take four times as long."""

MAX_ANSWER = 4 * 2**20
"""Bytes: many times a day of one-minute bars or the list of all instruments."""

ATTEMPTS = 5
MAX_RATE_LIMIT_WAITS = 20
"""Resets of the rate limit that one request waits for."""

MAX_ERROR = 200
"""Characters shown of an error of the HTTP library, which may repeat the server's text."""

AUTHENTICATED = "/data/"
"""Paths for which the API checks the token."""

_T = TypeVar("_T")


class SourceError(IngestorError):
    """The provider gave no usable answer, even after retries."""


class UnknownTickerError(IngestorError):
    """The provider does not know this symbol (404)."""


class _TransientError(IngestorError):
    """A failure that is retried."""


class _LimitedError(IngestorError):
    """The rate limit was reached (429): retried after its reset, and not counted as a failure."""


class RestClient:
    """A client of the REST API at `base_url`, used as a context manager. Any number of tasks share its rate limit.

    `on_wait` is called with the seconds for which all tasks wait for a reset.
    """

    def __init__(
        self,
        base_url: str,
        token: str,
        *,
        timezone: str,
        clock: Clock,
        timeout: float = TIMEOUT,
        on_wait: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._zone = ZoneInfo(timezone)
        self._clock = clock
        self._timeout = timeout
        self._limit = RateLimit(clock, on_wait)
        self._failed_addresses = 0
        self.was_accepted = False
        """Whether the server has accepted the token."""
        try:
            if not httpx.URL(base_url).host:
                raise ValueError("it names no host")
            self._proxy = proxy = proxy_for(base_url)
            self._http = httpx.AsyncClient(
                base_url=base_url,
                headers={
                    "Authorization": f"Bearer {token}",
                    "User-Agent": f"ingestor/{__version__}",
                    "Accept-Encoding": "identity",
                    "Connection": "close",
                },
                timeout=timeout,
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
                trust_env=False,  # otherwise a password of .netrc would replace the token
                proxy=proxy and httpx.Proxy(proxy, ssl_context=tls_context() if proxy.startswith("https:") else None),
                verify=tls_context(),
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise ConfigurationError(f"INGESTOR_REST_URL: not a valid URL: {outside_text(error)}") from None

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.__aexit__(kind, error, trace)

    async def validate(self) -> None:
        """Check the token with one request. Raises ConfigurationError if refused, SourceError if unknown."""
        path = "/oauth/validate"
        try:
            await self._ask(path, {})
        except _LimitedError as error:
            raise SourceError(f"{path}: {error.message}") from None
        except _TransientError as error:
            raise SourceError(f"{path}: {error.message}.") from None

    async def instruments(self) -> Instruments:
        """Return the instruments listed on the exchange. Raises SourceError."""
        return await self._get("/info/ticker", {"exchange": EXCHANGE}, parse_instruments)

    async def minutes(self, symbol: str, since: datetime, until: datetime, label: Label) -> Bars:
        """Return a symbol's one-minute bars that begin at or after `since` and before `until`, both whole minutes.

        Wrong records become faults; bars beyond the range are dropped. Raises UnknownTickerError, SourceError (also if
        the answer does not match the request), and ConfigurationError if the token is refused.
        """
        question = Question(symbol, since, until, label, self._zone)
        return await self._get("/data/intraday", question.parameters(), lambda body: parse_bars(body, question))

    async def _get(self, path: str, parameters: dict[str, str], parse: Callable[[bytes], _T]) -> _T:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_TransientError),
            wait=wait_random_exponential(multiplier=0.5, max=15),
            stop=stop_after_attempt(ATTEMPTS),
            sleep=self._clock.sleep,
            reraise=True,
        )
        try:
            return await retrying(self._try, path, parameters, parse)
        except _TransientError as error:
            raise SourceError(f"{path}: {error.message}, {ATTEMPTS} times.") from error

    async def _try(self, path: str, parameters: dict[str, str], parse: Callable[[bytes], _T]) -> _T:
        for _ in range(MAX_RATE_LIMIT_WAITS):
            await self._limit.wait()
            with contextlib.suppress(_LimitedError):
                body = await self._ask(path, parameters)
                break
        else:
            raise SourceError(f"{path}: the rate limit was still reached after {MAX_RATE_LIMIT_WAITS} resets.")
        try:
            return parse(body)
        except UnreadableAnswerError as error:
            raise _TransientError(f"an answer that is not as documented: {error.message}") from error
        except MalformedAnswerError as error:
            raise SourceError(f"{path}: the answer is not what was asked for: it has {error.message}.") from error

    async def _ask(self, path: str, parameters: dict[str, str]) -> bytes:
        """Return the body of an answer, within the bounds of size and time."""
        try:
            async with asyncio.timeout(4 * self._timeout), self._answer(path, parameters) as answer:
                self._limit.note(answer.status_code, answer.headers)
                self._check_status(path, answer)
                body = bytearray()
                async for chunk in answer.aiter_raw():
                    body += chunk
                    if len(body) > MAX_ANSWER:
                        raise SourceError(f"{path}: the answer is larger than {MAX_ANSWER // 2**20} MiB.")
        except TimeoutError:
            raise _TransientError("no complete answer in time") from None
        except httpx.HTTPError as error:
            self._failed_addresses += isinstance(error, httpx.TransportError)
            raise _translated(error) from error
        return bytes(body)

    @contextlib.asynccontextmanager
    async def _answer(self, path: str, parameters: dict[str, str]) -> AsyncIterator[httpx.Response]:
        request = self._http.build_request("GET", path, params=parameters)
        if (address := await self._next_address()) is not None:
            request.extensions["sni_hostname"] = request.url.host  # the name of the certificate, too
            request.url = request.url.copy_with(host=address)  # the header `Host` keeps the name
        answer = await self._http.send(request, stream=True)
        try:
            yield answer
        finally:
            await answer.aclose()

    async def _next_address(self) -> str | None:
        """Return the address to connect to, another one after each failure; None if the library may choose."""
        if not self._failed_addresses or self._proxy is not None:
            return None
        base = self._http.base_url
        try:
            found = await addresses_of(base.host, base.port or 443)
        except OSError:  # the library will say so
            return None
        return found[self._failed_addresses % len(found)] if len(found) > 1 else None

    def _check_status(self, path: str, answer: httpx.Response) -> None:
        """Raise the error of a status, or of a compressed answer."""
        status = answer.status_code
        if status == HTTPStatus.OK:
            self.was_accepted |= path.startswith(AUTHENTICATED)
            encoding = answer.headers.get("content-encoding", "").strip().lower()
            if encoding not in {"", "identity"}:
                raise SourceError(f"{path}: the answer is compressed ({shown(encoding)}), which was not asked for.")
            return
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            seconds = retry_after(answer.headers.get_list("retry-after"), date=None, now=self._clock.wall())
            asks = "" if seconds is None else f" It asks to wait for {seconds:g} s."
            raise _LimitedError(f"The rate limit was reached (429).{asks}")
        if status in {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY} or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise _TransientError(f"the server answered {status}")
        if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            host = self._http.base_url.host
            raise ConfigurationError(
                f"INGESTOR_TOKEN: {host} refused it ({status} at {path}). Check the token and its plan."
            )
        if status == HTTPStatus.NOT_FOUND and path.startswith(AUTHENTICATED):
            raise UnknownTickerError("unknown to the provider (404)")
        raise SourceError(f"{path}: the server answered {status}; is INGESTOR_REST_URL right?")


def _translated(error: httpx.HTTPError) -> IngestorError:
    """Return our error for the library's, which often has no text, or quotes the server."""
    text = outside_text(error, limit=MAX_ERROR)
    if isinstance(error, httpx.ProxyError):
        status = int(text[:3]) if re.match("[0-9]{3} ", text) else 0
        failure = f"answered HTTP {status}" if status else f"failed: {text or type(error).__name__}"
        if hint := proxy_hint(status):
            return ConfigurationError(f"The proxy of the environment {failure}. {hint}")
        return _TransientError(f"the proxy of the environment {failure}")
    cause = _system_error(error)
    if isinstance(cause, ssl.SSLCertVerificationError) and cause.verify_code != CERTIFICATE_NOT_YET_VALID:
        return ConfigurationError(f"INGESTOR_REST_URL: {system_words(cause)}.")
    if isinstance(error, httpx.TimeoutException):
        return _TransientError("no complete answer in time")
    if isinstance(cause, OSError):
        return _TransientError(f"no complete answer ({system_words(cause)})")
    return _TransientError(f"no complete answer ({type(error).__name__}{': ' if text else ''}{text})")


def _system_error(error: BaseException) -> OSError | None:
    """Return the innermost system error behind a library error; of several, the first."""
    found: OSError | None = None
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and (found is None or inner.errno):
            found = inner
        inner = inner.exceptions[0] if isinstance(inner, BaseExceptionGroup) else inner.__cause__ or inner.__context__
    return found
