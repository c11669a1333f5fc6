from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ingestor.batch import Batcher
from ingestor.clock import from_datetime
from ingestor.errors import StoreError
from ingestor.model import SECOND, Batch, Micros, Session, Tick
from ingestor.store.connect import connect
from ingestor.store.ticks import TickStore
from ingestor.stream.decoder import EARLIEST

T0: Micros = from_datetime(datetime(2026, 3, 2, tzinfo=UTC))
LIMIT = """
CREATE TABLE IF NOT EXISTS public.most AS SELECT 1000 AS rows;
CREATE OR REPLACE FUNCTION public.limit_rows() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    PERFORM set_config('test.rows', '1' || coalesce(current_setting('test.rows', true), ''), true);
    IF length(current_setting('test.rows')) > (SELECT rows FROM public.most) THEN
        RAISE 'too much' USING ERRCODE = '57014';
    END IF;
    RETURN new;
END $$;
CREATE OR REPLACE TRIGGER limit_rows BEFORE INSERT ON market.ticks FOR EACH ROW EXECUTE FUNCTION public.limit_rows()
"""
WITH_DATABASE = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Few values, so that equal ticks are common.
ticks = st.builds(
    Tick,
    symbol=st.sampled_from(["A", "B", "Ω"]),
    time=st.integers(T0 // SECOND, T0 // SECOND + 2).map(lambda second: second * SECOND),
    price=st.sampled_from([0.0, 1.5, 2.0]),
    volume=st.integers(0, 2),
)
any_ticks = st.builds(
    Tick,
    symbol=st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=32),
    time=st.integers(EARLIEST, T0),
    price=st.floats(allow_nan=False, allow_infinity=False).map(lambda price: price + 0.0),
    volume=st.integers(0, 2**63 - 1),
)


def batches(of: list[Tick], cuts: list[int]) -> list[Batch]:
    """Add the ticks to one session, and close its batch at the cuts."""
    instance = Batcher(Session(uuid4(), "test", "ws://x/ws", T0), max_rows=5000, occurrence_keys=1000)
    closed: list[Batch] = []
    for number, tick in enumerate(of):
        if number in cuts:
            closed.append(instance.close())
        instance.add(tick, T0 + number)
    return [*closed, instance.close()]


def in_database(url: str, work: Callable[[TickStore], Any]) -> list[tuple[Any, ...]]:
    """Run work against an emptied database; return all ticks and the sessions' counts."""

    async def run() -> list[tuple[Any, ...]]:
        connection = await connect(url)
        await connection.execute("TRUNCATE market.ticks, ingest.stream_sessions")
        store = TickStore(url, write_timeout=10)
        await work(store)
        await store.close()
        rows = await connection.fetch(
            "SELECT symbol, (extract(epoch FROM time) * 1000000)::bigint AS time, price, volume, occurrence, "
            "(extract(epoch FROM received_at) * 1000000)::bigint AS received_at FROM market.ticks ORDER BY received_at"
        )
        counts = await connection.fetch(
            "SELECT id, ticks, duplicates, last_batch FROM ingest.stream_sessions ORDER BY id"
        )
        await connection.close()
        return [tuple(row) for row in (*rows, *counts)]

    return asyncio.run(run())


@given(st.lists(ticks, max_size=60), st.lists(st.integers(0, 60), max_size=6))
def test_any_split_keeps_order_and_count(given_ticks: list[Tick], cuts: list[int]) -> None:
    """The same rows come in the same order, however the ticks are divided into batches."""
    (whole,) = batches(given_ticks, [])
    parts = batches(given_ticks, cuts)
    assert b"".join(part.rows for part in parts) == whole.rows
    assert sum(part.count for part in parts) == whole.count == len(given_ticks)
    assert [part.number for part in parts] == list(range(1, len(parts) + 1))


@WITH_DATABASE
@given(st.lists(any_ticks, max_size=20))
def test_packing_and_reading_back_is_the_identity(database: str, given_ticks: list[Tick]) -> None:
    """PostgreSQL reads the packed values, to the last bit of the price."""
    written = batches(given_ticks, [])
    rows = in_database(database, lambda store: store.write(written))[:-1]
    seen: Counter[Tick] = Counter()
    expected = []
    for number, tick in enumerate(given_ticks):
        seen[tick] += 1
        expected.append((tick.symbol, tick.time, tick.price, tick.volume, seen[tick], T0 + number))
    assert rows == expected


@WITH_DATABASE
@given(
    st.lists(ticks, max_size=30),
    st.lists(ticks, max_size=30),
    st.lists(st.integers(0, 30), max_size=4),
    st.lists(st.integers(1, 8), min_size=1, max_size=6),
)
def test_writing_twice_equals_writing_once(
    database: str, one: list[Tick], two: list[Tick], cuts: list[int], joins: list[int]
) -> None:
    """A second write of any batches of two sessions, divided differently, changes nothing."""
    all_batches = batches(one, cuts) + batches(two, cuts)

    async def once(store: TickStore) -> None:
        for batch in all_batches:
            await store.write([batch])

    async def again(store: TickStore) -> None:
        await once(store)
        for size in joins:
            for start in range(0, len(all_batches), size):
                await store.write(all_batches[start : start + size])

    assert in_database(database, once) == in_database(database, again)
    expected = Counter(one) | Counter(two)  # the larger count of either session
    rows = in_database(database, once)
    assert Counter(Tick(*row[:4]) for row in rows if len(row) == 6) == expected


@settings(WITH_DATABASE, max_examples=10)
@given(
    st.lists(ticks, max_size=30),
    st.lists(ticks, max_size=30),
    st.lists(st.integers(0, 30), max_size=4),
    st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=8),
)
def test_any_limits_change_nothing(
    database: str, one: list[Tick], two: list[Tick], cuts: list[int], limits: list[tuple[int, bool]]
) -> None:
    """All rows are stored and counted once, whatever the server accepts and whenever the process crashes."""
    all_batches = batches(one, cuts) + batches(two, cuts)

    async def once(store: TickStore) -> None:
        for batch in all_batches:
            await store.write([batch])

    async def limited(store: TickStore) -> None:
        connection, writing = await connect(database), TickStore(database, write_timeout=10)
        await connection.execute(LIMIT)
        for most, crashes in limits:
            await connection.execute("UPDATE public.most SET rows = $1", most)
            if crashes:
                await writing.close()
                writing = TickStore(database, write_timeout=10)
            with contextlib.suppress(StoreError):
                await writing.write(all_batches)
        await writing.close()
        await connection.execute("DROP TRIGGER limit_rows ON market.ticks")
        await connection.close()
        await store.write(all_batches)

    assert Counter(in_database(database, limited)) == Counter(in_database(database, once))
