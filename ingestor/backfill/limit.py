"""The provider's rate limit: all tasks wait for its reset."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from http import HTTPStatus

from ingestor.clock import Clock
from ingestor.model import SECOND
from ingestor.retry_after import http_date

DEFAULT_RESET_WAIT = 10.0
"""Seconds to wait if the server does not send the time of the reset."""

LONGEST_WAIT = 3600.0
"""Seconds: the longest wait for a reset, whatever the headers say."""

MAX_RELATIVE_RESET = 1_000_000_000
"""A reset above this is a moment (seconds or milliseconds since 1970), up to it a number of seconds: the provider does
not document which."""

MAX_HEADER_LENGTH = 40
"""Characters read of a header: enough for a number or a date."""


class RateLimit:
    """The rate limit for all tasks. `on_wait` is called with the seconds for which they wait."""

    def __init__(self, clock: Clock, on_wait: Callable[[float], None]) -> None:
        self._clock = clock
        self._on_wait = on_wait
        self._resume_at = -math.inf

    def note(self, status: int, headers: Mapping[str, str]) -> None:
        """Make all tasks wait for the reset if no request is left, or at a 429, or at a 503 with `Retry-After`."""
        left = _number(headers.get("x-ratelimit-remaining"))
        is_busy = status == HTTPStatus.SERVICE_UNAVAILABLE and "retry-after" in headers
        if status != HTTPStatus.TOO_MANY_REQUESTS and not is_busy and (left is None or left > 0):
            return
        seconds = self._seconds(headers.get("x-ratelimit-reset"))
        if seconds is None:
            seconds = self._seconds(headers.get("retry-after"))
        if seconds is None:
            seconds = DEFAULT_RESET_WAIT
        resume_at = self._clock.monotonic() + min(max(seconds, 1.0), LONGEST_WAIT)
        self._resume_at = max(self._resume_at, resume_at)

    async def wait(self) -> None:
        """Wait until a request may be made."""
        while (seconds := self._resume_at - self._clock.monotonic()) > 0:
            self._on_wait(seconds)
            await self._clock.sleep(seconds)

    def _seconds(self, text: str | None) -> float | None:
        """Return the seconds until a reset, given as seconds, as a moment since 1970 or as an HTTP date."""
        reset = _number(text)
        if reset is not None and reset <= MAX_RELATIVE_RESET:
            return reset
        moment = http_date((text or "")[:MAX_HEADER_LENGTH]) if reset is None else reset
        if moment is not None and moment > 1000 * MAX_RELATIVE_RESET:
            moment /= 1000
        return None if moment is None else moment - self._clock.wall() / SECOND


def _number(text: str | None) -> float | None:
    try:
        value = float((text or "")[:MAX_HEADER_LENGTH])
    except ValueError:
        return None
    return value if math.isfinite(value) else None
