"""Runs `ingestor` with a clock that is wrong: `SKEW_SECONDS=-180 python -m tests.skewed run`.

For tests that need a process of its own; in process, `tests.clocks.SkewedClock` does. `SKEW_SECONDS` is by how many
seconds its wall clock is ahead of the machine's; negative: behind. The monotonic clock is right, as in life. What asks
`datetime.now` is not deceived; the daemon asks `ingestor.clock.SystemClock`, which is.

A file named by `SKEW_FILE`, if there is one, is read at each look at the clock, and holds the seconds instead: so the
clock of a process that runs can be set, and set right again.

`FIRST_ADDRESS` is an address that `localhost` has before its others.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from ingestor.cli import main
from tests.addresses import prefer

SECONDS = float(os.environ.get("SKEW_SECONDS", "0"))
FILE = Path(os.environ["SKEW_FILE"]) if "SKEW_FILE" in os.environ else None

_time, _time_ns = time.time, time.time_ns


def skew() -> float:
    """By how many seconds the clock is ahead now."""
    try:
        return float(FILE.read_text(encoding="ascii")) if FILE is not None else SECONDS
    except (OSError, ValueError):  # not there, or being written
        return SECONDS


if __name__ == "__main__":
    if SECONDS or FILE is not None:
        time.time = lambda: _time() + skew()
        time.time_ns = lambda: _time_ns() + round(skew() * 1e9)
    if "FIRST_ADDRESS" in os.environ:
        prefer(os.environ["FIRST_ADDRESS"])
    main()
