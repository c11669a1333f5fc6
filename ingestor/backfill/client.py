"""The provider's REST API: bars and instruments, within its rate limit, whatever it answers."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from types import TracebackType
from typing import Self, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

import httpx
import msgspec
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from ingestor import __version__
from ingestor.clock import Clock
from ingestor.errors import ConfigurationError, IngestorError
from ingestor.model import SECOND
from ingestor.store.ledger import Label, Listing, MinuteBar

EXCHANGE = "nzx"
TIMEOUT = 30.0
"""Seconds without a sign of the server, after which a request is done again."""

MAX_ANSWER = 32 * 2**20
"""Bytes: many times a day of one-minute bars, or the list of all instruments."""

ATTEMPTS = 5
MOST_LIMITS = 20
"""How often a request waits for the reset of the rate limit."""

UNSAID = 10.0
"""Seconds to wait where the server does not say when its limit is reset."""

LONGEST_WAIT = 3600.0
"""Seconds: no reset of a rate limit is further away."""

EPOCH = 1_000_000_000
"""A reset above this is a moment (since 1970, in seconds or milliseconds), below it a number of seconds: which of
them the documentation does not say."""

MINUTE = timedelta(minutes=1)

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


class _Bar(msgspec.Struct):
    timestamp: str
    open: float
    high: float
    low: float
    close: float
    volume: float


class _Bars(msgspec.Struct):
    data: list[_Bar]
    hits: int | None = None
    interval: str | None = None
    ticker: str | None = None


class _Instrument(msgspec.Struct):
    symbol: str
    company_name: str | None = None
    industry: str | None = None
    uuid4: str | None = None
    active: bool | None = None


class _Instruments(msgspec.Struct):
    data: list[msgspec.Raw]
    hits: int | None = None


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
        self._on_wait = on_wait
        self._timeout = timeout
        self._resume_at = -math.inf
        self.was_accepted = False
        """Whether the server has taken the token."""
        try:
            if not httpx.URL(base_url).host:
                raise ValueError("it names no host")
            self._http = httpx.AsyncClient(
                base_url=base_url,
                headers={"Authorization": f"Bearer {token}", "User-Agent": f"ingestor/{__version__}"},
                timeout=timeout,
                trust_env=False,  # a proxy of the environment, or a .netrc, is nobody we would send the token to
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise ConfigurationError(f"INGESTOR_REST_URL: no address that can be used: {error}") from None

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.__aexit__(kind, error, trace)

    async def instruments(self) -> list[Listing]:
        """Return what is listed on the exchange. Raises SourceError."""
        answer = await self._get("/info/ticker", {"exchange": EXCHANGE}, _Instruments)
        if answer.hits not in {None, len(answer.data)}:
            raise _malformed(f"{answer.hits} hits and {len(answer.data)} instruments", "/info/ticker")
        return [listing for raw in answer.data if (listing := _listing(raw)) is not None]

    async def minutes(self, symbol: str, since: datetime, until: datetime, label: Label) -> list[MinuteBar]:
        """Return a symbol's one-minute bars that begin at or after `since` and before `until`, both whole minutes.

        Whatever else the server sends is dropped. Raises UnknownTickerError, SourceError, and ConfigurationError where
        the token is refused.
        """
        shift = MINUTE if label == "end" else timedelta()
        first, last = since + shift, until + shift
        parameters = {
            "ticker": symbol,
            "exchange": EXCHANGE,
            "datetime_from": self._wall_time(first),
            "datetime_to": self._wall_time(last, latest=True),
            "interval": "1m",
        }
        answer = await self._get("/data/intraday", parameters, _Bars)
        if answer.hits not in {None, len(answer.data)}:
            raise _malformed(f"{answer.hits} hits and {len(answer.data)} bars")
        if answer.interval not in {None, "1m"}:
            raise _malformed(f"the interval {answer.interval[:10]!r}")
        if answer.ticker is not None and _stem(answer.ticker) != _stem(symbol):
            raise _malformed(f"the ticker {answer.ticker[:20]!r}")
        bars: dict[datetime, MinuteBar] = {}
        previous = datetime.min.replace(tzinfo=UTC)
        for record in answer.data:
            previous = self._instant(record.timestamp, previous, first)
            if first <= previous < last:
                bars[previous - shift] = _bar(record, previous - shift)
        return list(bars.values())

    async def _get(self, path: str, parameters: dict[str, str], kind: type[_T]) -> _T:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_TransientError),
            wait=wait_random_exponential(multiplier=0.5, max=15),
            stop=stop_after_attempt(ATTEMPTS),
            sleep=self._clock.sleep,
            reraise=True,
        )
        try:
            return await retrying(self._try, path, parameters, kind)
        except _TransientError as error:
            raise SourceError(f"{path}: {error.message}, {ATTEMPTS} times.") from error

    async def _try(self, path: str, parameters: dict[str, str], kind: type[_T]) -> _T:
        for _ in range(MOST_LIMITS):
            await self._wait_for_the_limit()
            with contextlib.suppress(_LimitedError):
                return await self._ask(path, parameters, kind)
        raise SourceError(f"{path}: the rate limit was still reached after {MOST_LIMITS} resets.")

    async def _ask(self, path: str, parameters: dict[str, str], kind: type[_T]) -> _T:
        try:
            async with asyncio.timeout(4 * self._timeout), self._http.stream("GET", path, params=parameters) as answer:
                self._note_limit(answer)
                self._judge(path, answer)
                body = bytearray()
                async for chunk in answer.aiter_bytes():
                    body += chunk
                    if len(body) > MAX_ANSWER:
                        raise SourceError(f"{path}: the answer is larger than {MAX_ANSWER // 2**20} MiB.")
        except TimeoutError:
            raise _TransientError("no complete answer in time") from None
        except httpx.HTTPError as error:
            raise _TransientError(f"no complete answer ({type(error).__name__}: {error})") from error
        try:
            return msgspec.json.decode(bytes(body), type=kind, strict=False)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise _TransientError(f"an answer that is not as documented ({error})") from error

    def _judge(self, path: str, answer: httpx.Response) -> None:
        """Raise what a status means."""
        status = answer.status_code
        if status == HTTPStatus.OK:
            self.was_accepted |= path.startswith(AUTHENTICATED)
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

    def _note_limit(self, answer: httpx.Response) -> None:
        """Let everybody wait for the reset, where nothing is left, or where the server says so."""
        left = _number(answer.headers.get("x-ratelimit-remaining"))
        if answer.status_code != HTTPStatus.TOO_MANY_REQUESTS and (left is None or left > 0):
            return
        reset = _number(answer.headers.get("x-ratelimit-reset"))
        if reset is None:
            reset = _number(answer.headers.get("retry-after"))
        if reset is None:
            reset = UNSAID
        if reset > 1000 * EPOCH:
            reset /= 1000
        seconds = reset - self._clock.wall() / SECOND if reset > EPOCH else reset
        resume_at = self._clock.monotonic() + min(max(seconds, 1.0), LONGEST_WAIT)
        self._resume_at = max(self._resume_at, resume_at)

    async def _wait_for_the_limit(self) -> None:
        while (seconds := self._resume_at - self._clock.monotonic()) > 0:
            self._on_wait(seconds)
            await self._clock.sleep(seconds)

    def _wall_time(self, moment: datetime, *, latest: bool = False) -> str:
        """Return a moment as the API wants it: the exchange's wall time.

        Of an hour that comes twice it does not say which is meant. So the `latest` end of a range is given as an hour
        later then, and what is too much of the answer is dropped.
        """
        local = moment.astimezone(self._zone)
        if latest and local.replace(fold=0).utcoffset() != local.replace(fold=1).utcoffset():
            local += timedelta(hours=1)
        return f"{local:%Y-%m-%d %H:%M:%S}"

    def _instant(self, text: str, previous: datetime, first: datetime) -> datetime:
        """Read a timestamp: with its offset, or as the exchange's wall time, of an hour that comes twice in order."""
        try:
            moment = datetime.fromisoformat(text)
            if moment.tzinfo is not None:
                return moment.astimezone(UTC)
            early, late = (moment.replace(tzinfo=self._zone, fold=fold).astimezone(UTC) for fold in (0, 1))
        except (ValueError, OverflowError):
            raise _malformed(f"a timestamp {text[:40]!r}") from None
        return late if early <= previous or early < first <= late else early


def _bar(record: _Bar, start: datetime) -> MinuteBar:
    prices = (record.open, record.high, record.low, record.close)
    if not all(map(math.isfinite, (*prices, record.volume))):
        raise _malformed("a number that is not finite")
    if start.second or start.microsecond:
        raise _malformed(f"a bar that begins at {start:%H:%M:%S.%f}")
    volume = int(record.volume)
    if volume != record.volume or not 0 <= volume < 2**63:
        raise _malformed(f"a volume of {record.volume!r}")
    return MinuteBar(start, *prices, volume)


def _malformed(what: str, path: str = "/data/intraday") -> SourceError:
    return SourceError(f"{path}: the answer is not as documented: it has {what}.")


def _stem(ticker: str) -> str:
    """Return a ticker without its suffix and its case: whether the API repeats both is not documented."""
    return ticker.partition(".")[0].upper()


def _listing(raw: msgspec.Raw) -> Listing | None:
    """Return an instrument; None where the record is none: one that is bad must not spoil the others."""
    try:
        each = msgspec.json.decode(raw, type=_Instrument)
    except msgspec.MsgspecError:
        return None
    if not each.symbol or "\0" in each.symbol:
        return None
    name, industry = (text and text.replace("\0", "") for text in (each.company_name, each.industry))
    return Listing(each.symbol, name, industry, _uuid(each.uuid4), each.active is not False)


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _uuid(text: str | None) -> UUID | None:
    try:
        return UUID(text or "")
    except ValueError:
        return None
