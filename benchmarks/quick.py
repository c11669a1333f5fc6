"""`make bench-quick`: whether receiving, storing, or the whole way has become more than a tenth dearer.

Only ratios of two things measured in turn are compared with the committed ones. What looks dearer is measured anew,
since a machine can be busy for some seconds; only what stays so fails.
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

COMMITTED = Path(__file__).with_name("quick.json")
TICKS = 200_000
ROUNDS = 3
TRIES = 3
TOLERANCE = 1.10
END_TO_END_GOAL = 0.60
"""Of the bare loop's rate."""


def quick() -> dict[str, float]:
    """Return costs as ratios, of which each is better when lower."""
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
    """Measure and compare, or `--commit` the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit", action="store_true", help="keep these figures as the ones to compare with")
    options = parser.parse_args()
    configure("error", "auto")
    if options.commit:
        tries = [quick() for _ in range(TRIES)]
        figures = {name: round(median(each[name] for each in tries), 3) for name in tries[0]}
        COMMITTED.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        print(f"Kept in {COMMITTED.name}: {figures}")
        return
    committed = json.loads(COMMITTED.read_text(encoding="utf-8"))
    best: dict[str, float] = {}
    dearer = list(committed)
    for _ in range(TRIES):
        best = {name: min(value, best.get(name, value)) for name, value in quick().items()}
        dearer = [name for name in committed if best[name] > limit(name, committed[name])]
        if not dearer:
            break
        print(f"Dearer than before, so once more: {', '.join(dearer)}.")
    for name, value in best.items():
        print(f"{name:50} {value:6.3f}  committed {committed[name]:6.3f}, at most {limit(name, committed[name]):6.3f}")
    if dearer:
        sys.exit(
            f"More than a tenth dearer: {', '.join(dearer)}. Find out why; if it is worth its price, keep the new "
            'figures with `make bench-quick ARGS="--commit"`, and say so in the commit.'
        )


def limit(name: str, committed: float) -> float:
    """Return what is tolerated. The time of the whole way is the server's disk's too, so it has to keep its goal."""
    return 1 / END_TO_END_GOAL if name.startswith("end to end: time") else committed * TOLERANCE


if __name__ == "__main__":
    main()
