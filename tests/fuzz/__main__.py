"""`make fuzz`: hostile input to every part that reads from outside, from a seed. Ends with 1 if a case failed.

The time is divided between the targets. Each case has dice of its own, so a failing one can be repeated alone.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ingestor.telemetry.log import configure
from tests.fuzz import daemon, decoder, page, relay, rest, spool, wire
from tests.fuzz.target import Counts, Target, dice

TARGETS: dict[str, tuple[Target, float]] = {
    "wire": (wire.target, 0.15),
    "daemon": (daemon.target, 0.2),
    "decoder": (decoder.target, 0.15),
    "rest": (rest.target, 0.1),
    "spool": (spool.target, 0.15),
    "page": (page.target, 0.1),
    "relay": (relay.target, 0.15),
}
"""The targets, each with its share of the time."""

MINUTES = 5.0
PROGRESS = 10.0
"""Seconds between two lines of progress."""

CASE_TIMEOUT = 60.0
"""Seconds that a case may take; some seconds later the watchdog ends even a process that it blocks."""


@dataclass
class Run:
    """One target's cases: their number, their inputs, and the numbers of the failed ones."""

    name: str
    seed: int
    cases: int = 0
    counts: Counts = field(default_factory=Counter)
    failures: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} {what}" for what, count in self.counts.items())
        return f"{self.name}: {self.cases:,} cases, {counts or 'no inputs yet'}: {len(self.failures)} failures"

    def again(self, number: int) -> str:
        """Return the command that repeats a case."""
        return f"FUZZ_SEED={self.seed} FUZZ_CASE={self.name}:{number} make fuzz"


class Watchdog(threading.Thread):
    """Ends this process if a case blocks the loop, so that no timeout of the loop can fire."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._watched: tuple[Run, int, float] | None = None

    def watch(self, run: Run, number: int) -> None:
        """Begin to wait for the end of a case."""
        self._watched = run, number, time.monotonic() + CASE_TIMEOUT + 10

    def rest(self) -> None:
        """Stop waiting."""
        self._watched = None

    def run(self) -> None:
        while True:
            time.sleep(1)
            if (watched := self._watched) and time.monotonic() > watched[2]:
                print(f"{watched[0].name}, case {watched[1]}: hangs. {watched[0].again(watched[1])}", flush=True)
                faulthandler.dump_traceback()
                os._exit(1)


async def fuzz(
    run: Run, target: Target, seconds: float, directory: Path, watchdog: Watchdog, *, only: int | None
) -> None:
    """Run a target's cases for so long, until one fails, or `only` one of them."""
    begin = printed = time.monotonic()
    async with target(directory) as case:
        while not run.failures and (run.cases == 0 if only is not None else time.monotonic() < begin + seconds):
            number = run.cases if only is None else only
            watchdog.watch(run, number)
            try:
                async with asyncio.timeout(CASE_TIMEOUT):
                    run.counts += await case(dice(run.seed, run.name, number))
            except Exception:  # noqa: BLE001 - whatever it is, it is what we look for
                traceback.print_exc()
                print(f"{run.name}, case {number} failed. {run.again(number)}", flush=True)
                run.failures.append(number)
            run.cases += 1
            if time.monotonic() >= printed + PROGRESS:
                printed = time.monotonic()
                print(f"{printed - begin:6.0f} s  {run}", flush=True)
        watchdog.rest()


async def main(minutes: float, seed: int, chosen: str, directory: Path) -> bool:
    """Run every target, or `chosen`: one by its name, or one case of it as NAME:NUMBER."""
    wanted, _, number = chosen.partition(":")
    shares = {name: share for name, (_, share) in TARGETS.items() if wanted in {"", name}}
    watchdog = Watchdog()
    watchdog.start()
    print(f"{minutes:g} minutes, seed {seed}", flush=True)
    runs = []
    for name, share in shares.items():
        run = Run(name, seed)
        runs.append(run)
        place = directory / name
        place.mkdir()
        seconds = 60 * minutes * share / sum(shares.values())
        await fuzz(run, TARGETS[name][0], seconds, place, watchdog, only=int(number) if number else None)
        print(f"          {run}", flush=True)
    total = Counter[str]()
    for run in runs:
        total.update(run.counts)
    failures = sum(len(run.failures) for run in runs)
    print(f"\n{', '.join(f'{count:,} {what}' for what, count in total.items())}: {failures} failures")
    return not failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=float(os.environ.get("FUZZ_MINUTES") or MINUTES))
    parser.add_argument("--seed", type=int, default=int(os.environ.get("FUZZ_SEED") or time.time()))
    parser.add_argument("--case", default=os.environ.get("FUZZ_CASE") or "", help="a target, or TARGET:NUMBER")
    options = parser.parse_args()
    if options.case.partition(":")[0] not in {"", *TARGETS}:
        parser.error(f"the targets are {', '.join(TARGETS)}")
    configure("error", "auto")
    logging.disable()  # log lines of libraries about hostile input would bury the findings
    place = Path(tempfile.mkdtemp(prefix="ingestor-fuzz-"))
    try:
        sys.exit(0 if asyncio.run(main(options.minutes, options.seed, options.case, place)) else 1)
    finally:
        shutil.rmtree(place, ignore_errors=True)
