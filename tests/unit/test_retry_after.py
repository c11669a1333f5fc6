from __future__ import annotations

import pytest

from ingestor.model import SECOND
from ingestor.retry_after import retry_after

NOW = 1_763_942_400 * SECOND  # 2025-11-24T00:00:00Z, a Monday
MIDNIGHT = "Mon, 24 Nov 2025 00:00:00 GMT"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("60", 60),
        (" 60 ", 60),
        ("0", 0),
        ("600", 600),
        ("601", 600),
        ("9" * 5000, 600),
        ("Mon, 24 Nov 2025 00:01:30 GMT", 90),
        ("Monday, 24-Nov-25 00:01:30 GMT", 90),  # obsolete forms, which RFC 9110 still requires
        ("Mon Nov 24 00:01:30 2025", 90),
        ("Sun, 23 Nov 2025 00:00:00 GMT", 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 600),
        *((value, None) for value in ("", "-1", "1.5", "1e3", "nan", "inf", "٦٠", "soon", "60 s", "Mon, 99 Nov 2025")),
    ],
)
def test_forms(value: str, seconds: float | None) -> None:
    """Seconds and dates are read, the wait is ten minutes at most, and invalid values are ignored."""
    assert retry_after([value], date=None, now=NOW) == seconds


def test_a_wrong_clock() -> None:
    """A date is relative to the server's clock, whatever ours is."""
    value = ["Mon, 24 Nov 2025 00:01:30 GMT"]
    assert retry_after(value, date=MIDNIGHT, now=NOW + 500 * SECOND) == 90
    assert retry_after(value, date="no date", now=NOW + 30 * SECOND) == 60


def test_several() -> None:
    """Of several headers, as proxies add them, the longest wait counts."""
    assert retry_after(["soon", "5", "40"], date=None, now=NOW) == 40
    assert retry_after([], date=None, now=NOW) is None
