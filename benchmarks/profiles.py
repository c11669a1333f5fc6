"""Profile of the daemon at full load, sampled from outside by py-spy."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.frames import Load
from benchmarks.measure import COMMITTED
from benchmarks.stage import Database, Generator, daemon, until

TICKS = 1_000_000
SECONDS = 3
SHOWN = 14


def profile(database: Database) -> dict[str, Any]:
    """Return the functions of the daemon's main thread with their shares of its busy time."""
    database.empty()
    with (
        Generator(Load(TICKS)) as generator,
        daemon(database, generator) as process,
        tempfile.TemporaryDirectory() as directory,
    ):
        raw = Path(directory, "stacks")
        spy = str(Path(sys.executable).with_name("py-spy"))
        command = [spy, "record", "--pid", str(process.pid), "--rate", "500", "--duration", str(SECONDS)]
        command += ["--format", "raw", "--output", str(raw), "--nonblocking", "--threads", "--function"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as spying:
            generator.go()
            until(database, COMMITTED, TICKS)
            spying.wait()
        return shares(raw.read_text(encoding="utf-8").splitlines())


def shares(stacks: list[str]) -> dict[str, Any]:
    """Return each function's own share from py-spy's raw lines: frames separated by `;`, then a count."""
    own: Counter[str] = Counter()
    for line in stacks:
        frames, _, count = line.rpartition(" ")
        names = frames.split(";")
        if not any("run_forever" in name for name in names) or names[-1].startswith("select "):
            continue  # another thread, or idle
        own[names[-1]] += int(count)
    total = own.total()
    return {"samples": total, "own": {name: count / total for name, count in own.most_common(SHOWN)}}
