"""`make bench-quick`: fail if receiving, storing or the end-to-end path costs over 10 % more than the baseline.

Only ratios of two things measured alternately are compared with the baseline. A regression is measured again, since a
machine can be busy for some seconds; only a repeated one fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.frames import Load
from benchmarks.measure import from_empty, in_turn, loop
from benchmarks.stage import Database, Generator
from benchmarks.storing import batches, by_psql, by_store
from ingestor.telemetry.log import configure

BASELINE = Path(__file__).with_name("quick.json")
TICKS = 200_000
ROUNDS = 3
TRIES = 3
TOLERANCE = 1.10
END_TO_END_GOAL = 0.60
"""Minimum rate as a share of the bare loop's."""


def quick() -> dict[str, float]:
    """Return costs as ratios; lower is better."""
    made = batches(TICKS)
    with Database() as database, Generator(Load(TICKS)) as generator:
        subjects = {
            "bare": partial(loop, "bare", generator),
            "receive": partial(loop, "record", generator),
            "end to end": partial(from_empty, database, generator),
        }
        found = in_turn(ROUNDS, subjects)
        stored: list[float] = []
        copied: list[float] = []
        for _ in range(ROUNDS):
            for times, write in ((stored, by_store), (copied, by_psql)):
                database.empty()
                times.append(write(database, made))
    return {
        "receive: processor time, of the bare loop's": found["receive"]["cpu"] / found["bare"]["cpu"],
        "end to end: processor time, of the bare loop's": found["end to end"]["cpu"] / found["bare"]["cpu"],
        "end to end: time, of the bare loop's": found["bare"]["rate"] / found["end to end"]["rate"],
        "store: time, of psql's": median(stored) / median(copied),
    }


def main() -> None:
    """Compare new figures with the baseline, or write a new one with `--commit`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit", action="store_true", help="write these figures as the new baseline")
    options = parser.parse_args()
    configure("error", "auto")
    if options.commit:
        tries = [quick() for _ in range(TRIES)]
        figures = {name: round(median(each[name] for each in tries), 3) for name in tries[0]}
        BASELINE.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        print(f"Baseline written to {BASELINE.name}: {figures}")
        return
    baseline = json.loads(BASELINE.read_text(encoding="utf-8"))
    best: dict[str, float] = {}
    regressed = list(baseline)
    for _ in range(TRIES):
        best = {name: min(value, best.get(name, value)) for name, value in quick().items()}
        regressed = [name for name in baseline if best[name] > limit(name, baseline[name])]
        if not regressed:
            break
        print(f"Over the limit, measuring again: {', '.join(regressed)}.")
    for name, value in best.items():
        print(f"{name:50} {value:6.3f}  baseline {baseline[name]:6.3f}, at most {limit(name, baseline[name]):6.3f}")
    if regressed:
        sys.exit(
            f"Over the limit: {', '.join(regressed)}. Find the cause. If the cost is justified, write a new baseline "
            'with `make bench-quick ARGS="--commit"`, and give the reason in the commit.'
        )


def limit(name: str, baseline: float) -> float:
    """Return the highest tolerated ratio: the goal for end-to-end time, which depends on the disk; else 10 % more."""
    return 1 / END_TO_END_GOAL if name.startswith("end to end: time") else baseline * TOLERANCE


if __name__ == "__main__":
    main()
