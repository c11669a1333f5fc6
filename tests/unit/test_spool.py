from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from itertools import pairwise
from pathlib import Path
from uuid import UUID

import pytest

from ingestor.buffer import spool_file, spool_format
from ingestor.buffer.reserve import BALLAST
from ingestor.buffer.spool import VACUUM_STEP, Entry, Spool, SpoolDamagedError, SpoolUnavailableError
from ingestor.buffer.spool_format import QueueState
from ingestor.errors import ConfigurationError
from ingestor.model import Batch, EndReason, Rejection, Session, SessionEnd
from tests.disks import fill, small_disk

SESSION = Session(UUID(int=1), "test", "ws://localhost/ws", 5)
FULL = Batch(
    SESSION,
    7,
    rows=bytes(range(256)) * 40,
    count=120,
    months=frozenset({date(2026, 3, 1), date(2026, 4, 1)}),
    rejections=(Rejection(3, 17, "not_json", b"\0\xff", 2),),
    authenticated_at=10,
    covered_until=20,
    last_message_at=19,
    end=SessionEnd(21, EndReason.CLOSED, 1006),
    last_tick_at=18,
)


def entry(position: int, size: int = 1000, count: int = 10) -> Entry:
    return Entry(position, Batch(SESSION, position, rows=os.urandom(size), count=count))


def opened(directory: Path) -> Spool:
    spool = Spool(directory)
    spool.open()
    return spool


def full(spool: Spool) -> bool:
    return spool.is_full


def everything(spool: Spool, after: int = 0) -> list[Entry]:
    return spool.read(after, 10**9, 10**12)


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = opened(tmp_path)
    yield spool
    spool.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Return a disk of 40 MiB."""
    with contextlib.ExitStack() as stack:
        try:
            yield stack.enter_context(small_disk(tmp_path / "disk", 40 * 2**20))
        except PermissionError as error:
            pytest.skip(str(error))


def test_a_batch_is_read_back_unchanged(spool: Spool, tmp_path: Path) -> None:
    """Every field is read back, also after a restart."""
    spool.append([Entry(1, FULL), Entry(2, Batch(SESSION, 8))])
    assert everything(spool) == [Entry(1, FULL), Entry(2, Batch(SESSION, 8))]
    spool.close()
    again = opened(tmp_path)
    assert everything(again) == [Entry(1, FULL), Entry(2, Batch(SESSION, 8))]
    assert (again.depth, again.last) == (2, 2)
    again.close()


def test_counts(spool: Spool, tmp_path: Path) -> None:
    """The size is that of the bodies, the same after a restart, and never negative."""
    for position in range(1, 11):
        spool.append([entry(position)])
    assert spool.depth == 10
    assert 10_000 < spool.size < 13_000
    spool.forget(4)
    size = spool.size
    spool.close()
    spool.open()
    assert (spool.depth, spool.size, spool.last) == (6, size, 10)
    spool.forget(10)
    assert (spool.depth, spool.size) == (0, 0)


def test_reading(spool: Spool) -> None:
    """Batches are read oldest first, up to the limits, and at least one."""
    spool.append([entry(position) for position in range(1, 6)])
    assert [e.position for e in spool.read(0, 25, 10**6)] == [1, 2]
    assert [e.position for e in spool.read(2, 10**6, 2600)] == [3, 4]
    assert [e.position for e in spool.read(4, 1, 1)] == [5]
    assert spool.read(5, 1, 1) == []


def test_append_is_idempotent(spool: Spool) -> None:
    """A repeated append with an unknown outcome counts once."""
    entries = [entry(1), entry(2), entry(3)]
    spool.append(entries)
    spool.append(entries[1:])
    assert everything(spool) == entries
    assert spool.depth == 3


def test_a_heartbeat_is_replaced(spool: Spool) -> None:
    """A newer heartbeat replaces the older one."""
    spool.append([entry(1), Entry(2, Batch(SESSION, 2, covered_until=5))])
    spool.append([Entry(3, Batch(SESSION, 3, covered_until=6))], replaced=2)
    assert [e.position for e in everything(spool)] == [1, 3]
    assert spool.depth == 2


def test_the_file_shrinks(spool: Spool, tmp_path: Path) -> None:
    """After the queue has drained, space is given back in small steps, so that no caller waits long."""
    for position in range(1, 81):
        spool.append([entry(position, 500_000)])
    while spool.depth:
        entries = spool.read(0, 10**9, 2**20)
        spool.forget(entries[-1].position)
    files = [tmp_path / name for name in ("spool.db", "spool.db-wal")]
    sizes = []
    while spool.is_slack:
        spool.shrink()
        sizes.append(sum(file.stat().st_size for file in files if file.exists()))
    assert len(sizes) >= 2
    assert max(before - after for before, after in pairwise(sizes)) <= VACUUM_STEP * 4096 + 2**20
    assert sizes[-1] < 6 * 2**20


def test_only_the_owner_can_read_it(spool: Spool, tmp_path: Path) -> None:
    """Prices of a paid feed are readable only by their owner."""
    spool.append([entry(1)])
    for name in ("spool.db", "spool.db-wal"):
        assert (tmp_path / name).stat().st_mode & 0o077 == 0


def test_one_owner(spool: Spool, tmp_path: Path) -> None:
    """A second owner, in any process, is refused with the remedy, and the first one continues."""
    with pytest.raises(ConfigurationError, match=rf"in use by another ingestor \(process {os.getpid()}\)"):
        Spool(tmp_path).open()
    spool.append([entry(1)])
    spool.close()
    opened(tmp_path).close()


def test_a_newer_format_is_not_touched(spool: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a downgrade the daemon reports the newer format; the check needs no table but `queue`."""
    spool.close()
    monkeypatch.setattr(spool_format, "FORMAT", 2)
    with contextlib.closing(sqlite3.connect(tmp_path / "spool.db")) as connection:
        spool_file.write_state(connection, QueueState.new())
        connection.execute("ALTER TABLE batches RENAME TO shards")
        connection.commit()
    monkeypatch.undo()
    before = (tmp_path / "spool.db").read_bytes()
    newer = Spool(tmp_path)
    with pytest.raises(ConfigurationError, match="newer version"):
        newer.open()
    newer.close()
    assert (tmp_path / "spool.db").read_bytes() == before


def test_a_newer_format_without_its_proof_is_damage(spool: Spool, tmp_path: Path) -> None:
    """A flipped bit is not taken for a newer version."""
    spool.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "spool.db")) as connection:
        connection.execute("UPDATE queue SET format = 3")
        connection.execute("PRAGMA user_version = 128")
        connection.commit()
    spool.open()
    assert len(spool.set_aside) == 1
    spool.append([entry(1)])
    assert len(everything(spool)) == 1


@pytest.mark.parametrize("damage", ["header", "middle", "cut", "not a database"])
def test_a_damaged_file_is_set_aside(tmp_path: Path, damage: str) -> None:
    """A damaged file keeps its content under another name, and an empty queue replaces it."""
    spool = opened(tmp_path)
    for position in range(1, 101):
        spool.append([entry(position, 5000)])
    spool.close()
    path = tmp_path / "spool.db"
    content = bytearray(path.read_bytes())
    if damage == "header":
        content[:16] = b"\xaa" * 16
    elif damage == "middle":
        content[8192:200_000] = b"\xaa" * (200_000 - 8192)
    elif damage == "cut":
        del content[len(content) // 2 :]
    else:
        content[:] = b"this is no database" * 1000
    path.write_bytes(content)
    spool.open()
    (aside,) = spool.set_aside
    assert aside.read_bytes() == content
    assert spool.depth == 0
    spool.append([entry(1)])
    assert len(everything(spool)) == 1
    spool.close()
    spool.open()
    assert len(everything(spool)) == 1
    assert spool.set_aside == [aside]
    spool.close()


def test_an_empty_file_is_an_empty_queue(tmp_path: Path) -> None:
    """A file left empty by a crash is not damaged."""
    (tmp_path / "spool.db").touch()
    spool = Spool(tmp_path)
    spool.open()
    assert spool.set_aside == []
    assert spool.depth == 0
    spool.close()


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    """Checks beyond SQLite's find a changed batch, which is never returned."""
    spool = opened(tmp_path)
    spool.append([entry(1), entry(2)])
    assert spool._connection is not None
    spool._connection.execute("UPDATE batches SET body = zeroblob(length(body)) WHERE position = 2")
    assert [e.position for e in spool.read(0, 10, 1)] == [1]
    with pytest.raises(SpoolDamagedError) as caught:
        everything(spool)
    assert caught.value.path.exists()
    assert (spool.depth, everything(spool)) == (0, [])
    spool.append([entry(3)])
    spool.close()


def test_damage_while_running(spool: Spool, tmp_path: Path) -> None:
    """Damage found later is handled in the same way, with the log beside the file."""
    spool.append([entry(position, 5000) for position in range(1, 200)])
    spool.close()
    spool.open()
    with (tmp_path / "spool.db").open("r+b") as file:
        file.seek(4096)
        file.write(b"\xaa" * 400_000)
    assert spool._connection is not None
    spool._connection.execute("PRAGMA shrink_memory")
    with pytest.raises(SpoolDamagedError) as caught:
        everything(spool)
    assert caught.value.path.stat().st_size > 400_000
    spool.append([entry(1)])
    assert len(everything(spool)) == 1


_KILLED = """
import sys
from pathlib import Path
from tests.unit.test_spool import entry, opened
spool = opened(Path(sys.argv[1]))
position = 0
while True:
    position += 1
    spool.append([entry(position, 20_000)])
    print(position, flush=True)
    if position % 5 == 0:
        spool.forget(position - 5)
"""


@pytest.mark.parametrize("after", [1, 7, 23])
def test_a_killed_process(tmp_path: Path, after: int) -> None:
    """After SIGKILL every completed append is present, and the file is sound."""
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(after)]
    process.send_signal(signal.SIGKILL)
    said += process.stdout.readlines()
    process.wait()
    process.stdout.close()
    last = int(said[-1])
    spool = Spool(tmp_path)
    spool.open()
    assert spool.set_aside == []
    positions = [e.position for e in everything(spool)]
    assert positions == list(range(positions[0], positions[-1] + 1))
    assert positions[-1] in {last, last + 1}
    spool.close()


def test_the_ballast_is_there(spool: Spool, tmp_path: Path) -> None:
    """The ballast of 16 MiB lies beside the file, and really takes the space."""
    status = (tmp_path / "ballast").stat()
    assert status.st_size == BALLAST
    assert status.st_blocks * 512 >= BALLAST


def test_a_full_disk(disk: Path) -> None:
    """With the ballast's space the queue continues: it fills it, and can delete. Later the ballast is restored."""
    spool = opened(disk)
    spool.append([entry(position, 100_000) for position in range(1, 31)])
    filler = fill(disk)
    assert not full(spool)
    spool.append([entry(31, 100_000)])
    assert full(spool)
    assert not (disk / "ballast").exists()
    spool.forget(30)
    assert [e.position for e in everything(spool)] == [31]
    spool.restore_reserve()
    assert full(spool)
    filler.unlink()
    spool.restore_reserve()
    assert not full(spool)
    assert (disk / "ballast").stat().st_size == BALLAST
    spool.close()


def test_a_disk_that_stays_full(disk: Path) -> None:
    """A batch without space is refused, stored ones stay, and the queue continues when there is space."""
    spool = opened(disk)
    spool.append([entry(1)])
    filler = fill(disk)
    with pytest.raises(SpoolUnavailableError, match="full"):
        spool.append([entry(2, 30_000_000)])
    filler = fill(disk)
    with pytest.raises(SpoolUnavailableError):
        spool.append([entry(2, 30_000_000)])
    assert [e.position for e in everything(spool)] == [1]
    assert spool.depth == 1
    filler.unlink()
    spool.append([entry(2, 100_000)])
    assert [e.position for e in everything(spool)] == [1, 2]
    spool.close()


def test_a_full_disk_at_the_start(disk: Path) -> None:
    """On a disk that is full from the start, an earlier process's batches can be read and deleted."""
    spool = opened(disk)
    spool.append([entry(position, 50_000) for position in range(1, 21)])
    spool.close()
    fill(disk)
    spool.open()
    assert len(everything(spool)) == 20
    spool.forget(20)
    assert spool.depth == 0
    spool.close()
