"""Runs `ingestor` with a wrong clock: `SKEW_SECONDS=-180 python -m tests.skewed run`.

For tests that need a process of its own; in process, use `tests.clocks.SkewedClock`. `SKEW_SECONDS` is by how many
seconds its wall clock is ahead of the machine's; negative: behind. The monotonic clock is right, as in reality.
`datetime.now` is not changed; the daemon's `ingestor.clock.SystemClock` is.

If the file `SKEW_FILE` exists, it is read at each look at the clock and holds the seconds instead: so a running
process's clock can be set and corrected.

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
    """Return by how many seconds the clock is ahead now."""
    try:
        return float(FILE.read_text(encoding="ascii")) if FILE is not None else SECONDS
    except (OSError, ValueError):  # missing, or being written
        return SECONDS


if __name__ == "__main__":
    if SECONDS or FILE is not None:
        time.time = lambda: _time() + skew()
        time.time_ns = lambda: _time_ns() + round(skew() * 1e9)
    if "FIRST_ADDRESS" in os.environ:
        prefer(os.environ["FIRST_ADDRESS"])
    main()
