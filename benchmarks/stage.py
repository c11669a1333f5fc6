"""The processes of a benchmark: a database, a generator and the daemon, separate as in production."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg

from benchmarks.frames import TOKEN, Load
from ingestor.admin.migrate import migrate
from ingestor.embedded import EmbeddedServer
from ingestor.settings import load_settings
from tests.processes import DaemonProcess

ROOT = Path(__file__).parents[1]
TIMEOUT = 120.0
"""Seconds until a wait fails."""

# Production settings: commits are durable.
SERVER = {"fsync": "on", "full_page_writes": "on", "max_wal_size": "4GB", "track_commit_timestamp": "on"}


class Database:
    """A migrated database on its own server."""

    def __init__(self) -> None:
        self._server = EmbeddedServer(settings=SERVER)
        self.url = ""

    def __enter__(self) -> Self:
        self._server.__enter__()
        self.url = self._server.url()
        settings = load_settings(database_url=self.url, token=TOKEN, exchange_calendar="always")
        asyncio.run(migrate(self.url, settings, lambda _: None))
        self._connection = psycopg.connect(self.url, autocommit=True)
        self.empty()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._server.__exit__(kind, error, trace)

    def empty(self) -> None:
        """Delete all ticks, sessions and bars."""
        self.execute(
            "TRUNCATE market.ticks, ingest.stream_sessions, ingest.rejected_messages, ingest.stale_bars, "
            "ingest.rollup_1m, ingest.rollup_5m, ingest.rollup_1h, ingest.rollup_1d; "
            "UPDATE ingest.rollup_state SET announced_until = DEFAULT, until_1m = DEFAULT, until_5m = DEFAULT, "
            "until_1h = DEFAULT, until_1d = DEFAULT; "
            "SELECT ingest.ensure_partition((date_trunc('month', now()) + n * interval '1 month')::date) "
            "FROM generate_series(-1, 2) AS n"
        )
        self.execute("CHECKPOINT")

    def keep(self, ticks: str) -> None:
        """Delete all sessions, and all ticks that do not match the SQL condition `ticks`."""
        self.execute(f"DELETE FROM market.ticks WHERE NOT ({ticks})")
        self.execute("VACUUM market.ticks")
        self.execute("TRUNCATE ingest.stream_sessions CASCADE")
        self.execute("CHECKPOINT")

    def execute(self, sql: str) -> None:
        """Run statements."""
        self._connection.execute(sql)

    def value(self, sql: str) -> Any:
        """Return the first value of a query's first row."""
        row = self._connection.execute(sql).fetchone()
        assert row is not None
        return row[0]


class Generator:
    """The process of `benchmarks.generator`."""

    def __init__(self, load: Load, rate: float | None = None, port: int = 0) -> None:
        self.load = load
        options = ["--ticks", str(load.ticks), "--symbols", str(load.symbols), "--duplicates", str(load.duplicates)]
        options += ["--deflate"] if load.deflate else []
        options += ["--rate", str(rate)] if rate else []
        options += ["--port", str(port)] if port else []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.generator", *options],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.url = f"ws://127.0.0.1:{self._line()}/"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.kill()
        self._process.wait()

    def wait_for_a_receiver(self) -> None:
        """Wait until a receiver is connected and authenticated."""
        assert self._line() == "ready"

    def go(self) -> None:
        """Start sending."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def times(self) -> tuple[float, float]:
        """Return the wall-clock times at which the first and the last tick were sent."""
        report = json.loads(self._line())
        return report["began"], report["sent"]

    def _line(self) -> str:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], TIMEOUT)[0]:
            raise TimeoutError("no receiver connected to the generator, or the receiver stopped reading")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the generator exited")
        return line.strip()


class Process:
    """A process that is measured from outside."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    @property
    def cpu(self) -> float:
        """Return the processor time so far, in seconds (proc(5): fields 14 and 15 of stat)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self, field: str = "VmRSS") -> int:
        """Return memory in bytes: VmRSS is the current value, VmHWM the peak."""
        for line in Path(f"/proc/{self.pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
        raise LookupError(field)


@contextlib.contextmanager
def daemon(database: Database, generator: Generator, **settings: str) -> Iterator[Process]:
    """Run `ingestor run`, by default with default settings, connected to the generator, and stop it gracefully."""
    with tempfile.TemporaryDirectory(prefix="ingestor-bench-") as directory:
        process = DaemonProcess(
            Path(directory, "log"),
            token=TOKEN,
            stream_url=generator.url,
            database_url=database.url,
            spool_dir=directory,
            instance="bench",
            **settings,
        )
        process.start()
        try:
            generator.wait_for_a_receiver()
            until(database, "SELECT count(*) FROM ingest.stream_sessions WHERE authenticated_at IS NOT NULL", 1)
            yield Process(process.pid)
        finally:
            process.stop()


def until(database: Database, sql: str, value: int, pause: float = 0.005) -> float:
    """Wait until a query returns at least `value`; return the wall-clock time."""
    deadline = time.monotonic() + TIMEOUT
    while (found := database.value(sql)) < value:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{found} instead of {value}: {sql}")
        time.sleep(pause)
    return time.time()
