"""Faults of a daemon's process and of its files and streams on its own machine."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import random
import signal
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from ingestor.errors import StoreError
from tests.chaos.audit import Skew
from tests.chaos.world import Instance
from tests.servers import query

CLIENTS = 160
"""Connections to the page that request and never read: more than the daemon keeps."""

ANSWER_TIMEOUT = 8.0
"""Seconds within which a probe must be answered: less than the daemon's timeout for an idle client."""

SKEWS = 2.0, 200.0
"""Seconds by which a wrong clock is wrong: more than any timeout of the clock comparison."""

_IN_THE_FUTURE = "SELECT id FROM ingest.stream_sessions WHERE covered_until > clock_timestamp()"
"""Reads the table, not a view, since a view may cut coverage at the current time."""
_REQUESTS = tuple(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() for path in ("/status", "/events"))
_PIPELINED = 50


async def kill(instance: Instance, seconds: float, chance: random.Random) -> None:
    await asyncio.to_thread(instance.daemon.kill)
    await asyncio.sleep(seconds / 3)
    await _begin(instance)


async def stop(instance: Instance, seconds: float, chance: random.Random) -> None:
    await _end(instance)
    await _begin(instance)


async def send_sighup(instance: Instance, seconds: float, chance: random.Random) -> None:
    """Send SIGHUP, as a terminal or a careless script does."""
    await _end(instance, signal.SIGHUP)
    await _begin(instance)


async def pause(instance: Instance, seconds: float, chance: random.Random) -> None:
    instance.daemon.signal(signal.SIGSTOP)
    await asyncio.sleep(seconds)
    instance.daemon.signal(signal.SIGCONT)


async def freeze(instance: Instance, seconds: float, chance: random.Random) -> None:
    instance.daemon.signal(signal.SIGSTOP)
    await asyncio.sleep(3 + seconds)  # longer than the keepalive
    instance.daemon.signal(signal.SIGCONT)


async def freeze_and_kill(instance: Instance, seconds: float, chance: random.Random) -> None:
    """Kill the process while it reads what arrived during a freeze."""
    await freeze(instance, seconds, chance)
    await asyncio.sleep(seconds / 20)
    await kill(instance, seconds, chance)


async def leave_log_unread(instance: Instance, seconds: float, chance: random.Random) -> None:
    """Let the log fill a pipe, half of the time one whose reader closes; SIGTERM must still end the process."""
    await _end(instance)
    with _full_pipe() as (reader, writer):
        instance.daemon.popen = {"stderr": writer}
        await _begin(instance)
        instance.daemon.popen = {}
        await asyncio.sleep(seconds)
        if chance.random() < 0.5:
            os.close(reader.pop())
            await asyncio.sleep(0.3)
        await _end(instance)
    await _begin(instance)


async def set_clock_wrong(instance: Instance, seconds: float, chance: random.Random) -> None:
    """Run the process with a wrong clock for a while. It covers no future time, by the database's clock."""
    skew = chance.choice((-1, 1)) * chance.uniform(*SKEWS)
    await asyncio.to_thread(instance.daemon.kill)
    usual = instance.daemon.log
    instance.daemon.log = usual.with_suffix(f".skewed-{len(instance.skews) + 1}.log")
    instance.daemon.skew = skew
    await _begin(instance)
    instance.daemon.skew = 0.0
    await asyncio.sleep(seconds)
    with contextlib.suppress(StoreError):  # without a database, it claims nothing either
        for (session,) in await query(instance.look_at, _IN_THE_FUTURE):
            instance.broken.add(f"session {session} covered future time, by a wrong clock")
    if chance.random() < 0.5:
        await asyncio.to_thread(instance.daemon.kill)
    else:
        await _end(instance)
    instance.skews.append(Skew.of(instance.daemon.log, skew))
    instance.daemon.log = usual
    await _begin(instance)


async def flip_bits(instance: Instance, seconds: float, chance: random.Random) -> None:
    """Damage the spool of a daemon without a database, while it runs or after its death."""
    async with instance.database_lock:
        instance.database.refuses = True
        instance.database.cut()
        await asyncio.sleep(0.5 + seconds / 3)
        is_killed = chance.random() < 0.75
        if is_killed:
            await asyncio.to_thread(instance.daemon.kill)
        await asyncio.to_thread(_flip, instance.spool, chance, merge=is_killed and chance.random() < 0.8)
        if is_killed:
            await _begin(instance)
        else:
            await asyncio.sleep(seconds / 3)
        instance.database.refuses = False


def _flip(directory: Path, chance: random.Random, *, merge: bool) -> None:
    """Flip bits of the spool's file, or of its log unless that is merged into the file first."""
    path = directory / "spool.db"
    if merge:
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    files = [each for each in (path, Path(f"{path}-wal")) if each.exists() and each.stat().st_size > 64]
    if not files:
        return
    with chance.choice(files).open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        # In the header's fields, in the pages that hold the positions, or anywhere: one to three of these.
        for begin, end in chance.sample(((16, 64), (0, 4 * 4096), (0, size)), chance.randint(1, 3)):
            place = chance.randrange(begin, min(size, end))
            file.seek(place)
            (byte,) = file.read(1)
            file.seek(place)
            file.write(bytes([byte ^ 1 << chance.randrange(8)]))


async def ask_and_never_read(instance: Instance, seconds: float, chance: random.Random) -> None:
    """Let many clients send requests and read nothing; a probe must be answered meanwhile."""
    url = await instance.daemon.page()
    parts = urlsplit(url)
    with contextlib.ExitStack() as stack:
        for number in range(CLIENTS):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.setblocking(False)
            with contextlib.suppress(OSError):
                await asyncio.get_running_loop().sock_connect(client, (parts.hostname, parts.port))
                client.send(_REQUESTS[number % 2] * _PIPELINED)
        if not await _is_healthy(url):
            instance.broken.add(f"{instance.name} did not answer /healthz for {ANSWER_TIMEOUT:g} s")
        await asyncio.sleep(seconds)


async def _is_healthy(url: str) -> bool:
    """Return whether a probe gets any answer in time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ANSWER_TIMEOUT), httpx.AsyncClient(base_url=url, trust_env=False) as client:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    await client.get("/healthz")
                    return True
                await asyncio.sleep(0.2)
    return False


@contextlib.contextmanager
def _full_pipe() -> Iterator[tuple[list[int], int]]:
    """Make a full pipe. The list holds its reader, which may be taken out and closed."""
    end, writer = os.pipe()
    reader = [end]
    try:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b".")
        os.set_blocking(writer, True)
        yield reader, writer
    finally:
        for descriptor in (*reader, writer):
            os.close(descriptor)


async def _begin(instance: Instance) -> None:
    """Start the process, and let it work for a second: on a busy machine the next fault would meet its imports."""
    instance.daemon.start()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(10):
            while instance.daemon.is_running and not instance.daemon.handles(signal.SIGTERM):
                await asyncio.sleep(0.05)
    await asyncio.sleep(1)


async def _end(instance: Instance, number: signal.Signals = signal.SIGTERM) -> None:
    """Stop the process in order."""
    # A process that has just started may not handle signals yet; then it has nothing to lose either.
    right = {0} if instance.daemon.handles(signal.SIGTERM) else {0, -number}
    status = await asyncio.to_thread(instance.daemon.stop, number)
    assert status in right, f"{instance.name} ended with {status} after {number.name}: {instance.daemon.tail()}"
