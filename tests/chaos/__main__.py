"""`make chaos`: random faults, then an audit. Prints each fault; ends with 1 if the promise was broken."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from tests.chaos.audit import Verdict, audit
from tests.chaos.faults import DISK_FULL, KINDS, POOLER_KILLED, Fault, run_fault, schedule
from tests.chaos.world import SETTINGS, World, world
from tests.pooler import PROGRAM
from tests.servers import plain_server
from tests.tools import ALL_TOOLS

MIN_FAULTS = 200
MIN_FAULTS_OF_A_KIND = 5
"""Faults in all, and of each kind on each server; a run of `MIN_MINUTES` or more with fewer proves too little."""

MIN_MINUTES = 8

POOLED = "PostgreSQL"
"""The edition whose daemons write through a pooler."""


async def inject_faults(here: World, faults: list[Fault], *, seed: int) -> Counter[str]:
    """Run the schedule against a busy market; return the number of faults by kind."""
    done: Counter[str] = Counter()
    trading = asyncio.create_task(here.trade(random.Random(seed)))
    joining = asyncio.create_task(here.readers.join())
    running: set[asyncio.Task[None]] = set()
    began = time.monotonic()
    await asyncio.sleep(3)
    for number, fault in enumerate(faults, 1):
        await here.select_daemons(both=not fault.alone)
        who = "" if fault.alone else f" ({here.instances[fault.instance].name})"
        print(f"{time.monotonic() - began:6.1f} s  {number:>3}/{len(faults)}  {fault.kind}{who}", flush=True)
        running.add(asyncio.create_task(run_fault(here, fault)))
        done[fault.kind] += 1
        await asyncio.sleep(fault.pause)
        for task in [task for task in running if task.done()]:
            running.remove(task)
            task.result()
        for task in (trading, joining):
            if task.done():
                task.result()
    await asyncio.gather(*running)
    await asyncio.sleep(3)
    for task in (trading, joining):
        task.cancel()
    await asyncio.gather(trading, joining, return_exceptions=True)
    return done


async def run(
    name: str, url: str, seconds: float, seed: int, directory: Path, only: Collection[str]
) -> tuple[Verdict, Counter[str]]:
    """Test one server, with only the kinds in `only` if any are named."""
    print(f"\n{name}: {seconds:.0f} s of faults, seed {seed}, logs in {directory}", flush=True)
    async with world(url, directory, seed=seed, pooled=name == POOLED and bool(PROGRAM or ALL_TOOLS)) as here:
        without = {kind for kind in KINDS if only and kind not in only}
        if not here.disk:
            print(f"No disk can be mounted here, so this fault is left out: {DISK_FULL}")
            without.add(DISK_FULL)
        if not here.pooler:
            why = "PgBouncer is not installed" if name == POOLED else "The daemons write without a pooler here"
            print(f"{why}, so this fault is left out: {POOLER_KILLED}")
            without.add(POOLER_KILLED)
        done = await inject_faults(here, schedule(seed, seconds, without=without), seed=seed)
        done.update(dict.fromkeys(set(KINDS) - without, 0))  # faults that never happened count as zero, not as unknown
        print("Ending all faults; the daemons write the rest …", flush=True)
        await here.recover()
        margin = float(SETTINGS["coverage_margin"].removesuffix("ms")) / 1000
        skews = [skew for each in here.instances for skew in each.skews]
        verdict = await audit(here.url, here.accounts(), here.simulator.made_at, margin=margin, skews=skews)
        seen = sorted(each for instance in here.instances for each in instance.broken)
        seen += await here.readers.audit()
        print(here.readers.summary(), flush=True)
        verdict = replace(verdict, claims=(*verdict.claims, *seen))
    print(f"{name}: {line(verdict, done)}", flush=True)
    for claim in verdict.claims:
        print(f"  {claim}")
    return verdict, done


def line(verdict: Verdict, done: Counter[str]) -> str:
    """Return all results in one line."""
    kinds = ", ".join(f"{kind} {done[kind]}" for kind in KINDS if done[kind])
    return (
        f"{verdict.sent:,} ticks sent, {verdict.stored:,} stored, {verdict.lost_in_gaps:,} lost inside declared gaps, "
        f"{verdict.lost_outside:,} lost outside them, {verdict.twice:,} stored twice, "
        f"{len(verdict.claims)} false claims, {verdict.covered:.0%} of the market covered; "
        f"{done.total()} faults: {kinds}"
    )


def shortcomings(runs: list[Counter[str]]) -> list[str]:
    """Return why the faults of this run prove too little."""
    total = sum(done.total() for done in runs)
    rare = {kind: count for done in runs for kind, count in done.items() if count < MIN_FAULTS_OF_A_KIND}
    return [f"{kind}: only {count} times" for kind, count in rare.items()] + (
        [f"only {total} faults in all"] if total < MIN_FAULTS else []
    )


async def main(minutes: float, seed: int, directory: Path, only: Collection[str]) -> bool:
    """Test every available edition; divide the time between them."""
    timescale = os.environ.get("INGESTOR_TEST_TIMESCALE_URL")
    seconds = minutes * 60 / (2 if timescale else 1)
    results: list[tuple[Verdict, Counter[str]]] = []
    with contextlib.ExitStack() as stack:
        servers = {POOLED: stack.enter_context(plain_server())}
        if timescale:
            servers["TimescaleDB"] = timescale
        for name, url in servers.items():
            place = directory / name
            place.mkdir()
            results.append(await run(name, url, seconds, seed, place, only))
    verdict, done = results[0]
    for other, more in results[1:]:
        verdict, done = verdict + other, done + more
    lacking = shortcomings([done for _, done in results]) if minutes >= MIN_MINUTES and not only else []
    for each in lacking:
        print(f"Too few faults: {each}")
    print(f"\n{line(verdict, done)}")
    return verdict.holds and not lacking


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=float(os.environ.get("CHAOS_MINUTES") or MIN_MINUTES))
    parser.add_argument("--seed", type=int, default=int(os.environ.get("CHAOS_SEED") or 1))
    parser.add_argument("--only", action="append", default=[], choices=KINDS, metavar="KIND", help="%(choices)s")
    options = parser.parse_args()
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # set by nohup: the daemons would inherit it, but no handler
        signal.signal(signal.SIGHUP, lambda *_: None)
    place = Path(tempfile.mkdtemp(prefix="ingestor-chaos-"))
    kept = asyncio.run(main(options.minutes, options.seed, place, options.only))
    if kept:
        shutil.rmtree(place)
    else:
        print("The promise was broken, or not tested enough.")
        print(f"Logs and spools are in {place}; CHAOS_SEED={options.seed} repeats the run.")
    sys.exit(0 if kept else 1)
