"""The relay: its delay, its fan-out, its replay, slow clients, and its cost for the recorder."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Self

from benchmarks.frames import Load
from benchmarks.measure import COMMITTED, Measured, Run, end_to_end, in_turn
from benchmarks.stage import ROOT, TIMEOUT, Database, Generator, Process, daemon, until
from benchmarks.storing import batches, by_store
from ingestor.store.relay_tokens import TokenStore
from tests.processes import RelayProcess

CLIENTS = 50
RATE = 10_000
SECONDS = 15
FANNED = 20_000
"""Ticks that each of the clients gets when the fan-out is measured."""

REPLAYED = 1_000_000
RECORDED = 500_000
HEALTHY, STUCK = 10, 20

_COMMITS = """
SELECT json_agg(json_build_array(extract(epoch FROM time)::float8,
                                 extract(epoch FROM pg_xact_commit_timestamp(xmin))::float8))
FROM market.ticks
"""
_SHARES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
_FORGET = "DELETE FROM ingest.relays; TRUNCATE ingest.tick_log"


@dataclass(frozen=True, slots=True)
class Relayed:
    """A running relay: its address, a token of 1,000 streams, and its process."""

    url: str
    token: str
    process: Process


@contextlib.contextmanager
def relay(database: Database, **settings: str) -> Iterator[Relayed]:
    """Run `ingestor relay` on a database, and stop it in order."""
    token = asyncio.run(_new_token(database.url))
    with tempfile.TemporaryDirectory(prefix="ingestor-bench-") as directory:
        log = Path(directory, "log")
        running = RelayProcess(log, database_url=database.url, relay_port="0", relay_http_port="0", **settings)
        running.start()
        try:
            deadline = time.monotonic() + TIMEOUT
            while not (found := re.search(r'"url": ?"(ws://[^"]+)"', log.read_text(encoding="utf-8"))):
                if time.monotonic() > deadline or not running.is_running:
                    raise TimeoutError(running.tail())
                time.sleep(0.05)
            until(database, "SELECT count(*) FROM ingest.relays", 1)
            yield Relayed(found[1], token, Process(running.pid))
        finally:
            running.stop()
            database.execute(_FORGET)


async def _new_token(url: str) -> str:
    tokens = TokenStore(url)
    await tokens.revoke("bench")
    token = await tokens.add("bench", max_streams=1000, lifetime=None)
    assert token is not None
    return token


class Subscribers:
    """The process of `benchmarks.subscribers`."""

    def __init__(self, url: str, token: str, clients: int, ticks: int | None) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="ingestor-bench-")
        self._file = Path(self._directory.name, "report")
        command = [sys.executable, "-m", "benchmarks.subscribers", url, token, "--clients", str(clients)]
        command += [] if ticks is None else ["--ticks", str(ticks), "--file", str(self._file)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self._line() == "ready"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._directory.cleanup()

    def report(self) -> dict[str, Any]:
        """Wait until each client has all ticks, and return what they saw."""
        assert self._line() == "done"
        assert self._process.wait(TIMEOUT) == 0
        found: dict[str, Any] = json.loads(self._file.read_text(encoding="utf-8"))
        return found

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def relay_figures(database: Database, rounds: int) -> dict[str, Any]:
    """Return all figures of the relay: delays in seconds, rates in messages/s, memory in bytes."""
    return {
        "delay": delay(database, CLIENTS),
        "fan_out": in_turn(rounds, {"broadcast": by_broadcast, "relay": partial(by_relay, database)}),
        "replay": replay(database),
        "stuck": stuck(database, rounds),
        "recorder": recorder(database, rounds),
    }


def delay(database: Database, clients: int, stuck_clients: int = 0) -> dict[str, float]:
    """Return percentiles of the delay from the commit of a tick to its arrival at a client; and the relay's memory."""
    database.empty()
    ticks = RATE * SECONDS
    with (
        relay(database) as relayed,
        Generator(Load(ticks), RATE) as generator,
        daemon(database, generator) as process,
        contextlib.ExitStack() as stack,
    ):
        rest = relayed.process.memory()
        if stuck_clients:
            stack.enter_context(Subscribers(relayed.url, relayed.token, stuck_clients, None))
        with Subscribers(relayed.url, relayed.token, clients, ticks) as subscribers:
            before = process.cpu
            generator.go()
            report = subscribers.report()
            until(database, COMMITTED, ticks)
            cpu = process.cpu - before
        memory = relayed.process.memory("VmHWM")
    delays = sorted(_delays(report, dict(database.value(_COMMITS))))
    return {
        **{name: delays[int(share * (len(delays) - 1))] for name, share in _SHARES.items()},
        "rest": rest,
        "memory": memory,
        "recorder_cpu": cpu / ticks * 1e6,
    }


def _delays(report: dict[str, Any], commits: dict[float, float]) -> Iterator[float]:
    """Yield the delay of each tick at each client."""
    commit_of = [commits[datetime.fromisoformat(date).timestamp()] for date in report["dates"]]
    for arrivals in report["arrivals"]:
        before = 0
        for at, count in arrivals:
            yield from (at - commit_of[index] for index in range(before, count))
            before = count


def by_relay(database: Database) -> Run:
    """Measure the messages a second of the relay to live clients, with a buffer that holds the whole burst."""
    database.empty()
    made = batches(FANNED)
    with (
        relay(database, relay_client_buffer="64MiB") as relayed,
        Subscribers(relayed.url, relayed.token, CLIENTS, FANNED) as subscribers,
    ):
        before = relayed.process.cpu
        by_store(database, made)
        report = subscribers.report()
        cpu = relayed.process.cpu - before
        memory = relayed.process.memory("VmHWM")
    return _fan_out(report, cpu, memory)


def by_broadcast() -> Run:
    """Measure the messages a second of `websockets.broadcast`."""
    command = [sys.executable, "-m", "benchmarks.broadcast", str(CLIENTS), str(FANNED)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdin is not None
        url = f"ws://127.0.0.1:{server.stdout.readline().strip()}/"
        with Subscribers(url, "token", CLIENTS, FANNED) as subscribers:
            process = Process(server.pid)
            before = process.cpu
            server.stdin.write("go\n")
            server.stdin.flush()
            report = subscribers.report()
            cpu, memory = process.cpu - before, process.memory("VmHWM")
        server.kill()
    return _fan_out(report, cpu, memory)


def _fan_out(report: dict[str, Any], cpu: float, memory: int) -> Run:
    """Return the rate from the first message that a client reads to the last one that any reads."""
    arrivals: list[list[tuple[float, int]]] = report["arrivals"]
    began = min(each[0][0] for each in arrivals)
    ended = max(each[-1][0] for each in arrivals)
    messages = FANNED * len(arrivals)
    return Run(messages / (ended - began), cpu / messages * 1e6, memory)


def replay(database: Database) -> dict[str, float]:
    """Measure one client that asks for everything on record; return its rate, and the relay's memory."""
    database.empty()
    by_store(database, batches(REPLAYED))
    database.execute("VACUUM ANALYZE market.ticks")
    with relay(database) as relayed:
        rest = relayed.process.memory()
        began = time.time()
        url = f"{relayed.url}?from=2000-01-01T00:00:00Z"
        with Subscribers(url, relayed.token, 1, REPLAYED) as subscribers:
            report = subscribers.report()
        memory = relayed.process.memory("VmHWM")
    return {"rate": REPLAYED / (report["arrivals"][0][-1][0] - began), "rest": rest, "memory": memory}


def stuck(database: Database, rounds: int) -> dict[str, dict[str, float]]:
    """Measure healthy clients beside clients that accept nothing, and without these, in turn."""
    found: dict[str, list[dict[str, float]]] = {"without": [], "beside": []}
    for _ in range(rounds):
        for name, count in (("without", 0), ("beside", STUCK)):
            found[name].append(delay(database, HEALTHY, count))
            print(f"  {name:8} {found[name][-1]['median'] * 1000:.2f} ms, {found[name][-1]['p99'] * 1000:.2f} ms")
    return {name: {key: median(each[key] for each in runs) for key in runs[0]} for name, runs in found.items()}


def recorder(database: Database, rounds: int) -> Measured:
    """Measure end to end without a relay, with a relay that has no client, and with one that has some."""
    with Generator(Load(RECORDED)) as generator:

        def run(clients: int | None) -> Run:
            database.empty()
            with contextlib.ExitStack() as stack:
                if clients is not None:
                    relayed = stack.enter_context(relay(database))
                    if clients:
                        stack.enter_context(Subscribers(relayed.url, relayed.token, clients, RECORDED))
                return end_to_end(database, generator)

        subjects: dict[str, Callable[[], Run]] = {
            "no relay": partial(run, None),
            "a relay without clients": partial(run, 0),
        }
        return in_turn(rounds, subjects)
