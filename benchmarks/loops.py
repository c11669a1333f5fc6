"""Receivers that are measured: `python -m benchmarks.loops NAME URL TICKS` prints seconds and processor time."""

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
    """Seconds and processor time from the first message on; what came before is the same for all."""

    began: float = 0.0
    cpu: float = 0.0

    def start(self) -> None:
        """Begin, with the first message."""
        self.began, self.cpu = time.perf_counter(), _cpu()

    def read(self) -> tuple[float, float]:
        """Return seconds and processor time since then."""
        return time.perf_counter() - self.began, _cpu() - self.cpu


async def bare(url: str, ticks: int) -> tuple[float, float]:
    """Throw every message away: the limit of a plain `websockets` loop."""
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
    """Make every message a tick, by our own connection, and throw that away."""
    decoder, clock = Decoder(TIMEZONE), SessionClock(SystemClock())

    def take(payloads: Sequence[bytes], binary: bool) -> None:
        for at, payload in enumerate(payloads, clock.stamp(len(payloads))):
            decoder.decode(payload, at, binary=binary)

    return await _ours(url, ticks, take)


async def record(url: str, ticks: int) -> tuple[float, float]:
    """Make every message a row of a batch, and throw that away."""
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
            await buffer.done()

    emptying = asyncio.create_task(empty())
    try:
        return await _ours(url, ticks, recorder.frames)
    finally:
        emptying.cancel()


async def record_by_library(url: str, ticks: int) -> tuple[float, float]:
    """Do the same, with every frame read by the library: what our own way with plain text frames buys."""
    FeedConnection.data_received = FeedConnection._give  # type: ignore[method-assign]  # noqa: SLF001
    return await record(url, ticks)


async def _ours(url: str, ticks: int, handler: Handler) -> tuple[float, float]:
    """Hand everything to a handler, by the daemon's own connection."""
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
    """Run one loop."""
    name, url, ticks = sys.argv[1], sys.argv[2], int(sys.argv[3])  # a fourth: by uvloop
    if len(sys.argv) > 4:
        import uvloop  # noqa: PLC0415 - only where it is asked for

        uvloop.install()
    seconds, cpu = asyncio.run(LOOPS[name](url, ticks))
    print(json.dumps({"ticks": ticks, "seconds": seconds, "cpu": cpu}))


if __name__ == "__main__":
    main()
