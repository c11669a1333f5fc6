"""The measurements. Subjects alternate, so that a noisy machine affects all of them alike."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import median

from benchmarks.frames import Load
from benchmarks.stage import ROOT, Database, Generator, Process, daemon, until

COMMITTED = "SELECT coalesce(sum(ticks), 0)::bigint FROM ingest.stream_sessions"
OFFICIAL_PORT = 5005
_TRADES = """
CREATE TABLE IF NOT EXISTS public.trades (id serial PRIMARY KEY, timestamp timestamp, receipt_timestamp timestamp,
    feed varchar(32), symbol varchar(32), side varchar(8), amount numeric(64, 32), price numeric(64, 32),
    trade_id varchar(64), order_type varchar(32));
TRUNCATE public.trades
"""
_LATENCY = """
SELECT percentile_cont(ARRAY[0.5, 0.9, 0.99, 1.0]) WITHIN GROUP (
    ORDER BY extract(epoch FROM pg_xact_commit_timestamp(xmin) - time)::float8)
FROM market.ticks
"""


@dataclass(frozen=True, slots=True)
class Run:
    """One run: ticks a second, processor time of the receiver (µs a tick), peak memory and memory at rest (bytes)."""

    rate: float
    cpu: float
    memory: int = 0
    rest: int = 0
    server: float = 0.0
    """Share of one core that PostgreSQL used."""


Measured = dict[str, dict[str, float]]


def loop(name: str, generator: Generator, *, uvloop: bool = False) -> Run:
    """Run one of `benchmarks.loops` against a generator."""
    ticks = generator.load.ticks
    command = [sys.executable, "-m", "benchmarks.loops", name, generator.url, str(ticks), *(["uvloop"] * uvloop)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        generator.wait_for_a_receiver()
        generator.go()
        report = json.loads(process.communicate()[0])
    generator.times()
    return Run(ticks / report["seconds"], report["cpu"] / ticks * 1e6)


def end_to_end(database: Database, generator: Generator, **settings: str) -> Run:
    """Measure the daemon, by default with default settings, from the first tick sent to the last commit."""
    ticks = generator.load.ticks
    with daemon(database, generator, **settings) as process:
        time.sleep(0.5)  # until the start is over
        rest, before, served = process.memory(), process.cpu, _server_cpu(database)
        generator.go()
        ended = until(database, COMMITTED, ticks)
        served = _server_cpu(database) - served
        began, _ = generator.times()
        time.sleep(0.1)  # until the last transaction is acknowledged
        cpu, memory = process.cpu - before, process.memory("VmHWM")
    return Run(ticks / (ended - began), cpu / ticks * 1e6, memory, rest, served / (ended - began))


def from_empty(database: Database, generator: Generator) -> Run:
    """Run `end_to_end` with an empty database."""
    database.empty()
    return end_to_end(database, generator)


def rival(name: str, database: Database, load: Load) -> Run:
    """Measure one client of `benchmarks.rivals`, with an empty database."""
    database.empty()
    database.execute(_TRADES)
    port = OFFICIAL_PORT if name == "official_client" else 0
    table = "public.trades" if name == "cryptofeed" else "market.ticks"
    with Generator(load, port=port) as generator:
        command = [sys.executable, "-m", "benchmarks.rivals", name, generator.url, database.url, str(load.ticks)]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
            try:
                generator.wait_for_a_receiver()
                generator.go()
                began, pid = time.time(), Process(process.pid)
                before = pid.cpu
                ended = until(database, f"SELECT count(*) FROM {table}", load.ticks, pause=0.05)
                return Run(load.ticks / (ended - began), (pid.cpu - before) / load.ticks * 1e6)
            finally:
                process.kill()


def in_turn(rounds: int, subjects: Mapping[str, Callable[[], Run]]) -> Measured:
    """Run each subject once a round, alternately, and print each run; return a summary for each subject."""
    runs: dict[str, list[Run]] = {name: [] for name in subjects}
    for number in range(rounds):
        for name, run in subjects.items():
            found = run()
            runs[name].append(found)
            print(f"  {number + 1} of {rounds}  {name:32} {found.rate:>10,.0f} ticks/s  {found.cpu:6.2f} µs a tick")
    return {name: summary(each) for name, each in runs.items()}


def summary(runs: Sequence[Run]) -> dict[str, float]:
    """Return the median of each figure, the lowest and highest rate, and the peak memory."""
    return {
        "rate": median(run.rate for run in runs),
        "lowest": min(run.rate for run in runs),
        "highest": max(run.rate for run in runs),
        "cpu": median(run.cpu for run in runs),
        "memory": max(run.memory for run in runs),
        "rest": median(run.rest for run in runs),
        "server": median(run.server for run in runs),
        "runs": len(runs),
    }


def loads(database: Database, chosen: dict[str, Load], rounds: int) -> Measured:
    """Measure end to end with several loads, alternately, each with an empty table."""
    with ExitStack() as stack:
        generators = {name: stack.enter_context(Generator(load)) for name, load in chosen.items()}
        return in_turn(rounds, {name: partial(from_empty, database, each) for name, each in generators.items()})


def latency(database: Database, rate: float, seconds: float) -> dict[str, float]:
    """Return percentiles of the delay (seconds) from sending a tick to its commit, by the server's commit times."""
    database.empty()
    load = Load(round(rate * seconds))
    with Generator(load, rate) as generator, daemon(database, generator) as process:
        before, began = process.cpu, time.monotonic()
        generator.go()
        until(database, COMMITTED, load.ticks)
        lasted = time.monotonic() - began
        cpu, memory = process.cpu - before, process.memory()
    median_, p90, p99, longest = database.value(_LATENCY)
    return {"median": median_, "p90": p90, "p99": p99, "max": longest, "cpu": cpu / lasted, "memory": memory}


def _server_cpu(database: Database) -> float:
    """Return the processor time (seconds) of the daemon's server processes."""
    pids = database.value("SELECT array_agg(pid) FROM pg_stat_activity WHERE application_name = 'ingestor'") or []
    return sum(Process(pid).cpu for pid in pids)
