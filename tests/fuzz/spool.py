"""For damaged spool files, each batch comes back as it was written, or the file is set aside.

SQLite reads a damaged log up to the damage, so an earlier state of the queue may come back.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from ingestor.buffer.spool import Entry, Spool, SpoolDamagedError
from ingestor.model import Batch, Session
from tests.fuzz.target import Case, Counts

_SESSION = Session(UUID(int=1), "fuzz", "ws://localhost/ws", 5)
_IMAGES = 6
_STEPS = 10
"""How often space is given back at most."""


@dataclass(frozen=True)
class Image:
    """A spool's files by name, and its state after each change, the newest last."""

    files: dict[str, bytes]
    states: list[list[Entry]]


def image(directory: Path, chance: random.Random, *, killed: bool) -> Image:
    """Write a spool, and return it as after a stop, or as after SIGKILL, with its log."""
    _clear(directory)
    spool = Spool(directory)
    spool.open()
    queue: list[Entry] = []
    states: list[list[Entry]] = [[]]
    for number in range(1, chance.choice((3, 12, 40))):
        rows = chance.randbytes(chance.choice((0, 80, 900, 5000)))
        queue.append(Entry(number, Batch(_SESSION, number, rows=rows, count=len(rows) // 80)))
        spool.append(queue[-1:])
        states.append(list(queue))
        if number % 10 == 0:
            spool.forget(number - 7)
            queue = queue[-7:]
            states.append(list(queue))
    if not killed:
        spool.close()
    files = {path.name: path.read_bytes() for path in directory.iterdir() if path.name not in {"ballast", "lock"}}
    spool.close()
    return Image(files, states)


def _clear(directory: Path) -> None:
    """Empty the directory, but keep the ballast, which takes time to write."""
    for path in directory.iterdir():
        if path.name not in {"ballast", "lock"}:
            path.unlink()


def damage(content: bytes, chance: random.Random) -> bytes:
    """Flip bits, cut the file, or replace a page by zeros or by a copy of another page."""
    result = bytearray(content)
    if not result:
        return content
    reach = chance.choice((100, 4096, 4 * 4096, len(result)))
    place = chance.randrange(min(reach, len(result)))
    page = place // 4096 * 4096
    match chance.randrange(8):
        case 0:
            del result[place:]
        case 1:
            result[page : page + 4096] = bytes(len(result[page : page + 4096]))
        case 2:
            other = chance.randrange(len(result)) // 4096 * 4096
            result[page : page + 4096] = content[other : other + 4096]
        case 3:
            result[place : place + 8] = chance.randbytes(8)
        case _:
            result[place] ^= 1 << chance.randrange(8)
    return bytes(result)


def open_and_use(directory: Path, images: list[Image], chance: random.Random) -> Counts:
    """Open and read a damaged spool, then continue with it."""
    _clear(directory)
    sound = chance.choice(images)
    name = chance.choice([name for name in sound.files if name.startswith("spool.db")])
    for each, content in sound.files.items():
        (directory / each).write_bytes(damage(content, chance) if each == name else content)
    spool = Spool(directory)
    try:
        spool.open()
        found, is_whole = _read(spool)
        if is_whole and not spool.set_aside:
            allowed = sound.states if name != "spool.db" else sound.states[-1:]
            assert found in allowed, f"{len(found)} batches are returned that were never the queue"
        else:
            assert spool.set_aside, "the damaged spool was not set aside"
            assert found == sound.states[-1][: len(found)], "the batches before the damage differ from the queue"
            assert all(path.exists() for path in spool.set_aside), "the file that was set aside is missing"
            assert (spool.depth, spool.size) == (0, 0)
        _continue(spool)
    finally:
        spool.close()
    return Counter(spools=1, **{"set aside": len(spool.set_aside)})


def _read(spool: Spool) -> tuple[list[Entry], bool]:
    """Return the readable batches, and whether they are complete."""
    found: list[Entry] = []
    try:
        for _ in range(1000):
            read = spool.read(found[-1].position if found else 0, 10**9, 20_000)
            if not read:
                return found, True
            found += read
    except SpoolDamagedError:
        return found, False
    raise AssertionError("reading the spool does not end")


def _continue(spool: Spool) -> None:
    """Append, read and remove as usual; damage may be found only now."""
    newest = Entry(spool.last + 1, Batch(_SESSION, 10_000, rows=b"newest"))
    try:
        spool.append([newest])
        assert spool.read(newest.position - 1, 100, 10**9) == [newest]
        spool.forget(newest.position)
        assert spool.depth == 0
        for _ in range(_STEPS):
            if spool.is_slack:
                spool.shrink()
    except SpoolDamagedError:
        assert spool.set_aside


@asynccontextmanager
async def target(directory: Path) -> AsyncIterator[Case]:
    """Write the spools that the cases damage."""
    images = [image(directory, random.Random(number), killed=number % 2 == 0) for number in range(_IMAGES)]

    async def case(chance: random.Random) -> Counts:
        return open_and_use(directory, images, chance)

    yield case
