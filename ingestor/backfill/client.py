"""The provider's REST API over HTTP: within its rate limit, within a time and a size, and not a byte more.

An answer is read as it was sent: compression is refused, since a few kilobytes can unpack to gigabytes. Each request
has a connection of its own, since a server that answers twice would be one answer ahead on the next request. No cookie
is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
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
from ingestor.errors import ConfigurationError, IngestorError
from ingestor.redaction import outside_text
from ingestor.store.ledger import Label

TIMEOUT = 30.0
"""Seconds without a sign of the server, after which a request is done again; a whole answer has four times as long."""

MAX_ANSWER = 4 * 2**20
"""Bytes: many times a day of one-minute bars, or the list of all instruments."""

ATTEMPTS = 5
MAX_RATE_LIMIT_WAITS = 20
"""How often a request waits for the reset of the rate limit."""

MAX_ERROR = 200
"""Characters that are shown of an error of the HTTP library, which may repeat what the server sent."""

AUTHENTICATED = "/data/"
"""Where the API looks at the token."""

_T = TypeVar("_T")


class SourceError(IngestorError):
    """The provider gave no usable answer, though it was asked several times."""


class UnknownTickerError(IngestorError):
    """The provider does not know this symbol (404)."""


class _TransientError(IngestorError):
    """Worth another try."""


class _LimitedError(IngestorError):
    """The rate limit was reached (429): worth another try after its reset, and no sign that anything is wrong."""


class RestClient:
    """The REST API at `base_url`, used while entered. For any number of tasks; all of them wait for its rate limit.

    `on_wait` is told for how many seconds everybody waits now, when that is longer than a moment.
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
        self.was_accepted = False
        """Whether the server has taken the token."""
        try:
            if not httpx.URL(base_url).host:
                raise ValueError("it names no host")
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
                trust_env=False,  # a proxy of the environment, or a .netrc, is nobody we would send the token to
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise ConfigurationError(f"INGESTOR_REST_URL: no address that can be used: {outside_text(error)}") from None

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.__aexit__(kind, error, trace)

    async def instruments(self) -> Instruments:
        """Return what is listed on the exchange. Raises SourceError."""
        return await self._get("/info/ticker", {"exchange": EXCHANGE}, parse_instruments)

    async def minutes(self, symbol: str, since: datetime, until: datetime, label: Label) -> Bars:
        """Return a symbol's one-minute bars that begin at or after `since` and before `until`, both whole minutes.

        Wrong records are among its faults, and bars out of the range are dropped. Raises UnknownTickerError,
        SourceError (also if the answer is not what was asked for), and ConfigurationError if the token is refused.
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
        """Return the body of an answer, of a bounded size and within a bounded time."""
        try:
            async with asyncio.timeout(4 * self._timeout), self._http.stream("GET", path, params=parameters) as answer:
                self._limit.note(answer.status_code, answer.headers)
                self._judge(path, answer)
                body = bytearray()
                async for chunk in answer.aiter_raw():
                    body += chunk
                    if len(body) > MAX_ANSWER:
                        raise SourceError(f"{path}: the answer is larger than {MAX_ANSWER // 2**20} MiB.")
        except TimeoutError:
            raise _TransientError("no complete answer in time") from None
        except httpx.HTTPError as error:
            text = f"{type(error).__name__}: {outside_text(error, limit=MAX_ERROR)}"
            raise _TransientError(f"no complete answer ({text})") from error
        return bytes(body)

    def _judge(self, path: str, answer: httpx.Response) -> None:
        """Raise what a status means, and what headers say that can't be read."""
        status = answer.status_code
        if status == HTTPStatus.OK:
            self.was_accepted |= path.startswith(AUTHENTICATED)
            encoding = answer.headers.get("content-encoding", "").strip().lower()
            if encoding not in {"", "identity"}:
                raise SourceError(f"{path}: the answer is compressed ({shown(encoding)}), which was not asked for.")
            return
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            raise _LimitedError("The rate limit was reached.")
        if status in {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY} or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise _TransientError(f"the server answered {status}")
        if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            raise ConfigurationError(
                f"INGESTOR_TOKEN: {answer.url.host} refused it ({status} at {path}). Check the token and its plan."
            )
        if status == HTTPStatus.NOT_FOUND and path.startswith(AUTHENTICATED):
            raise UnknownTickerError("unknown to the provider (404)")
        raise SourceError(f"{path}: the server answered {status}; is INGESTOR_REST_URL right?")
