"""The simulated REST API: a request in, an answer out. No I/O."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl, urlsplit
from zoneinfo import ZoneInfo

from ingestor.clock import from_datetime, to_datetime
from ingestor.model import SECOND, Duration, Micros
from ingestor.protocol.messages import wall_time
from ingestor.simulator.bars import MINUTE_MICROS, Bar, Bars
from ingestor.simulator.market import Instrument, listing

EXCHANGE = "nzx"
INTERVALS = ("1m", "1h", "1d")
RATE_WINDOW: Duration = 60 * SECOND


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: status, headers and a JSON body."""

    status: HTTPStatus
    body: dict[str, Any]
    headers: dict[str, str]


class RefusedError(Exception):
    """A refused request."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class RestApi:
    """Answers as the provider documents it, with bars of the streamed ticks.

    `limit` is the number of requests a minute; the headers of each answer have the rest.
    """

    def __init__(self, bars: Bars, *, token: str, timezone: ZoneInfo, now: Callable[[], Micros], limit: int) -> None:
        self._bars = bars
        self._token = token
        self._timezone = timezone
        self._now = now
        self._limit = limit
        self._window_end: Micros = 0
        self._used = 0
        instruments = listing()
        self._by_key = {key.lower(): each for each in instruments for key in (each.symbol, each.uuid4)}
        self._instruments = instruments
        self._open: dict[str, Callable[[dict[str, str]], dict[str, Any]]] = {
            "/health/alive": lambda _: {"status": "alive"},
            "/info/ticker": self._tickers,
            "/info/exchange/status": self._status,
        }
        self._closed: dict[str, Callable[[dict[str, str]], dict[str, Any]]] = {
            "/oauth/validate": lambda _: {"valid": True},
            "/data/intraday": self._intraday,
            "/data/eod": self._end_of_day,
            "/data/last": self._last,
        }

    def answer(self, target: str, authorization: str | None) -> Answer:
        """Return the answer to a GET of `target` (path and query) with an Authorization header."""
        parts = urlsplit(target)
        headers = self._count()
        try:
            if self._used > self._limit:
                raise RefusedError(HTTPStatus.TOO_MANY_REQUESTS, "rate limit exceeded")
            handler = self._open.get(parts.path)
            if handler is None:
                handler = self._closed.get(parts.path)
                if handler is not None and authorization != f"Bearer {self._token}":
                    raise RefusedError(HTTPStatus.FORBIDDEN, "not authorised")
            if handler is None:
                raise RefusedError(HTTPStatus.NOT_FOUND, f"no such endpoint: {parts.path}")
            body = handler(dict(parse_qsl(parts.query)))
        except RefusedError as refused:
            return Answer(refused.status, {"message": refused.message}, headers)
        return Answer(HTTPStatus.OK, body, headers)

    def _count(self) -> dict[str, str]:
        now = self._now()
        if now >= self._window_end:
            self._window_end, self._used = now + RATE_WINDOW, 0
        self._used += 1
        return {
            "x-ratelimit-limit": str(self._limit),
            "x-ratelimit-remaining": str(max(self._limit - self._used, 0)),
            "x-ratelimit-reset": str(-(-self._window_end // SECOND)),
        }

    def _tickers(self, query: dict[str, str]) -> dict[str, Any]:
        _check_exchange(query)
        data = [
            {
                "symbol": each.symbol,
                "company_name": each.company_name,
                "industry": each.industry,
                "exchange": EXCHANGE,
                "uuid4": each.uuid4,
                "active": True,
                "meta": [],
            }
            for each in self._instruments
        ]
        return {"hits": len(data), "took_ms": 1, "exchange": EXCHANGE, "data": data}

    def _status(self, query: dict[str, str]) -> dict[str, Any]:
        _check_exchange(query)
        now = wall_time(self._now() // SECOND * SECOND, self._timezone)
        return {"data": [{"created": now, "opened": now, "closed": None, "status": "open"}]}

    def _intraday(self, query: dict[str, str]) -> dict[str, Any]:
        begin = self._moment(query, "datetime_from", "%Y-%m-%d %H:%M:%S")
        end = self._moment(query, "datetime_to", "%Y-%m-%d %H:%M:%S")
        return self._series(query, begin, end, query.get("interval", "1m"))

    def _end_of_day(self, query: dict[str, str]) -> dict[str, Any]:
        begin = self._moment(query, "date_from", "%Y-%m-%d")
        try:
            end = self._moment(query, "date_to", "%Y-%m-%d") + timedelta(days=1)
        except OverflowError:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "date_to: too late") from None
        body = self._series(query, begin, end, query.get("interval", "1d"))
        return {**body, "date_to": (end - timedelta(days=1)).replace(tzinfo=None).isoformat()}

    def _last(self, query: dict[str, str]) -> dict[str, Any]:
        now = to_datetime(self._now() // SECOND * SECOND + MINUTE_MICROS).astimezone(self._timezone)
        body = self._series(query, now - timedelta(days=7), now, "1m")
        return {**body, "hits": min(body["hits"], 1), "data": body["data"][-1:]}

    def _series(self, query: dict[str, str], begin: datetime, end: datetime, interval: str) -> dict[str, Any]:
        instrument = self._instrument(query)
        if interval not in INTERVALS:
            raise RefusedError(HTTPStatus.BAD_REQUEST, f"interval: one of {', '.join(INTERVALS)}")
        bars = self._bars.of(
            instrument.symbol, from_datetime(begin), from_datetime(end), lambda minute: self._start_of(minute, interval)
        )
        return {
            "ticker": instrument.symbol,
            "company_name": instrument.company_name,
            "exchange": EXCHANGE,
            "uuid4": instrument.uuid4,
            "date_from": begin.replace(tzinfo=None).isoformat(),
            "date_to": end.replace(tzinfo=None).isoformat(),
            "interval": interval,
            "hits": len(bars),
            "took_ms": 1,
            "data": [self._record(bar) for bar in bars],
        }

    def _record(self, bar: Bar) -> dict[str, Any]:
        return {
            "timestamp": wall_time(bar.start, self._timezone),
            "open": bar.open,
            "high": bar.high,
            "low": bar.low,
            "close": bar.close,
            "volume": bar.volume,
        }

    def _instrument(self, query: dict[str, str]) -> Instrument:
        _check_exchange(query)
        if "ticker" not in query:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "ticker is missing")
        instrument = self._by_key.get(query["ticker"].lower())
        if instrument is None:
            raise RefusedError(HTTPStatus.NOT_FOUND, "unknown ticker")
        return instrument

    def _moment(self, query: dict[str, str], name: str, form: str) -> datetime:
        """Return a parameter read as wall time of the exchange. Raises RefusedError."""
        try:
            return datetime.strptime(query[name], form).replace(tzinfo=self._timezone)
        except KeyError:
            raise RefusedError(HTTPStatus.BAD_REQUEST, f"{name} is missing") from None
        except ValueError:
            raise RefusedError(HTTPStatus.BAD_REQUEST, f"{name}: not of the form {form}") from None

    def _start_of(self, minute: Micros, interval: str) -> Micros:
        if interval == "1m":
            return minute
        if interval == "1h":
            return minute // (60 * MINUTE_MICROS) * (60 * MINUTE_MICROS)
        day = to_datetime(minute).astimezone(self._timezone).replace(hour=0, minute=0)
        return from_datetime(day)


def encode(answer: Answer) -> bytes:
    """Return the body as JSON."""
    return json.dumps(answer.body).encode()


def _check_exchange(query: dict[str, str]) -> None:
    if query.get("exchange", EXCHANGE).lower() != EXCHANGE:
        raise RefusedError(HTTPStatus.NOT_FOUND, "unknown exchange")
