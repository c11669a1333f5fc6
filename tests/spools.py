"""Spools with a flipped bit are read back as written, or set aside with an event. For tests and fuzzing."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from ingestor.buffer.spool import Entry, Spool, SpoolDamagedError
from ingestor.model import Batch, Rejection, Session

SESSION = Session(UUID(int=1), "test", "ws://localhost/ws", 5)
REMOVED = 3
"""How many of an image's batches have left the queue."""

ALL_FLIPS = bool(os.environ.get("INGESTOR_TEST_ALL_FLIPS"))
"""Whether tens of thousands of bits are flipped, which takes minutes, instead of hundreds."""

STEP = 8
"""Batches that are read, and then removed, at once."""


@dataclass(frozen=True)
class Image:
    """The files of a spool (contents by name), the removed batches, and the remaining ones."""

    files: dict[str, bytes]
    forgotten: list[Entry]
    entries: list[Entry]


def make_image(directory: Path, *, killed: bool, batches: int = 30, seed: int = 1) -> Image:
    """Write a spool with several levels of pages; return it as after a stop, or as after SIGKILL with its log."""
    entries = _entries(random.Random(seed), batches)
    _write(Image({}, [], []), directory)
    spool = Spool(directory)
    spool.open()
    for entry in entries:
        spool.append([entry])
    spool.forget(entries[REMOVED - 1].position)
    if not killed:
        spool.close()
    files = {name: (directory / name).read_bytes() for name in _names(directory)}
    spool.close()
    return Image(files, entries[:REMOVED], entries[REMOVED:])


def flip_and_check(
    image: Image, offset: int, bit: int, *, directory: Path, name: str = "spool.db", while_open: bool = False
) -> str:
    """Flip a bit of a file, before the start or while the spool is open, and go on as in `damage_and_check`."""
    content = bytearray(image.files[name])
    content[offset] ^= 1 << bit
    return damage_and_check(image, {name: bytes(content)}, directory=directory, while_open=while_open)


def damage_and_check(image: Image, changes: dict[str, bytes], *, directory: Path, while_open: bool = False) -> str:
    """Replace the contents of an image's files, then use the spool as a daemon does.

    Return `kept` if each batch came back as it was written, or `set aside` if the damage was found; batches read before
    that are as they were written, and in order. Raises AssertionError, or an error of the spool.
    """
    _write(image, directory)
    spool = Spool(directory)
    try:
        if while_open:
            spool.open()
            assert not spool.set_aside
        for name, content in changes.items():
            with (directory / name).open("r+b") as file:
                file.write(content)
                file.truncate()
        if while_open:
            assert spool._connection is not None
            spool._connection.execute("PRAGMA shrink_memory")  # so that the spool reads its file again
        else:
            spool.open()
        return _play(spool, image)
    finally:
        spool.close()
        for path in directory.glob("spool-damaged-*"):
            path.unlink()


def _play(spool: Spool, image: Image) -> str:
    """Append, read and remove batches as a buffer does, whatever is damaged; compare the results."""
    newest = Entry(image.entries[-1].position + 1, Batch(SESSION, 1000, rows=b"newest"))
    expected = [*image.entries, newest]
    found: list[Entry] = []
    if not spool.set_aside:
        try:
            reached = spool.forgotten
            spool.append([newest])
            while reached < spool.last:
                read = spool.read(reached, STEP * 10, 10**9)
                assert read, "the spool returns nothing and reports no damage"
                found += read
                reached = read[-1].position
                spool.forget(reached)
                for _ in range(10):
                    if spool.is_slack:
                        spool.shrink()
                assert not spool.is_slack, "the spool gives space back without end"
            assert spool.depth == 0
        except SpoolDamagedError:
            assert spool.set_aside
    if found and found[0] in image.forgotten:  # a repeated append is harmless
        expected = [*image.forgotten[image.forgotten.index(found[0]) :], *expected]
    if not spool.set_aside:
        assert found == expected
        return "kept"
    assert len(spool.set_aside) == 1, "an empty spool was damaged as well"
    assert spool.set_aside[0].exists()
    assert found == expected[: len(found)]
    assert (spool.depth, spool.size) == (0, 0)
    spool.append([newest])
    assert spool.read(0, 100, 10**9) == [newest]
    return "set aside"


def _entries(chance: random.Random, batches: int) -> list[Entry]:
    """Return batches small and large, some with pages of their own, with holes in their positions."""
    entries = []
    position = 0
    for number in range(1, batches + 1):
        position += chance.choice((1, 1, 1, 4))
        rows = chance.randbytes(chance.choice((0, 90, 900, 900, 3000, 9000)))
        rejections = (Rejection(1, 7, "not_json", chance.randbytes(20), 20),) if number % 7 == 0 else ()
        batch = Batch(SESSION, number, rows=rows, count=10, rejections=rejections, covered_until=number * 100)
        entries.append(Entry(position, batch))
    return entries


def _names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name in {"spool.db", "spool.db-wal", "watermark"}]


def _write(image: Image, directory: Path) -> None:
    for name in _names(directory):
        (directory / name).unlink()
    for name, content in image.files.items():
        (directory / name).write_bytes(content)
