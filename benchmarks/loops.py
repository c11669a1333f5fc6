"""Receivers that are measured: `python -m benchmarks.loops NAME URL TICKS` prints seconds, processor time and memory."""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from collections.abc import Awaitable, Callable

from websockets.asyncio.client import connect

from ingestor.clock import SessionClock, SystemClock
from ingestor.stream.connection import closed, open_connection, send
from ingestor.stream.protocol import Decoder, authenticate
from benchmarks.frames import TIMEZONE

TOKEN = "tk_benchmark_token00"


async def bare(url: str, ticks: int) -> float:
    """The limit: a `websockets` loop that throws every message away."""
    async with connect(url, max_size=2**20) as connection:
        await connection.send(authenticate(TOKEN), text=True)
        await connection.recv()
        began = time.perf_counter()
        for _ in range(ticks):
            await connection.recv()
        return time.perf_counter() - began


async def decode(url: str, ticks: int) -> float:
    """Ours, without batches: every message becomes a tick."""
    decoder = Decoder(TIMEZONE)
    clock = SessionClock(SystemClock())
    done = asyncio.Event()
    left = ticks + 1

    def take(payload: bytes, binary: bool) -> None:
        nonlocal left
        decoder.decode(payload, clock.stamp(), binary=binary)
        left -= 1
        if not left:
            done.set()

    async with open_connection(url) as connection:
        connection.attach(take)
        began = time.perf_counter()
        await send(connection, authenticate(TOKEN))
        await done.wait()
        return time.perf_counter() - began


LOOPS: dict[str, Callable[[str, int], Awaitable[float]]] = {"bare": bare, "decode": decode}


def main() -> None:
    name, url, ticks = sys.argv[1], sys.argv[2], int(sys.argv[3])
    before = resource.getrusage(resource.RUSAGE_SELF)
    seconds = asyncio.run(LOOPS[name](url, ticks))
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"seconds": seconds, "cpu": cpu, "rss": after.ru_maxrss * 1024}))


if __name__ == "__main__":
    main()
