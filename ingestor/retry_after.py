"""The `Retry-After` header of HTTP (RFC 9110, section 10.2.3): pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from datetime import UTC
from email.utils import parsedate_to_datetime

from ingestor.model import SECOND, Micros

MAX_RETRY_AFTER = 600.0
"""Seconds. Limits the wait that a server may ask for, because gaps grow meanwhile."""


def retry_after(values: Iterable[str], *, date: str | None, now: Micros) -> float | None:
    """Return the wait in seconds that a server asks for, at most `MAX_RETRY_AFTER`; None if it asks for none.

    The longest valid one of the header's `values` counts. A date is relative to the response's own `date`, so that a
    wrong clock does not matter; without one, to `now`.
    """
    asked = [seconds for value in values if (seconds := _seconds(value.strip(), date, now)) is not None]
    return min(max(asked), MAX_RETRY_AFTER) if asked else None


def _seconds(value: str, date: str | None, now: Micros) -> float | None:
    if re.fullmatch(r"[0-9]+", value):
        # A number with more digits exceeds the maximum, too.
        return float(value) if len(value) < 12 else math.inf
    moment = http_date(value)
    if moment is None:
        return None
    sent = http_date(date) if date is not None else None
    return max(0.0, moment - (now / SECOND if sent is None else sent))


def http_date(value: str) -> float | None:
    """Return a date of HTTP (RFC 9110, section 5.6.7) in seconds since the Unix epoch; None if malformed."""
    try:
        moment = parsedate_to_datetime(value)
        # Obsolete forms may lack the zone, which is always GMT.
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (TypeError, ValueError, OverflowError, IndexError):
        return None
