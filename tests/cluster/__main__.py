"""`make cluster`: faults of a database cluster and of the replicated buffer under load, then the audit.

Prints each fault with the pause of commits that it caused; ends with 1 if the promise was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from ingestor.simulator.server import now
from tests.chaos.audit import Verdict
from tests.cluster.defective import DEFECTS, VARIABLE
from tests.cluster.faults import (
    KINDS,
    LOSES_COMMITS,
    LOSES_MEMORY,
    ON_BUFFER,
    ON_DATABASE,
    ON_RECORDER,
    Entry,
    schedule,
)
from tests.cluster.patroni import PatroniCluster, patroni_cluster
from tests.cluster.results import Episode, longest_pause, table, write_page
from tests.cluster.world import SETTLE_SECONDS, World, world

FAULTS_OF_A_WORLD = 12
"""Faults before the market stops, everything is audited, and a new world begins: it bounds the memory of the audit."""

FAULTS_THAT_REVEAL = 4
"""Faults within which the audit must find a defect that was built in."""

PAGE = Path(__file__).parents[2] / "docs/how-to/high-availability.md"
DIRECT, REPLICATED = "recorder to database", "through NATS"


async def disturb(here: World, entries: list[Entry]) -> list[tuple[str, int, int]]:
    """Run faults in turn; return each kind with the moments of its begin and end."""
    spans: list[tuple[str, int, int]] = []
    began = time.monotonic()
    for number, entry in enumerate(entries, 1):
        await asyncio.sleep(SETTLE_SECONDS)
        begin = now()
        await KINDS[entry.kind](here, random.Random(entry.seed))
        await here.whole()
        spans.append((entry.kind, begin, now()))
        seconds = (spans[-1][2] - begin) / 1e6
        print(
            f"{time.monotonic() - began:6.1f} s  {number:>3}/{len(entries)}  {entry.kind}: {seconds:.1f} s", flush=True
        )
    await asyncio.sleep(SETTLE_SECONDS)
    return spans


async def run(
    cluster: PatroniCluster, entries: list[Entry], directory: Path, *, seed: int, replicated: bool, defect: str = ""
) -> tuple[Verdict, list[Episode]]:
    """Run one world, and audit it."""
    directory.mkdir()
    module = "tests.cluster.defective" if defect else "ingestor"
    async with world(cluster, directory, seed=seed, replicated=replicated, module=module) as here:
        spans = await disturb(here, entries)
        memory = ", ".join(f"{name} {peak:.0f}" for name, peak in here.memory().items())
        await here.finish()
        await cluster.whole()
        verdict, commits = await here.audit(), await here.commits()
    if verdict.lost_in_gaps and not may_lose(entries, replicated=replicated):
        verdict = replace(
            verdict, claims=(*verdict.claims, f"{verdict.lost_in_gaps} ticks lost by faults that lose nothing")
        )
    print(f"{line(verdict)}\nMemory at most, MB: {memory}", flush=True)
    for claim in verdict.claims:
        print(f"  {claim}")
    path = REPLICATED if replicated else DIRECT
    return verdict, [Episode(path, kind, longest_pause(commits, begin, end)) for kind, begin, end in spans]


def may_lose(entries: Iterable[Entry], *, replicated: bool) -> bool:
    """Return whether one of the faults may lose ticks inside declared gaps."""
    losing = {LOSES_MEMORY} if replicated else {LOSES_MEMORY, LOSES_COMMITS}
    return any(entry.kind in losing for entry in entries)


def worlds(entries: list[Entry], *, replicated: bool) -> Iterator[list[Entry]]:
    """Yield the faults of each world: apart those that may lose ticks, so that a loss by the others is found."""
    for loses in (False, True):
        part = [entry for entry in entries if may_lose([entry], replicated=replicated) is loses]
        for begin in range(0, len(part), FAULTS_OF_A_WORLD):
            yield part[begin : begin + FAULTS_OF_A_WORLD]


def line(verdict: Verdict) -> str:
    """Return a verdict in one line."""
    return (
        f"{verdict.sent:,} ticks sent, {verdict.stored:,} stored, {verdict.lost_in_gaps:,} lost inside declared gaps, "
        f"{verdict.lost_outside:,} lost outside them, {verdict.twice:,} stored twice, "
        f"{len(verdict.claims)} false claims, {verdict.covered:.0%} of the market covered"
    )


async def main(
    faults: int, seed: int, directory: Path, only: Collection[str], paths: Collection[str], *, page: bool
) -> bool:
    """Run the faults on each path, in worlds of `FAULTS_OF_A_WORLD`."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, _interrupt)
    total: Verdict | None = None
    episodes: list[Episode] = []
    async with patroni_cluster(directory) as cluster:
        for path in paths:
            replicated = path == REPLICATED
            kinds = ON_DATABASE | ON_RECORDER | (ON_BUFFER if replicated else {})
            chosen = [kind for kind in kinds if not only or kind in only]
            entries = schedule(seed, -(-faults // len(paths)), chosen) if chosen else []
            for number, part in enumerate(worlds(entries, replicated=replicated)):
                print(f"\n{path}: {len(part)} faults, seed {seed}", flush=True)
                place = directory / f"{'replicated' if replicated else 'direct'}-{number}"
                verdict, more = await run(cluster, part, place, seed=seed + number, replicated=replicated)
                total = verdict if total is None else total + verdict
                episodes += more
    if total is None:
        return False
    result = f"{len(episodes)} faults: {line(total)}"
    print(f"\n{table(episodes)}\n\n{result}")
    if page:
        day = f"{datetime.now(UTC):%Y-%m-%d}"
        write_page(PAGE, f"On {day}, seed {seed}, {result}.\n\n{table(episodes)}")
    return total.holds


async def find(defect: str, seed: int, directory: Path) -> bool:
    """Run a program with a defect built in; return whether the audit finds it."""
    os.environ[VARIABLE] = defect
    entries = schedule(seed, FAULTS_THAT_REVEAL, list(DEFECTS[defect][1]))
    async with patroni_cluster(directory) as cluster:
        verdict, _ = await run(cluster, entries, directory / "defective", seed=seed, replicated=True, defect=defect)
    print(f"{defect}: {'missed' if verdict.holds else 'found'}")
    return not verdict.holds


def _interrupt() -> None:
    for task in asyncio.all_tasks():
        if task.get_coro().__name__ in {"main", "find"}:  # type: ignore[union-attr]
            task.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="make cluster", description=__doc__)
    parser.add_argument("--faults", type=int, default=int(os.environ.get("CLUSTER_FAULTS") or 30))
    parser.add_argument("--seed", type=int, default=int(os.environ.get("CLUSTER_SEED") or 1))
    parser.add_argument("--only", action="append", default=[], choices=KINDS, metavar="KIND", help="%(choices)s")
    parser.add_argument("--path", action="append", default=[], choices=[DIRECT, REPLICATED])
    parser.add_argument("--page", action="store_true", help=f"write the results into {PAGE.name}")
    parser.add_argument("--defect", choices=DEFECTS, help="build a defect in; 0 if the audit finds it")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="ingestor-cluster-", dir="/tmp"))
    place.chmod(0o755)
    paths = options.path or [DIRECT, REPLICATED]
    kept = asyncio.run(
        find(options.defect, options.seed, place)
        if options.defect
        else main(options.faults, options.seed, place, options.only, paths, page=options.page)
    )
    if kept:
        shutil.rmtree(place)
    else:
        print(f"The promise was broken. Logs and spools are in {place}; CLUSTER_SEED={options.seed} repeats the run.")
    sys.exit(0 if kept else 1)
