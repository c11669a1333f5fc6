"""Receiving loops: `python -m benchmarks.loops NAME URL TICKS` prints seconds and processor time as JSON."""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass

from websockets.asyncio.client import connect

from benchmarks.frames import TIMEZONE, TOKEN
from ingestor.buffer.fifo import Buffer
from ingestor.clock import SessionClock, SystemClock
from ingestor.service.recorder import new_recorder
from ingestor.settings import load_settings
from ingestor.stream.connection import FeedConnection, Handler, open_connection, send
from ingestor.stream.decoder import Decoder, authenticate
from ingestor.telemetry.events import Telemetry


@dataclass(slots=True)
class Meter:
    """Seconds and processor time since the first message; everything before it is equal for all loops."""

    began: float = 0.0
    cpu: float = 0.0

    def start(self) -> None:
        """Start at the first message."""
        self.began, self.cpu = time.perf_counter(), _cpu()

    def read(self) -> tuple[float, float]:
        """Return seconds and processor seconds since `start`."""
        return time.perf_counter() - self.began, _cpu() - self.cpu


async def bare(url: str, ticks: int) -> tuple[float, float]:
    """Discard every message: the limit of a plain `websockets` loop."""
    meter = Meter()
    async with connect(url, max_size=2**20) as connection:
        await connection.send(authenticate(TOKEN), text=True)
        await connection.recv()
        await connection.recv()
        meter.start()
        for _ in range(ticks - 1):
            await connection.recv()
        return meter.read()


async def decode(url: str, ticks: int) -> tuple[float, float]:
    """Decode every message from the daemon's own connection, and discard the tick."""
    decoder, clock = Decoder(TIMEZONE), SessionClock(SystemClock())

    def take(payloads: Sequence[bytes], binary: bool) -> None:
        for at, payload in enumerate(payloads, clock.stamp(len(payloads))):
            decoder.decode(payload, at, binary=binary)

    return await _ours(url, ticks, take)


async def record(url: str, ticks: int) -> tuple[float, float]:
    """Pack every message into a row of a batch, and discard the batches."""
    settings = load_settings(token=TOKEN)
    telemetry = Telemetry()
    buffer = Buffer(memory_max_bytes=2**40, clock=SystemClock(), telemetry=telemetry)
    recorder = new_recorder(
        settings,
        endpoint=url,
        kind="stream",
        clock=SystemClock(),
        decoder=Decoder(TIMEZONE),
        buffer=buffer,
        telemetry=telemetry,
    )

    async def empty() -> None:
        while True:
            await buffer.take()
            await buffer.acknowledge()

    emptying = asyncio.create_task(empty())
    try:
        return await _ours(url, ticks, recorder.frames)
    finally:
        emptying.cancel()


async def record_by_library(url: str, ticks: int) -> tuple[float, float]:
    """Run `record` with every frame read by the library; the difference is the gain of our own frame reader."""
    FeedConnection.data_received = FeedConnection._give  # type: ignore[method-assign]  # noqa: SLF001
    return await record(url, ticks)


async def _ours(url: str, ticks: int, handler: Handler) -> tuple[float, float]:
    """Pass all messages of the daemon's own connection to a handler; return the meter's reading."""
    meter, done = Meter(), asyncio.Event()
    left = ticks + 1  # the server's answer to the token is the first message

    def take(payloads: Sequence[bytes], binary: bool) -> None:
        nonlocal left
        if left == ticks:
            meter.start()
        handler(payloads, binary)
        left -= len(payloads)
        if not left:
            done.set()

    async with open_connection(url) as connection:
        connection.attach(take)
        await send(connection, authenticate(TOKEN))
        await done.wait()
        return meter.read()


LOOPS: dict[str, Callable[[str, int], Coroutine[None, None, tuple[float, float]]]] = {
    "bare": bare,
    "decode": decode,
    "record": record,
    "record_by_library": record_by_library,
}


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Run one loop and print its figures."""
    name, url, ticks = sys.argv[1], sys.argv[2], int(sys.argv[3])  # a fourth argument: use uvloop
    if len(sys.argv) > 4:
        import uvloop  # noqa: PLC0415 - only if requested

        uvloop.install()
    seconds, cpu = asyncio.run(LOOPS[name](url, ticks))
    print(json.dumps({"ticks": ticks, "seconds": seconds, "cpu": cpu}))


if __name__ == "__main__":
    main()
