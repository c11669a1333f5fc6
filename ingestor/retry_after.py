"""The `Retry-After` header of HTTP (RFC 9110, section 10.2.3): pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from datetime import UTC
from email.utils import parsedate_to_datetime

from ingestor.model import SECOND, Micros

MAX_RETRY_AFTER = 600.0
"""Seconds: a server that asks for more is tried again after ten minutes all the same, since gaps grow meanwhile."""


def retry_after(values: Iterable[str], *, date: str | None, now: Micros) -> float | None:
    """Return for how many seconds a server asks not to be tried again, at most `MAX_RETRY_AFTER`.

    `values` are those of the header; the longest readable one counts, and None means that there is none. A moment is
    taken relative to the answer's own `date` where it has one, so that our clock may be wrong; else to `now`.
    """
    asked = [seconds for value in values if (seconds := _seconds(value.strip(), date, now)) is not None]
    return min(max(asked), MAX_RETRY_AFTER) if asked else None


def _seconds(value: str, date: str | None, now: Micros) -> float | None:
    if re.fullmatch(r"[0-9]+", value):
        # A number with too many digits to be one is longer than the longest wait, too.
        return float(value) if len(value) < 12 else math.inf
    moment = http_date(value)
    if moment is None:
        return None
    sent = http_date(date) if date is not None else None
    return max(0.0, moment - (now / SECOND if sent is None else sent))


def http_date(value: str) -> float | None:
    """Return a date of HTTP (RFC 9110, section 5.6.7) in seconds since the Unix epoch; None where it is none."""
    try:
        moment = parsedate_to_datetime(value)
        # An obsolete form may lack its zone, which is GMT in all of them.
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (TypeError, ValueError, OverflowError, IndexError):
        return None
