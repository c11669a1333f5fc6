"""After any damage to the spool's files nothing hangs, and no batch is silently missing or changed."""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
import shutil
import sqlite3
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path

import pytest

from ingestor.buffer.fifo import Buffer
from ingestor.buffer.spool import Entry, Spool, SpoolDamagedError, SpoolUnavailableError
from ingestor.clock import SystemClock
from ingestor.errors import ConfigurationError
from ingestor.model import Batch, EndReason
from ingestor.telemetry.events import Telemetry
from tests.clocks import HANG_SECONDS
from tests.disks import pinned, small_disk
from tests.spools import ALL_FLIPS, SESSION, Image, damage_and_check, flip_and_check, make_image

PAGE = 4096


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Return a directory in memory, if there is one: these tests need no sync."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as directory:
        yield Path(directory)


@pytest.fixture
def clean(place: Path) -> Path:
    """Empty that directory except for the ballast, which takes time to make."""
    for path in place.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "ballast":
            path.unlink()
    return place


@pytest.fixture(scope="module")
def stopped(place: Path) -> Image:
    """Return a spool after a stop: one file with everything in it."""
    return make_image(place, killed=False)


@pytest.fixture(scope="module")
def killed(place: Path) -> Image:
    """Return a spool after SIGKILL: nearly everything is in the log."""
    return make_image(place, killed=True)


def some(first: int, last: int, step: int, small_step: int = 1) -> list[int]:
    """Return every `step`-th number of a range, or every `small_step`-th in a thorough run."""
    return list(range(first, last, small_step if ALL_FLIPS else step))


def flips(image: Image, name: str, offsets: list[int], place: Path, *, while_open: bool = False) -> Counter[str]:
    """Flip a bit of each of these bytes, in a thorough run each bit of the first page; return the outcomes."""
    chance = random.Random(1)
    return Counter(
        flip_and_check(image, offset, bit, directory=place, name=name, while_open=while_open)
        for offset in offsets
        for bit in (range(8) if ALL_FLIPS and offset < PAGE else [chance.randrange(8)])
    )


def test_a_flipped_bit_in_the_first_page(stopped: Image, place: Path) -> None:
    """Every flip in header and schema is found, even if SQLite reports a full disk, a newer format or nothing."""
    first = stopped.files["spool.db"][:PAGE]
    used = first.rindex(bytes(200)) + 200  # after the gap in the middle
    offsets = [*range(150), *some(150, used, 100), *some(used, PAGE, 2)]
    found = flips(stopped, "spool.db", offsets, place)
    assert found["set aside"] > 150
    assert found["kept"] > 30  # unused bytes


def test_a_flipped_bit_in_the_batches(stopped: Image, place: Path) -> None:
    """Flips in positions, lengths, types, pointers, bodies and counts are found."""
    found = flips(stopped, "spool.db", some(PAGE, len(stopped.files["spool.db"]), 499, 7), place)
    assert found["set aside"] > 100


def test_a_flipped_bit_in_the_log(killed: Image, place: Path) -> None:
    """SQLite silently drops the end of a damaged log; the watermark reveals it. A deletion at the end may be lost."""
    found = flips(killed, "spool.db-wal", some(0, len(killed.files["spool.db-wal"]), 4001, 37), place)
    assert found["set aside"] > 100


def test_a_flipped_bit_while_it_is_open(stopped: Image, killed: Image, place: Path) -> None:
    """Damage after a sound start is found."""
    found = flips(stopped, "spool.db", some(0, len(stopped.files["spool.db"]), 997, 29), place, while_open=True)
    found += flips(
        killed, "spool.db-wal", some(0, len(killed.files["spool.db-wal"]), 9973, 401), place, while_open=True
    )
    assert min(found["set aside"], found["kept"]) > 10


def test_a_flipped_bit_in_the_watermark(stopped: Image, killed: Image, place: Path) -> None:
    """A damaged watermark is ignored, and the spool is unchanged."""
    for image in (stopped, killed):
        assert set(flips(image, "watermark", some(0, 44, 5), place)) == {"kept"}


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def without_a_page(content: bytes) -> bytes:
    return content[: 8 * PAGE] + bytes(PAGE) + content[9 * PAGE :]


def with_pages_swapped(content: bytes) -> bytes:
    return b"".join(content[n * PAGE : (n + 1) * PAGE] for n in (0, 1, 2, 3, 4, 5, 6, 8, 7)) + content[9 * PAGE :]


def emptied(_: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("change", [cut, without_a_page, with_pages_swapped, emptied])
@pytest.mark.parametrize("state", ["stopped", "killed"])
def test_other_damage(
    state: str, change: Callable[[bytes], bytes], place: Path, request: pytest.FixtureRequest
) -> None:
    """Damage by a disk or a file system check is found: files cut, emptied, with pages lost or exchanged."""
    image: Image = request.getfixturevalue(state)
    name = "spool.db" if state == "stopped" else "spool.db-wal"
    assert damage_and_check(image, {name: change(image.files[name])}, directory=place) == "set aside"


def test_an_older_state_of_the_file(clean: Path) -> None:
    """An older, sound state of the file without the newest batches is found."""
    spool = Spool(clean)
    spool.open()
    spool.append([batch(1)])
    spool.close()
    older = (clean / "spool.db").read_bytes()
    spool.open()
    spool.append([batch(2)])
    spool.close()
    (clean / "spool.db").write_bytes(older)
    spool.open()
    assert [each.why for each in spool.damages] == ["the batches from 2 to 2 are missing"]
    spool.close()


def test_another_file_in_its_place(tmp_path: Path) -> None:
    """A spool that an operator saved and put back is read, whatever the watermark says of the other one."""
    spool, saved = Spool(tmp_path / "one"), Spool(tmp_path / "two")
    for each, count in ((spool, 5), (saved, 2)):
        each.path.parent.mkdir()
        each.open()
        each.append([batch(number) for number in range(1, count + 1)])
        each.close()
    shutil.copy(saved.path, spool.path)
    spool.open()
    assert (spool.depth, spool.set_aside) == (2, [])
    spool.close()


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM batches WHERE position = 2",
        "DELETE FROM batches WHERE position = 4",
        "UPDATE batches SET position = 20 WHERE position = 2",
        "UPDATE batches SET position = 20 WHERE position = 4",
        "UPDATE batches SET body = CAST(body AS INTEGER)",
        "UPDATE batches SET body = NULL WHERE position = 2",
        "UPDATE batches SET body = 7.5 WHERE position = 2",
        "UPDATE batches SET checksum = 'x'",
        "UPDATE batches SET previous = NULL",
        "UPDATE queue SET content = NULL",
        "DELETE FROM queue",
        "DROP TABLE batches",
    ],
)
def test_a_change_while_it_is_open(clean: Path, change: str) -> None:
    """A missing, moved or mistyped batch is found when it is read."""
    spool = Spool(clean)
    spool.open()
    spool.append([batch(number) for number in range(1, 5)])
    assert spool._connection is not None
    spool._connection.execute(change)
    with pytest.raises(SpoolDamagedError):
        spool.read(0, 1000, 10**6)
    spool.append([batch(5)])
    assert spool.read(0, 1000, 10**6) == [batch(5)]
    spool.close()


@pytest.mark.parametrize("replaced", [None, 4])
def test_a_lost_newest_batch_before_an_append(clean: Path, replaced: int | None) -> None:
    """An append does not hide a missing batch."""
    spool = Spool(clean)
    spool.open()
    spool.append([batch(number) for number in range(1, 5)])
    assert spool._connection is not None
    spool._connection.execute("DELETE FROM batches WHERE position = 3 OR position = 4")
    spool.append([batch(5)], replaced=replaced)
    with pytest.raises(SpoolDamagedError, match="4 is missing"):
        spool.read(0, 1000, 10**6)
    spool.close()


def test_a_text_value_is_read_as_bytes(clean: Path) -> None:
    """A body of the type text with the same bytes is accepted."""
    spool = Spool(clean)
    spool.open()
    spool.append([batch(1)])
    assert spool._connection is not None
    spool._connection.execute("UPDATE batches SET body = CAST(body AS TEXT)")
    assert spool.read(0, 1000, 10**6) == [batch(1)]
    spool.close()


@pytest.mark.parametrize("name", ["spool.db", "spool.db-wal", "ballast", "watermark", "spool.new/x"])
def test_a_directory_in_the_place_of_a_file(tmp_path: Path, name: str) -> None:
    """The queue works, goes aside, or reports that it can't be written, and nothing else happens."""
    (tmp_path / name).mkdir(parents=True)
    spool = Spool(tmp_path)
    if name == "spool.new/x":
        with pytest.raises(SpoolUnavailableError):
            spool.open()
        assert spool.set_aside == []
    else:
        spool.open()
        spool.append([batch(1)])
        assert len(spool.read(0, 10, 10**6)) == 1
        assert len(spool.set_aside) == (name in {"spool.db", "spool.db-wal"})
    spool.close()


def test_a_directory_in_the_place_of_the_lock(tmp_path: Path) -> None:
    """A directory in the place of the lock is an error that requires operator action."""
    (tmp_path / "lock").mkdir()
    with pytest.raises(ConfigurationError, match="is a directory"):
        Spool(tmp_path).open()


def test_a_damaged_lock(clean: Path) -> None:
    """The lock's content is only for people: a second owner is still refused."""
    first = Spool(clean)
    first.open()
    (clean / "lock").write_bytes(b"\xff\xfe1")
    with pytest.raises(ConfigurationError, match=r"in use by another ingestor\. Stop"):
        Spool(clean).open()
    first.close()


def test_a_file_that_another_process_holds(clean: Path) -> None:
    """A locked file is not damaged."""
    spool = Spool(clean)
    spool.open()
    spool.append([batch(1)])
    spool.close()
    with contextlib.closing(sqlite3.connect(spool.path, isolation_level=None)) as connection:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("BEGIN EXCLUSIVE")
        for _ in range(2):
            with pytest.raises(SpoolUnavailableError, match="locked"):
                spool.open()
    spool.open()
    assert (spool.depth, spool.set_aside) == (1, [])
    spool.close()


def test_a_file_that_may_not_grow(clean: Path) -> None:
    """A limit for the size of files is not damage, although smaller files can be written."""
    spool = Spool(clean)
    spool.open()
    spool.append([batch(1, 2**20)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20 + 2**19, limits[1]))
    try:
        with pytest.raises(SpoolUnavailableError):
            spool.append([batch(2, 2**20)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    spool.append([batch(2, 2**20)])
    assert (spool.depth, spool.set_aside) == (2, [])
    spool.close()


def test_a_disk_that_can_only_be_read(tmp_path: Path) -> None:
    """A file is not damaged because its disk is read-only."""
    with contextlib.ExitStack() as stack:
        try:
            disk = stack.enter_context(small_disk(tmp_path / "disk", 2**25))
        except PermissionError as error:
            pytest.skip(str(error))
        spool = Spool(disk)
        spool.open()
        spool.append([batch(1)])
        spool.close()
        for mode in ("ro", "rw"):
            subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)
            with pytest.raises(SpoolUnavailableError) if mode == "ro" else contextlib.nullcontext():
                spool.open()
        assert (spool.depth, spool.set_aside) == (1, [])
        spool.close()


def test_a_damaged_file_that_can_not_be_renamed(clean: Path) -> None:
    """A damaged file that cannot be renamed counts as a failed disk, and is renamed once that is possible."""
    spool = Spool(clean)
    spool.path.write_bytes(b"no database" * 1000)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(pinned(spool.path))
        except PermissionError as error:
            pytest.skip(str(error))
        for _ in range(2):
            with pytest.raises(SpoolUnavailableError, match="is damaged"):
                spool.open()
    spool.open()
    assert len(spool.set_aside) == 1
    spool.close()


def test_a_disk_that_damages_everything_is_not_filled(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After several damaged files in a day the disk counts as failed until the next day."""
    monkeypatch.setattr("ingestor.buffer.spool.MAX_SET_ASIDE", 3)
    spool = Spool(clean)
    for number in range(3):
        spool.open()
        spool.append([batch(1, 10)])
        spool.close()
        spool.path.write_bytes(b"no database")
        assert len(spool.set_aside) == number
    spool.open()
    assert len(spool.set_aside) == 3
    spool.close()
    spool.path.write_bytes(b"no database")
    for _ in range(2):
        with pytest.raises(SpoolUnavailableError, match="within a day"):
            spool.open()
    for path in clean.glob("spool-damaged-*.db"):
        day = path.name[14:22]
        earlier = date.fromisoformat(day) - timedelta(days=2)
        path.rename(path.with_name(path.name.replace(day, f"{earlier:%Y%m%d}")))
    spool.open()
    assert len(spool.set_aside) == 4
    spool.close()


async def test_a_buffer_over_a_file_that_refuses_writes(stopped: Image, clean: Path) -> None:
    """A header bit that forbids writes is not a full disk: the queue continues with a new file."""
    for name, content in stopped.files.items():
        (clean / name).write_bytes(content)
    with (clean / "spool.db").open("r+b") as file:
        file.seek(18)
        file.write(b"\x42")
    telemetry = Telemetry()
    buffer = Buffer(
        memory_max_bytes=2**20,
        spool_max_bytes=2**30,
        clock=SystemClock(),
        telemetry=telemetry,
        spool=Spool(clean),
        spool_after=3600,
    )
    await buffer.open()
    task = asyncio.create_task(buffer.run())
    buffer.write_failed()
    buffer.put(Batch(SESSION, 1, rows=b"x", count=1, covered_until=10))
    await asyncio.wait_for(buffer.wait_until_safe(), HANG_SECONDS)
    assert buffer.blocked_by is not EndReason.DISK_FULL
    assert [each.covered_until for each in await buffer.take()] == [None]
    assert telemetry.counts.spools_damaged == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await buffer.close()


def batch(number: int, size: int = 1000) -> Entry:
    return Entry(number, Batch(SESSION, number, rows=b"x" * size, count=10))
