from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from ingestor.batch import Batcher
from ingestor.clock import to_datetime
from ingestor.model import SECOND, Micros, Session, Tick
from ingestor.simulator.server import Account
from ingestor.store.connect import connect
from ingestor.store.ticks import TickStore
from tests.chaos.__main__ import shortcomings
from tests.chaos.audit import Skew, Verdict, audit
from tests.chaos.backup import Backup
from tests.chaos.faults import KINDS, schedule
from tests.chaos.readers import Reader, Readers
from tests.relays import Seen
from tests.servers import query

T0: Micros = 1_790_000_000 * SECOND
TICKS = [Tick("AIR.NZ", T0 + number * SECOND, 1.5, 100) for number in range(10)]


def account(ticks: list[Tick] = TICKS, begin: int = -1) -> Account:
    """Return a connection that was sent ticks as they happened."""
    connection: Any = None
    result = Account(1, connection, authenticated_at=T0 + begin * SECOND, port=1)
    result.ticks = list(ticks)
    result.sent_at = array("q", [tick.time for tick in ticks])
    return result


async def record(url: str, ticks: list[Tick], until: float, *, begin: int = 0) -> UUID:
    """Record a session that stores ticks and claims the time from second `begin` to second `until`."""
    batcher = Batcher(Session(uuid4(), "one", "ws://x/ws", T0), max_rows=100, occurrence_keys=100)
    batcher.authenticated(T0 + begin * SECOND)
    for tick in ticks:
        batcher.add(tick, T0 + begin * SECOND)
    batcher.cover(T0 + round(until * SECOND))
    store = TickStore(url, write_timeout=10)
    await store.write([batcher.close()])
    await store.close()
    return batcher.session.id


async def verdict_of(url: str, *accounts: Account, made: list[Tick] = TICKS, skews: Sequence[Skew] = ()) -> Verdict:
    return await audit(url, {"one": list(accounts)}, [tick.time for tick in made], margin=0.0, skews=skews)


async def test_a_kept_promise(writer_url: str, database: str) -> None:
    """Everything sent is stored and covered."""
    await record(writer_url, TICKS, 9.5)
    verdict = await verdict_of(database, account())
    assert verdict == Verdict(10, 10, 0, 0, 0, 1.0, ())
    assert verdict.holds


async def test_a_loss_inside_a_gap(writer_url: str, database: str) -> None:
    """Ticks that were sent after the end of the coverage may be missing."""
    await record(writer_url, TICKS[:7], 6.5)
    verdict = await verdict_of(database, account())
    assert verdict == Verdict(10, 7, 3, 0, 0, 0.7, ())
    assert verdict.holds


async def test_a_loss_outside_a_gap(writer_url: str, database: str) -> None:
    """A missing tick within the coverage breaks the promise."""
    await record(writer_url, TICKS[:4] + TICKS[5:], 9.5)
    verdict = await verdict_of(database, account())
    assert (verdict.lost_outside, verdict.lost_in_gaps) == (1, 0)
    assert not verdict.holds


@pytest.mark.parametrize("what", ["ticks", "duplicates", "rejected"])
async def test_a_batch_counted_twice(writer_url: str, database: str, what: str) -> None:
    """Wrong counts of a session break the promise."""
    await record(writer_url, TICKS, 9.5)
    connection = await connect(database)
    await connection.execute(f"UPDATE ingest.stream_sessions SET {what} = {what} + 1")
    await connection.close()
    assert len((await verdict_of(database, account())).claims) == 1


async def test_a_missing_equal_tick(writer_url: str, database: str) -> None:
    """Two equal trades received on one connection are two rows."""
    twins = [TICKS[0], TICKS[0], *TICKS[1:]]
    await record(writer_url, TICKS, 9.5)
    assert (await verdict_of(database, account(twins), made=twins)).lost_outside == 1


@pytest.mark.parametrize("change", ["4", "0"])
async def test_an_extra_row(writer_url: str, database: str, change: str) -> None:
    """A copied row, or a skipped number, breaks the promise."""
    await record(writer_url, TICKS, 9.5)
    connection = await connect(database)
    if change == "0":
        await connection.execute(
            "UPDATE market.ticks SET occurrence = 2 WHERE time = (SELECT min(time) FROM market.ticks)"
        )
    else:
        await connection.execute(
            "INSERT INTO market.ticks SELECT time, received_at, price, volume, 2, symbol FROM market.ticks LIMIT 1"
        )
    await connection.close()
    verdict = await verdict_of(database, account())
    assert verdict.twice == 1
    assert not verdict.holds


async def test_a_claim_without_a_connection(writer_url: str, database: str) -> None:
    """A claim without a connection breaks the promise, even if no other instance received the ticks."""
    await record(writer_url, TICKS[:5], 9.5)
    verdict = await verdict_of(database, account(TICKS[:5]))
    assert (verdict.lost_outside, len(verdict.claims)) == (0, 1)
    assert not verdict.holds


async def test_a_claim_before_a_connection(writer_url: str, database: str) -> None:
    """A claim before the acceptance of the token breaks the promise."""
    await record(writer_url, TICKS, 9.5)
    verdict = await verdict_of(database, account(begin=1))
    assert len(verdict.claims) == 1


@pytest.mark.parametrize("ahead", [-90, 90])
async def test_claims_of_a_wrong_clock_are_shifted(writer_url: str, database: str, ahead: int) -> None:
    """A claim of a wrong clock is checked after it was shifted to the right time."""
    skew = Skew(frozenset({await record(writer_url, TICKS, ahead + 9.5, begin=ahead)}), ahead)
    assert await verdict_of(database, account(), skews=[skew]) == Verdict(10, 10, 0, 0, 0, 1.0, ())
    assert (await verdict_of(database, account(TICKS[:5]), skews=[skew])).claims


def test_the_sessions_of_a_wrong_clock_are_in_its_log(tmp_path: Path) -> None:
    """Sessions that the daemon wrote for its predecessor are not counted, although its log names them."""
    mine, other = uuid4(), uuid4()
    log = tmp_path / "log"
    log.write_text(
        f'{{"event": "connected", "session": "{mine}"}}\n{{"event": "spool_drained", "session": "{other}"}}\nTraceb'
    )
    assert Skew.of(log, 5.0).sessions == {mine}


async def test_a_restored_backup(writer_url: str, database: str) -> None:
    """After a restore later rows are gone, and no session claims them."""
    early = await record(writer_url, TICKS[:6], 5.5)
    backup = await Backup.take(database)
    await record(writer_url, TICKS, 9.5)
    await backup.restore(database)
    assert await query(database, "SELECT id, ticks FROM ingest.stream_sessions") == [(early, 6)]
    assert await verdict_of(database, account()) == Verdict(10, 6, 4, 0, 0, 0.6, ())


async def test_a_lost_first_of_two_equal_ticks(writer_url: str, database: str) -> None:
    """If the database lost the first of two equal ticks, that is a loss, not a copy."""
    await record(writer_url, [TICKS[0], TICKS[0]], -1)
    connection = await connect(database)
    await connection.execute("DELETE FROM market.ticks WHERE occurrence = 1")
    await connection.close()
    verdict = await verdict_of(database, account([TICKS[0], TICKS[0]]))
    assert (verdict.twice, verdict.lost_in_gaps) == (0, 1)


def test_the_seed_determines_the_schedule() -> None:
    """A failing seed can be repeated; every kind occurs once in a round."""
    faults = schedule(5, 100, without=set())
    assert faults == schedule(5, 100, without=set())
    assert faults != schedule(6, 100, without=set())
    assert {fault.kind for fault in faults[: len(KINDS)]} == set(KINDS)
    assert not {fault.kind for fault in schedule(5, 100, without={"feed mute"})} & {"feed mute"}


def test_an_eight_minute_run_has_enough_faults() -> None:
    """Divided between two editions, eight minutes hold enough faults of each kind on each."""
    for seed in range(5):
        half = schedule(seed, 240, without=set())
        assert sum(fault.pause for fault in half) == pytest.approx(240, rel=0.15)
        done = Counter(fault.kind for fault in half)
        assert not shortcomings([done, done])


@pytest.mark.parametrize(
    ("change", "words"), [(0, ""), (1, "lacks 0 ticks, and has 1 too many"), (-1, "lacks 1 ticks")]
)
def test_a_client_of_a_relay(tmp_path: Path, change: int, words: str) -> None:
    """The audit reports a tick that a client of a relay lacks or has twice, in its range and of its symbols only."""
    readers = Readers("postgresql://a@localhost/b", [], tmp_path, 1, {})
    reader = Reader("client 1", {}, T0, frozenset({"AIR.NZ"}), random.Random(1))
    readers.readers.append(reader)
    at = to_datetime(T0).isoformat(timespec="microseconds")[:26] + "Z"
    mine: Seen = ("AIR.NZ", at, 1.5, 100, 1)
    rows = Counter([mine, ("FPH.NZ", at, 1.5, 100, 1), ("AIR.NZ", "2020" + at[4:], 1.5, 100, 1)])
    reader.seen = Counter({mine: 1 + change})
    assert words in "".join(readers._wrong(rows))
    assert bool(readers._wrong(rows)) == bool(change)
