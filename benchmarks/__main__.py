"""`make bench`: run all measurements, save the figures, and write the performance page."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.frames import Load
from benchmarks.measure import Measured, Run, end_to_end, from_empty, in_turn, latency, loads, loop, rival
from benchmarks.page import write
from benchmarks.profiles import profile
from benchmarks.relaying import relay_figures
from benchmarks.stage import ROOT, Database, Generator
from benchmarks.storing import batches, by_psql, by_spool, by_store
from ingestor.admin.bars import store_bars
from ingestor.telemetry.log import configure

RESULTS = ROOT / "benchmarks" / "results.json"
TICKS = 500_000
SPOOLED = 1_000_000
RATES = (100, 1_000, 10_000)
RIVALS = {"official_client": 15_000, "asyncpg_executemany": 60_000, "asyncpg_copy": 200_000, "cryptofeed": 60_000}
"""Ticks sent to each client, enough for some seconds."""

FILLED = (0, 1_000_000, 10_000_000)
FILLED_FULL = (*FILLED, 100_000_000)

_FILL = """
INSERT INTO market.ticks (time, received_at, price, volume, occurrence, symbol)
SELECT at, at, 1 + n % 50000 / 1000.0, 1 + n % 100000, 1, chr(65 + n % 50 / 26) || chr(65 + n % 26) || 'X.NZ'
FROM (SELECT n, date_trunc('month', now()) + n * (now() - date_trunc('month', now())) / {rows} AS at
      FROM generate_series(1, {rows}) AS n) AS made
"""

# On each of the days before today, a burst of as many ticks as the daemon commits in some tenths of a second.
_BURSTS = """
INSERT INTO market.ticks (time, received_at, price, volume, occurrence, symbol)
SELECT at, at, 1 + n % 50000 / 1000.0, 1 + n % 100000, 1, chr(65 + n % 50 / 26) || chr(65 + n % 26) || 'X.NZ'
FROM (SELECT n, date_trunc('day', now()) - n % 25 * interval '1 day' - interval '1 day'
                + n / 25 * interval '5 milliseconds' AS at
      FROM generate_series(1, {rows}) AS n) AS made ORDER BY at
"""


def main() -> None:
    """Parse the options, measure unless `--page` is given, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="also 100 million rows and a spool of ten million")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--page", action="store_true", help="only rewrite the page from the saved figures")
    options = parser.parse_args()
    configure("error", "auto")
    if not options.page:
        began = time.monotonic()
        results = measure(options.rounds, full=options.full)
        results["minutes"] = round((time.monotonic() - began) / 60, 1)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write(json.loads(RESULTS.read_text(encoding="utf-8")))


def measure(rounds: int, *, full: bool) -> dict[str, Any]:
    """Return all figures: rates in ticks/s, `cpu` in microseconds of processor time a tick, memory in bytes."""
    results: dict[str, Any] = {"made_at": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine()}
    announce("Generator alone, with a receiver that only reads its socket")
    results["generator"] = sink()
    for name, deflate in (("receive", False), ("deflate", True)):
        announce(f"Receiving{' with permessage-deflate' * deflate}")
        results[name] = receive(rounds, deflate=deflate)
    with Database() as database:
        announce("End to end, compared with other clients")
        results["end_to_end"] = clients(database, rounds)
        announce("Kinds of load")
        results["loads"] = loads(
            database,
            {
                **{f"{n:,} symbol{'s' * (n > 1)}": Load(TICKS, symbols=n) for n in (1, 50, 500, 5_000)},
                "1 symbol, every tick equal": Load(TICKS, symbols=1, duplicates=1),
            },
            rounds,
        )
        announce("Ticks that are already in the database")
        results["copies"] = copies(database, rounds)
        announce("Store and spool")
        results["store"] = store(database, rounds, 10_000_000 if full else SPOOLED)
        announce("From the sending of a tick to its commit")
        results["latency"] = {str(rate): latency(database, rate, 15) for rate in RATES}
        announce("Tables with existing rows")
        results["filled"] = filled(database, rounds, FILLED_FULL if full else FILLED)
        announce("Beside the rollup")
        results["rollup"] = rolling(database, rounds)
        announce("Relay")
        results["relay"] = relay_figures(database, rounds)
        announce("Profile")
        results["profile"] = profile(database)
    return results


def receive(rounds: int, *, deflate: bool) -> Measured:
    """Measure the receiving loops without a database."""
    with Generator(Load(TICKS, deflate=deflate)) as generator:
        subjects: dict[str, Callable[[], Run]] = {
            name: partial(loop, name, generator) for name in ("bare", "decode", "record", "record_by_library")
        }
        subjects["bare, uvloop"] = partial(loop, "bare", generator, uvloop=True)
        subjects["record, uvloop"] = partial(loop, "record", generator, uvloop=True)
        return in_turn(rounds, subjects)


def clients(database: Database, rounds: int) -> Measured:
    """Measure the daemon, the bare loop and the other clients alternately."""
    with Generator(Load(TICKS)) as generator:
        subjects: dict[str, Callable[[], Run]] = {
            "bare": partial(loop, "bare", generator),
            "ingestor": partial(from_empty, database, generator),
        }
        for name, ticks in RIVALS.items():
            subjects[name] = partial(rival, name, database, Load(ticks))
        return in_turn(rounds, subjects)


def store(database: Database, rounds: int, spooled: int) -> Measured:
    """Measure psql, the store and a spool with the same batches."""
    made = batches(spooled)

    def run(write_all: Callable[[Database, Any], float]) -> Run:
        database.empty()
        return Run(spooled / write_all(database, made), 0.0)

    return in_turn(rounds, {f.__name__: partial(run, f) for f in (by_psql, by_store, by_spool)})


def filled(database: Database, rounds: int, sizes: tuple[int, ...]) -> Measured:
    """Measure end to end into a table that already has rows of this month."""
    found: Measured = {}
    with Generator(Load(TICKS)) as generator:
        for rows in sizes:
            database.empty()
            if rows:
                database.execute(_FILL.format(rows=rows))
                asyncio.run(store_bars(database.url, lambda _: None))
                database.execute("VACUUM ANALYZE market.ticks")

            def run() -> Run:
                database.keep("received_at = time")  # only filler rows have equal times: drop those of the last run
                return end_to_end(database, generator, rollup="off")

            found |= in_turn(rounds, {str(rows): run})
    return found


def copies(database: Database, rounds: int) -> Measured:
    """Measure end to end with a share of duplicate ticks, as after a reconnect to a server that repeats them."""
    with Generator(Load(TICKS)) as generator:

        def again(keep: str) -> Run:
            from_empty(database, generator)
            database.keep(keep)
            return end_to_end(database, generator)

        subjects = {"none": "false", "1 %": "volume % 100 = 0", "100 %": "true"}
        return in_turn(rounds, {name: partial(again, keep) for name, keep in subjects.items()})


def rolling(database: Database, rounds: int) -> Measured:
    """Measure end to end while the daemon stores the bars of twice as many older ticks, and without that."""
    with Generator(Load(TICKS)) as generator:

        def run(rollup: str) -> Run:
            database.empty()
            database.execute(_BURSTS.format(rows=2 * TICKS))
            database.execute("VACUUM ANALYZE market.ticks")
            found = end_to_end(database, generator, rollup=rollup)
            stored = database.value("SELECT coalesce(sum(ticks), 0)::bigint FROM ingest.rollup_1m")
            print(f"  {stored:,} ticks were rolled up")
            return found

        return in_turn(rounds, {name: partial(run, name) for name in ("off", "on")})


def sink() -> float:
    """Return the rate (ticks/s) of the generator with a receiver that discards all bytes."""
    with Generator(Load(TICKS)) as generator:
        command = [sys.executable, "-m", "benchmarks.sink", generator.url]
        with subprocess.Popen(command, cwd=ROOT) as process:
            generator.wait_for_a_receiver()
            generator.go()
            began, sent = generator.times()
            process.kill()
        return TICKS / (sent - began)


def machine() -> dict[str, Any]:
    """Return the hardware and the software versions of this run."""
    model = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cores": os.cpu_count(),
        "processor": model[0] if model else platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("websockets", "asyncpg", "msgspec", "psycopg", "cryptofeed")},
    }


def announce(text: str) -> None:
    """Print the heading of a section."""
    print(f"\n{text}", flush=True)


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


if __name__ == "__main__":
    main()
