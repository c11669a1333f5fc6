from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from ingestor.admin.migrate import head_revision
from ingestor.batch import Batcher
from ingestor.clock import from_datetime, to_datetime
from ingestor.errors import SchemaError, StoreError
from ingestor.model import SECOND, Batch, EndReason, Micros, Reason, Session, SessionEnd, Tick
from ingestor.store.connect import connect
from ingestor.store.connection import GuardedConnection
from ingestor.store.ticks import TickStore, WriteResult
from ingestor.store.version import SCHEMA_REVISION
from ingestor.stream.decoder import Decoder
from tests.clocks import HANG_SECONDS
from tests.proxy import Proxy
from tests.servers import TestServer, query

T0: Micros = from_datetime(datetime(2026, 3, 2, tzinfo=UTC))


def session(**changes: Any) -> Session:
    return Session(**{"id": uuid4(), "instance": "test", "endpoint": "ws://x/ws", "connected_at": T0, **changes})


def batcher(of: Session | None = None) -> Batcher:
    return Batcher(of or session(), max_rows=5000, occurrence_keys=1000)


def filled(instance: Batcher, *ticks: Tick, rejected: int = 0) -> Batch:
    for number, tick in enumerate(ticks):
        instance.add(tick, T0 + number)
    for number in range(rejected):
        instance.reject(b"\0\xff{", Reason.NOT_JSON, T0 + 100 + number)
    return instance.close()


def tick(symbol: str = "AIR.NZ", time: Micros = T0, price: float = 1.5, volume: int = 10) -> Tick:
    return Tick(symbol, time, price, volume)


@pytest.fixture
async def store(writer_url: str) -> Any:
    """Yield a store that uses the daemon's login."""
    store = TickStore(writer_url, write_timeout=10)
    yield store
    await store.close()


async def test_a_batch_is_stored_completely(store: TickStore, database: str) -> None:
    """Ticks, rejections, coverage and counts are committed together."""
    instance = batcher()
    instance.authenticated(T0)
    batch = filled(instance, tick(), tick(), tick("Ω.NZ", T0 + 1, 1e300, 2**63 - 1), rejected=2)
    assert await store.write([batch]) == WriteResult(batches=1, ticks=3, duplicates=0, rejected=2)
    rows = await query(database, "SELECT symbol, price, volume, occurrence FROM market.ticks ORDER BY received_at")
    assert rows == [
        ("AIR.NZ", 1.5, 10, 1),
        ("AIR.NZ", 1.5, 10, 2),
        ("Ω.NZ", 1e300, 2**63 - 1, 1),
    ]
    (found,) = await query(
        database,
        "SELECT ticks, rejected, duplicates, last_batch, authenticated_at, covered_until, last_message_at, "
        "last_tick_at, ended_at FROM ingest.stream_sessions",
    )
    start = to_datetime(T0)
    last, last_tick = start.replace(microsecond=101), start.replace(microsecond=2)
    assert found == (3, 2, 0, 1, start, last, last, last_tick, None)
    assert await query(database, "SELECT position, reason, raw, raw_bytes FROM ingest.rejected_messages") == [
        (4, "not_json", b"\0\xff{", 3),
        (5, "not_json", b"\0\xff{", 3),
    ]


async def test_a_repeated_batch_changes_nothing(store: TickStore, database: str) -> None:
    """A commit with an unknown outcome is resolved by a second write."""
    instance = batcher()
    batches = [filled(instance, tick(), rejected=1), filled(instance, tick("SPK.NZ"))]
    await store.write(batches[:1])
    before = await query(database, "SELECT s.*, s.xmin::text FROM ingest.stream_sessions s")
    assert await store.write(batches[:1]) == WriteResult()
    assert await query(database, "SELECT s.*, s.xmin::text FROM ingest.stream_sessions s") == before
    assert await store.write(batches) == WriteResult(1, 1, 0, 0)
    assert await store.write(batches) == WriteResult()
    assert await query(database, "SELECT count(*) FROM market.ticks") == [(2,)]
    assert await query(database, "SELECT count(*) FROM ingest.rejected_messages") == [(1,)]
    assert await query(database, "SELECT ticks, rejected FROM ingest.stream_sessions") == [(2, 1)]


async def test_another_session_adds_no_copies(store: TickStore, database: str) -> None:
    """The union of two recordings holds each tick as often as the recording with more of it."""
    await store.write([filled(batcher(), tick(), tick(), tick("SPK.NZ"))])
    written = await store.write([filled(batcher(), tick(), tick(), tick(), tick("NEW.NZ"))])
    assert written == WriteResult(1, 4, 2, 0)
    rows = await query(database, "SELECT symbol, count(*) FROM market.ticks GROUP BY symbol ORDER BY symbol")
    assert rows == [("AIR.NZ", 3), ("NEW.NZ", 1), ("SPK.NZ", 1)]


async def test_sessions_are_joined_in_one_transaction(store: TickStore, database: str) -> None:
    """Batches of several sessions are written in order; each session counts its own."""
    one, two = batcher(), batcher()
    batches = [
        filled(one, tick()),
        filled(one, tick("B")),
        filled(two, tick()),
        filled(two, tick("C"), rejected=1),
    ]
    assert await store.write(batches) == WriteResult(4, 4, 1, 1)
    rows = await query(database, "SELECT ticks, duplicates, rejected FROM ingest.stream_sessions ORDER BY rejected")
    assert rows == [(2, 0, 0), (2, 1, 1)]


async def test_months_are_made_on_demand(store: TickStore, database: str) -> None:
    """A role that owns nothing can store a tick of any month since 1990."""
    times = [datetime(1990, 1, 1, tzinfo=UTC), datetime(2001, 12, 31, 23, 59, 59, tzinfo=UTC), datetime.now(UTC)]
    ticks = [tick(time=from_datetime(time.replace(microsecond=0))) for time in times]
    await store.write([filled(batcher(), *ticks)])
    rows = await query(database, "SELECT time FROM market.ticks ORDER BY time")
    assert [row[0] for row in rows] == [time.replace(microsecond=0) for time in times]


async def test_a_dropped_partition_is_recreated(store: TickStore, database: str, server: Any) -> None:
    """If retention drops a month while the daemon runs, the next write fails once and then recreates it."""
    if server.edition != "plain":
        assert server.edition == "timescale"  # chunks are made automatically
        return
    instance = batcher()
    await store.write([filled(instance, tick())])
    connection = await connect(database)
    await connection.execute("DROP TABLE market.ticks_2026_03")
    await connection.close()
    batch = filled(instance, tick("B"))
    with pytest.raises(StoreError) as caught:
        await store.write([batch])
    assert (caught.value.sqlstate, caught.value.constraint) == ("23514", None)
    assert (await store.write([batch])).ticks == 1


async def test_the_end_of_a_session(store: TickStore, database: str) -> None:
    """The last batch closes the session with its reason; a session that writes again is open again."""
    instance = batcher()
    await store.write([filled(instance, tick())])
    await store.write([instance.close(SessionEnd(T0 + 5, EndReason.CLOSED, 1001))])
    sql = "SELECT end_reason, close_code, ended_at IS NULL FROM ingest.stream_sessions"
    assert await query(database, sql) == [("closed", 1001, False)]
    await store.write([filled(instance, tick("B"))])
    assert await query(database, sql) == [(None, None, True)]


async def test_crashed_sessions(store: TickStore, database: str) -> None:
    """A successor ends its instance's other sessions at their last sign of life, whatever its clock says."""
    old, mine, other = batcher(), batcher(session(connected_at=T0 - 10)), batcher(session(instance="other"))
    old.authenticated(T0)
    await store.write(
        [filled(old, tick(), tick()), filled(mine), filled(other), filled(batcher(session(kind="replay")))]
    )
    assert await store.end_crashed_sessions("test", [mine.session.id]) == 1
    rows = await query(
        database, "SELECT id, end_reason, ended_at FROM ingest.stream_sessions WHERE ended_at IS NOT NULL"
    )
    assert rows == [(old.session.id, "crashed", to_datetime(T0).replace(microsecond=1))]
    assert await store.end_crashed_sessions("test", [mine.session.id]) == 0


async def test_no_schema(empty_database: str) -> None:
    """A database without the schema is reported to need `ingestor migrate`."""
    store = TickStore(empty_database, write_timeout=10)
    with pytest.raises(SchemaError, match="ingestor migrate"):
        await store.write([filled(batcher(), tick())])
    await store.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("UPDATE ingest.alembic_version SET version_num = '0000'", "0000.*ingestor migrate"),
        ("UPDATE ingest.settings SET minimum_version = '99.0'", "99.0"),
        ("DELETE FROM ingest.alembic_version", "ingestor migrate"),
    ],
)
async def test_unfit_schema(database: str, writer_url: str, change: str, words: str) -> None:
    """An older schema, and a newer one that needs a newer daemon, are refused with the remedy."""
    connection = await connect(database)
    await connection.execute(change)
    await connection.close()
    with pytest.raises(SchemaError, match=words):
        await TickStore(writer_url, write_timeout=10).open()


async def test_a_newer_schema_is_accepted(database: str, writer_url: str) -> None:
    """A newer schema is accepted unless it needs a newer daemon."""
    connection = await connect(database)
    await connection.execute("UPDATE ingest.alembic_version SET version_num = '9999'")
    await connection.close()
    store = TickStore(writer_url, write_timeout=10)
    await store.write([filled(batcher(), tick())])
    await store.close()


async def test_a_server_that_hangs_is_given_up(writer_url: str, database: str) -> None:
    """A write that waits for a lock longer than the timeout fails, and the next one opens a new connection."""
    store = TickStore(writer_url, write_timeout=HANG_SECONDS)
    instance = batcher()
    batch = filled(instance, tick())
    await store.write([batch])
    assert store._guarded is not None
    store._guarded._seconds = 0.3  # of this connection only
    blocker = await connect(database)
    async with blocker.transaction():
        await blocker.execute("LOCK TABLE ingest.stream_sessions IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(StoreError):
            await store.write([filled(instance, tick("B"))])
    await blocker.close()
    assert (await store.write([batch, filled(instance, tick("C"))])).ticks == 1
    await store.close()


@pytest.mark.parametrize("how", ["half-open", "reset"])
async def test_a_server_that_stops_reading(writer_url: str, database: str, how: str) -> None:
    """A large write to a peer that does not read, or is gone, times out."""
    instance = batcher()
    batches = [filled(instance, *(tick("X" * 30, T0 + n, 1.0, v) for v in range(20_000))) for n in range(4)]
    async with Proxy(writer_url) as proxy:
        store = TickStore(proxy.url, write_timeout=1)
        await store.write([filled(batcher(), tick("FIRST"))])  # only the body is left to send
        proxy.hold_after = 500_000
        if how == "reset":
            asyncio.get_running_loop().call_later(0.5, proxy.cut)
        with pytest.raises(StoreError):
            await asyncio.wait_for(store.write(batches), HANG_SECONDS)
        proxy.cut()
        proxy.release()
        store._write_timeout = 60
        await store.write(batches)
        await store.close()
    assert await query(database, "SELECT count(*) FROM market.ticks") == [(80_001,)]


async def test_a_terminated_connection_is_reopened(store: TickStore, database: str) -> None:
    """A restart of the server costs one failed write and no tick."""
    instance = batcher()
    await store.write([filled(instance, tick())])
    connection = await connect(database)
    await connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
        "AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
    )
    await connection.close()
    batch = filled(instance, tick("B"))
    with contextlib.suppress(StoreError):  # unless the end of the connection was noticed before
        await store.write([batch])
    await store.write([batch])
    assert await query(database, "SELECT count(*), max(last_batch) FROM market.ticks, ingest.stream_sessions") == [
        (2, 2)
    ]


async def constrain(database: str, condition: str) -> None:
    """Add a constraint, as a careful administrator might."""
    connection = await connect(database)
    await connection.execute(f"ALTER TABLE market.ticks ADD CONSTRAINT local_rule CHECK ({condition})")
    await connection.close()


async def test_one_refused_row(store: TickStore, database: str) -> None:
    """The valid rows are committed; the refused one becomes a rejection among the batch's own."""
    await constrain(database, "price > 0")
    instance = batcher()
    instance.authenticated(T0)
    instance.add(tick(volume=1), T0 + 1)
    instance.reject(b"nonsense", Reason.NOT_JSON, T0 + 2)
    instance.add(tick(volume=2), T0 + 3)
    instance.add(tick("Ω.NZ", T0 + 5 * SECOND, -2.5, 3), T0 + 4)
    instance.add(tick(volume=4), T0 + 5)
    bad, good = instance.close(), filled(instance, tick("B"))
    written = await store.write([bad, good])
    assert written == WriteResult(2, 4, 0, 2, ("database:23514",))
    assert await query(database, "SELECT symbol, volume FROM market.ticks ORDER BY received_at, symbol") == [
        ("B", 10), ("AIR.NZ", 1), ("AIR.NZ", 2), ("AIR.NZ", 4)
    ]  # fmt: skip
    rows = await query(
        database,
        "SELECT batch, position, received_at, reason, raw, raw_bytes FROM ingest.rejected_messages ORDER BY position",
    )
    message = (
        '{"type": "price", "data": {"date": "2026-03-02T00:00:05+00:00", "price": -2.5, "volume": 3, "symbol": "Ω.NZ"}}'
    ).encode()
    start = to_datetime(T0)
    assert rows == [
        (1, 2, start.replace(microsecond=2), "not_json", b"nonsense", 8),
        (1, 4, start.replace(microsecond=4), "database:23514", message, len(message)),
    ]
    assert isinstance(Decoder("Pacific/Auckland").decode(message, T0), Tick)
    sql = "SELECT ticks, duplicates, rejected, last_batch, covered_until FROM ingest.stream_sessions"
    (session,) = await query(database, sql)
    assert session == (4, 0, 2, 2, start.replace(microsecond=5))
    assert await store.write([bad, good]) == WriteResult()
    assert await query(database, sql) == [session]


async def test_several_refused_rows(store: TickStore, database: str) -> None:
    """Ten rows, or one in a hundred of a large batch, are refused one by one: 20 of 2,000."""
    await constrain(database, "volume % 100 <> 7")
    written = await store.write([filled(batcher(), *(tick(volume=number) for number in range(2000)))])
    assert (written.ticks, written.duplicates, written.rejected) == (1980, 0, 20)
    assert await query(database, "SELECT count(*) FROM market.ticks") == [(1980,)]


@pytest.mark.parametrize(("count", "most"), [(20, 10), (1999, 19)])
async def test_too_many_refused_rows(store: TickStore, database: str, count: int, most: int) -> None:
    """Beyond that limit no row is rejected and nothing is committed until an operator acts."""
    await constrain(database, "price > 2")
    batch = filled(batcher(), *(tick(volume=number) for number in range(count)))
    with pytest.raises(StoreError, match=f"refuses more than {most} of a batch's {count} ticks"):
        await store.write([batch])
    assert await query(database, "SELECT count(*) FROM market.ticks") == [(0,)]
    assert await query(database, "SELECT count(*) FROM ingest.rejected_messages") == [(0,)]
    connection = await connect(database)
    await connection.execute("ALTER TABLE market.ticks DROP CONSTRAINT local_rule")
    await connection.close()
    assert (await store.write([batch])).ticks == count


async def test_small_batches_keep_their_valid_rows(store: TickStore, database: str) -> None:
    """Over many batches ten rows are refused one by one, then one in a hundred."""
    await constrain(database, "price > 2")
    instance = batcher()
    for number in range(10):
        assert (await store.write([filled(instance, tick(volume=number))])).rejected == 1
    bad = filled(instance, tick(volume=10))
    with pytest.raises(StoreError, match="lately more than 1% of all"):
        await store.write([bad])
    await store.write([filled(batcher(), *(tick(volume=number, price=3.0) for number in range(100)))])
    assert (await store.write([bad])).rejected == 1
    with pytest.raises(StoreError, match="lately more than 1% of all"):
        await store.write([filled(instance, tick(volume=11))])


async def test_a_session_that_outlives_its_other_end(store: TickStore) -> None:
    """The server notices within a minute that a connection's client is gone, not after TCP's default time."""
    async with store._turn(await store.open()) as connection:
        assert await connection.fetchval("SHOW tcp_keepalives_idle") == "30"
        assert await connection.fetchval("SHOW tcp_user_timeout") == "60000"
        assert await connection.fetchval("SHOW idle_in_transaction_session_timeout") == "1min"


async def test_a_connection_that_is_given_up_at_any_moment(writer_url: str) -> None:
    """Whenever the write is aborted, the result is an error of ours or the answer."""
    chance = random.Random(5)
    ended = Counter[str]()
    for _ in range(60):
        guarded = GuardedConnection(await connect(writer_url), 10)

        async def use(guarded: GuardedConnection = guarded) -> None:
            async with guarded as connection:
                for number in range(50):
                    await connection.fetchval(f"SELECT {number}, $1::int", number)

        using = asyncio.create_task(use())
        # The abort may fall between an answer and the task that waits for it.
        for _ in range(chance.randrange(400)):
            await asyncio.sleep(0)
        await guarded.give_up()
        (result,) = await asyncio.gather(using, return_exceptions=True)
        assert result is None or isinstance(result, StoreError)
        ended[type(result).__name__] += 1
        guarded.connection.terminate()
    assert ended["StoreError"] > 10


async def test_a_detached_partition(store: TickStore, database: str, server: TestServer) -> None:
    """A detached month cannot be written to; the error names the remedy, which works."""
    if server.edition != "plain":
        pytest.skip("a hypertable has chunks")
    await store.write([filled(batcher(), tick())])
    admin = await connect(database)
    await admin.execute("ALTER TABLE market.ticks DETACH PARTITION market.ticks_2026_03")
    batch = filled(batcher(), tick(volume=11))
    with pytest.raises(StoreError, match="attach it again, or rename it"):
        await store.write([batch])
    await admin.execute("ALTER TABLE market.ticks_2026_03 RENAME TO apart")
    assert (await store.write([batch])).ticks == 1
    await admin.close()


async def test_a_refused_row_beside_one_that_is_there(store: TickStore, database: str) -> None:
    """Duplicates are counted as such while a batch is in quarantine."""
    await store.write([filled(batcher(), tick(), tick("B"))])
    await constrain(database, "symbol <> 'BAD'")
    written = await store.write([filled(batcher(), tick(), tick("BAD"), tick("B"), tick("C"))])
    assert written == WriteResult(1, 3, 2, 1, ("database:23514",))
    assert await query(database, "SELECT count(*) FROM market.ticks") == [(3,)]


async def test_errors_that_no_row_causes_never_quarantine_the_batch(store: TickStore, database: str) -> None:
    """After an unknown error the whole batch is retried; nothing is rejected."""
    connection = await connect(database)
    await connection.execute(
        "CREATE FUNCTION market.refuse() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN IF new.volume = 7 THEN RAISE 'no sevens'; END IF; RETURN new; END $$;"
        "CREATE TRIGGER refuse BEFORE INSERT ON market.ticks FOR EACH ROW EXECUTE FUNCTION market.refuse()"
    )
    with pytest.raises(StoreError, match="no sevens") as caught:
        await store.write([filled(batcher(), tick(), tick(volume=7))])
    assert caught.value.sqlstate == "P0001"
    assert await query(database, "SELECT count(*) FROM ingest.rejected_messages") == [(0,)]
    await connection.close()


async def test_the_writer_owns_nothing(writer_url: str) -> None:
    """The daemon's login can neither change nor remove recorded data."""
    connection = await connect(writer_url)
    for statement in (
        "DELETE FROM market.ticks",
        "UPDATE market.ticks SET price = 0",
        "TRUNCATE market.ticks",
        "DROP TABLE market.ticks",
        "CREATE TABLE market.mine (x int)",
        "DELETE FROM ingest.stream_sessions",
        "DELETE FROM ingest.rejected_messages",
        "UPDATE ingest.settings SET calendar = 'x'",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(statement)
    await connection.close()


def test_revision_is_the_migrations_head() -> None:
    """The store's constant equals the newest migration."""
    assert head_revision() == SCHEMA_REVISION
