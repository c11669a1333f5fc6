"""Backfill fills the gaps of a scripted day, and handles every failure of the provider."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from ingestor.backfill.bars import EXCHANGE
from ingestor.backfill.client import RestClient
from ingestor.backfill.fill import Backfill, Summary, asked_for, cut
from ingestor.backfill.instruments import refresh_instruments
from ingestor.clock import from_datetime
from ingestor.errors import ConfigurationError, IngestorError
from ingestor.model import SECOND, Bar, GapSpan, Instrument
from ingestor.redaction import register_secret
from ingestor.simulator.server import TOKEN
from ingestor.store.gaps import Bounds, GapStore, Outcome
from tests.clocks import HANG_SECONDS, ManualClock
from tests.rest import HANG, Request, answer, scripted
from tests.servers import query
from tests.sessions import BEGINS, ENDS, MINUTE, at, execute, record_session

LATER = from_datetime(ENDS + timedelta(hours=1))
STATES = "SELECT symbol, status, bars FROM ingest.backfills ORDER BY gap_from, symbol"
GAPS = f"SELECT started_at, ended_at, status FROM market.gaps WHERE started_at < '{ENDS}' ORDER BY started_at"


@contextlib.asynccontextmanager
async def job(
    writer_url: str, rest_url: str, clock: Any = None, *, patient: bool = False
) -> AsyncIterator[tuple[Backfill, GapStore]]:
    clock = clock or ManualClock(LATER)
    async with GapStore(writer_url) as gap_store:
        async with RestClient(rest_url, TOKEN, timezone=gap_store.timezone, clock=clock, timeout=2) as client:
            yield Backfill(gap_store, client, clock=clock, patient=patient), gap_store


async def fill(writer_url: str, rest_url: str, clock: Any = None, bounds: Bounds | None = None) -> Summary:
    """Run `ingestor backfill` for that Friday."""
    bounds = bounds or Bounds(until=ENDS)
    async with job(writer_url, rest_url, clock) as (backfill, _):
        await backfill.begin(await backfill.plan(bounds))
        return await backfill.run(await backfill.requests(bounds))


async def known(url: str, *symbols: str) -> None:
    async with GapStore(url) as gap_store:
        await gap_store.store_instruments(EXCHANGE, [Instrument(symbol, None, None, None, True) for symbol in symbols])


def bars(*starts: datetime) -> bytes:
    """Return bars of the price 1.5 that begin at these moments."""
    prices = dict.fromkeys(("open", "high", "low", "close"), 1.5)
    return answer({"data": [{"timestamp": start.isoformat(), **prices, "volume": 10} for start in starts]})


async def test_outcomes_of_symbols(writer_url: str, database: str) -> None:
    """Bars, no bars and an unknown symbol are each recorded, and the gap is partly filled."""
    await record_session(database, BEGINS - MINUTE, at(100))
    await record_session(database, at(102), ENDS + MINUTE)
    await known(writer_url, "A.NZ", "B.NZ", "GONE.NZ")
    await execute(
        database, "UPDATE market.instruments SET active = false, last_seen = $1 WHERE symbol = 'GONE.NZ'", at(1)
    )

    def script(asked: Request) -> bytes:
        match asked.parameters["ticker"]:
            case "A.NZ":
                return bars(at(98), at(99), at(100), at(101), at(102), at(103))
            case "B.NZ":
                return bars()
            case _:
                return answer({"message": "unknown"}, status=404)

    async with scripted(script) as server:
        summary = await fill(writer_url, server.url)
        assert (summary.filled, summary.no_trades, summary.unfillable, summary.pending) == (1, 1, 1, 0)
        assert len(server.asked) == 3
        assert server.asked[0].parameters["datetime_from"] == "2026-11-20 10:39:00"
        assert server.asked[0].parameters["datetime_to"] == "2026-11-20 10:43:00"
        assert (await fill(writer_url, server.url)).filled == 0
        assert len(server.asked) == 3
    assert await query(database, STATES) == [
        ("*", "partial", 4), ("A.NZ", "filled", 4), ("B.NZ", "no trades", 0), ("GONE.NZ", "unfillable", 0)
    ]  # fmt: skip
    assert await query(database, GAPS) == [(at(100), at(102), "partial")]
    assert await query(database, "SELECT time, resolution, source FROM market.bars ORDER BY time") == [
        (at(minute), MINUTE, "financefeast") for minute in (99, 100, 101, 102)
    ]


async def test_a_listed_symbol_that_is_unknown_for_a_while(writer_url: str, database: str) -> None:
    """One 404 does not settle a listed symbol; the third does, until a retry is requested."""
    await record_session(database, BEGINS - MINUTE, at(100))
    await record_session(database, at(102), ENDS + MINUTE)
    await known(writer_url, "A.NZ")
    unknown = True
    async with scripted(lambda _: answer({}, status=404) if unknown else bars(at(100))) as server:
        for expected in ("pending", "pending", "unfillable"):
            await fill(writer_url, server.url)
            assert {row[1] for row in await query(database, STATES)} == {expected}
        unknown = False
        assert (await fill(writer_url, server.url)).filled == 0
        async with job(writer_url, server.url) as (backfill, _):
            await backfill.ask_again(Bounds(since=ENDS))
            assert await backfill.requests(Bounds()) == []
            await backfill.ask_again(Bounds(until=ENDS))
        assert (await fill(writer_url, server.url)).filled == 1
    assert await query(database, GAPS) == [(at(100), at(102), "backfilled")]


def records(*starts: datetime, **changed: Any) -> list[dict[str, Any]]:
    """Return records of the price 1.5 that begin at these moments, with some fields changed."""
    prices = dict.fromkeys(("open", "high", "low", "close"), 1.5)
    return [{"timestamp": start.isoformat(), **prices, "volume": 10, **changed} for start in starts]


NULLS: dict[str, Any] = dict.fromkeys(("open", "high", "low", "close", "volume"))
ERRORS = "SELECT status, bars, attempts, error FROM ingest.backfills WHERE symbol = 'A.NZ'"


async def gap_of_twenty(database: str, writer_url: str) -> None:
    await record_session(database, BEGINS - MINUTE, at(101))
    await record_session(database, at(119), ENDS + MINUTE)
    await known(writer_url, "A.NZ")


async def test_a_minute_of_nulls_among_others(writer_url: str, database: str) -> None:
    """A minute of nulls has no trades: the other bars are stored, one request is made, and the gap is filled."""
    await gap_of_twenty(database, writer_url)
    body = {"data": [*records(*map(at, range(100, 119))), *records(at(119), **NULLS)]}
    async with scripted(lambda _: answer(body)) as server:
        assert (await fill(writer_url, server.url)).filled == 1
        assert len(server.asked) == 1
    assert await query(database, GAPS) == [(at(101), at(119), "backfilled")]
    assert await query(database, "SELECT count(*) FROM market.bars") == [(19,)]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (records(at(105), open=-1.5, low=-1.5), "a price that is not above zero (2026-11-19T21:45:00+00:00)"),
        (records(at(105), high=1.0), "a high below another price (2026-11-19T21:45:00+00:00)"),
        (records(at(105), close=float("nan")), "a price that is not finite (2026-11-19T21:45:00+00:00)"),
        (records(at(105), timestamp="soon"), "no timestamp that can be read (soon)"),
        (["bar"], "a record that is no object (record 20)"),
        (records(at(105) + timedelta(days=1)), "another day (2026-11-20T21:45:00+00:00)"),
    ],
)
async def test_a_wrong_record_among_others(wrong: list[Any], reason: str, writer_url: str, database: str) -> None:
    """A wrong record is named and the others are stored; the gap stays open, and later it is partly filled."""
    await gap_of_twenty(database, writer_url)
    right = records(*(at(minute) for minute in range(100, 120) if minute != 105))
    error = f"1 of 20 records are wrong: {reason}"
    async with scripted(lambda _: answer({"data": [*right, *wrong]})) as server:
        for attempts in (1, 2):
            summary = await fill(writer_url, server.url)
            assert (summary.pending, summary.bars, list(summary.wrong.values())) == (1, 19, [1])
            assert len(server.asked) == attempts
            assert await query(database, ERRORS) == [("pending", 19, attempts, error)]
            assert await query(database, GAPS) == [(at(101), at(119), "open")]
        assert await query(database, "SELECT count(*) FROM market.bars") == [(19,)]
        summary = await fill(writer_url, server.url)
        assert (summary.partial, summary.pending) == (1, 0)
    assert await query(database, ERRORS) == [("partial", 19, 3, error)]
    assert await query(database, GAPS) == [(at(101), at(119), "partial")]
    async with job(writer_url, server.url) as (backfill, _):
        await backfill.ask_again(Bounds(until=ENDS))
    async with scripted(lambda _: answer({"data": [*right, *records(at(105))]})) as server:
        assert (await fill(writer_url, server.url)).filled == 1
    assert await query(database, GAPS) == [(at(101), at(119), "backfilled")]


async def test_only_wrong_records(writer_url: str, database: str) -> None:
    """Wrong records alone do not mean silence: after some attempts the gap is unfillable, with the reason."""
    await gap_of_twenty(database, writer_url)
    async with scripted(lambda _: answer({"data": records(at(105), volume=-1)})) as server:
        assert [(await fill(writer_url, server.url)).unfillable for _ in range(3)] == [0, 0, 1]
    ((status, _, _, error),) = await query(database, ERRORS)
    assert status == "unfillable"
    assert "a negative volume" in error
    assert await query(database, GAPS) == [(at(101), at(119), "unfillable")]


@pytest.mark.parametrize(
    "body",
    [
        {"data": records(at(300), at(301))},
        {"data": records(at(105) - timedelta(days=1))},
        {"data": [], "date_from": "2026-11-18", "date_to": "2026-11-19"},
        {"data": [], "hits": 19},
        {"data": [], "ticker": "B.NZ"},
    ],
)
async def test_an_answer_to_another_question(body: dict[str, Any], writer_url: str, database: str) -> None:
    """An answer to another question never means "no trades": the gap stays open with the reason."""
    await gap_of_twenty(database, writer_url)
    async with scripted(lambda _: answer(body)) as server:
        for _ in range(4):
            summary = await fill(writer_url, server.url)
            assert (summary.pending, summary.no_trades) == (1, 0)
            assert ["not what was asked for" in error for error in summary.failures] == [True]
    ((status, _, attempts, error),) = await query(database, ERRORS)
    assert (status, attempts) == ("pending", 4)
    assert "/data/intraday: the answer is not what was asked for" in error
    assert await query(database, GAPS) == [(at(101), at(119), "open")]


async def test_a_wrong_record_concerns_its_own_gap(writer_url: str, database: str) -> None:
    """Of two gaps that one answer serves, a wrong record leaves only its own open."""
    await record_session(database, BEGINS - MINUTE, at(100))
    await record_session(database, at(102), at(200))
    await record_session(database, at(202), ENDS + MINUTE)
    await known(writer_url, "A.NZ")
    body = {"data": [*records(at(100)), *records(at(200), low=2.0)]}
    async with scripted(lambda _: answer(body)) as server:
        summary = await fill(writer_url, server.url)
        assert len(server.asked) == 1
    assert (summary.filled, summary.pending) == (1, 1)
    assert await query(database, GAPS) == [(at(100), at(102), "backfilled"), (at(200), at(202), "open")]


async def test_wrong_records_are_no_absence(writer_url: str, database: str) -> None:
    """A provider whose records are wrong still counts as available: the run goes through all symbols."""
    await record_session(database, BEGINS - MINUTE, at(101))
    await record_session(database, at(119), ENDS + MINUTE)
    await known(writer_url, *(f"{number}.NZ" for number in range(20)))
    async with scripted(lambda _: answer({"data": records(at(105), volume=-1)})) as server:
        summary = await fill(writer_url, server.url)
    assert (summary.pending, summary.unasked) == (20, 0)
    assert summary.wrong == {"a negative volume": 20}


async def test_a_listing_with_wrong_records(writer_url: str, database: str) -> None:
    """Wrong records of a listing are refused alone and delist no symbol, since each may stand for a missing one."""
    await known(writer_url, "A.NZ", "B.NZ")
    body = {"data": [{"symbol": "A.NZ"}, {"symbol": None}, {"symbol": "x" * 4000}]}
    async with scripted(lambda _: answer(body)) as server:
        async with job(writer_url, server.url) as (backfill, gap_store):
            found = await refresh_instruments(gap_store, backfill._client)
    assert (found.listed, found.kept) == (1, 1)
    assert found.wrong.startswith("2 of 3 records are wrong: no symbol (record 2); a symbol that can't be one (xxx")
    assert await query(database, "SELECT symbol FROM market.instruments WHERE active") == [("A.NZ",), ("B.NZ",)]


async def test_watching_retries(writer_url: str, database: str) -> None:
    """With `--watch`, repeated failures are retried less and less often; a run by hand retries at once."""
    await record_session(database, BEGINS - MINUTE, at(100))
    await record_session(database, at(102), ENDS + MINUTE)
    await known(writer_url, "A.NZ")
    waits = "SELECT round(extract(epoch FROM next_attempt_at - now()) / 60) FROM ingest.backfills WHERE symbol = 'A.NZ'"
    async with scripted(lambda _: answer({}, status=410)) as server:
        for minutes in (1, 4, 16, 64, 256, 1024, 1440, 1440):
            assert (await fill(writer_url, server.url)).pending == 1
            assert await query(database, waits) == [(minutes,)]
        async with job(writer_url, server.url, patient=True) as (backfill, _):
            assert await backfill.requests(Bounds()) == []
            await execute(database, "UPDATE ingest.backfills SET next_attempt_at = now()")
            assert len(await backfill.requests(Bounds())) == 1


async def test_unknown_symbols(writer_url: str, database: str) -> None:
    """A symbol that is neither listed nor stored is reported as unknown."""
    await known(writer_url, "A.NZ")
    async with job(writer_url, "http://127.0.0.1:1") as (backfill, _):
        await backfill.check({"A.NZ"})
        with pytest.raises(IngestorError, match=r"Unknown symbol: A\.NX, B\. "):
            await backfill.check({"A.NZ", "B", "A.NX"})


async def test_errors_without_secrets(writer_url: str, database: str) -> None:
    """The recorded reason of a failure holds no secret."""
    await record_session(database, BEGINS - MINUTE, at(100))
    await record_session(database, at(102), ENDS + MINUTE)
    await known(writer_url, "A.NZ")
    register_secret(TOKEN)
    async with scripted(lambda _: answer({"data": [], "interval": TOKEN})) as server:
        await fill(writer_url, server.url)
    ((error,),) = await query(database, "SELECT error FROM ingest.backfills WHERE symbol = 'A.NZ'")
    assert "interval" in error
    assert TOKEN not in error


async def test_one_question_for_all_gaps_of_a_day(writer_url: str, database: str) -> None:
    """A symbol is asked for once a day, however often the stream was cut; covered minutes are not replaced."""
    for minute in range(0, 480, 20):
        await record_session(database, at(minute or -1), at(minute + 19))
    await record_session(database, at(480), ENDS + MINUTE)
    await known(writer_url, "A.NZ", "B.NZ")
    async with scripted(lambda _: bars(*(at(minute) for minute in range(490)))) as server:
        summary = await fill(writer_url, server.url)
        assert len(server.asked) == 2
    assert summary.filled == 48
    assert await query(database, "SELECT DISTINCT status FROM market.gaps") == [("backfilled",), ("open",)]
    rows = await query(database, "SELECT time FROM market.bars WHERE symbol = 'A.NZ' ORDER BY time")
    times = [row[0] for row in rows]
    assert times == [at(minute + near) for minute in range(0, 480, 20) for near in (18, 19, 20)]


async def test_a_stopped_run_is_resumed(writer_url: str, database: str) -> None:
    """After an interrupted run, or one with failures, the next run asks only for pending symbols."""
    await record_session(database, BEGINS - MINUTE, at(100))
    await record_session(database, at(102), ENDS + MINUTE)
    await known(writer_url, "A.NZ", "B.NZ", "C.NZ", "D.NZ", "E.NZ", "F.NZ")
    broken = {"B.NZ", "D.NZ"}

    def script(asked: Request) -> bytes:
        return answer({}, status=410) if asked.parameters["ticker"] in broken else bars(at(100))

    async with scripted(script) as server:
        summary = await fill(writer_url, server.url)
        assert (summary.filled, summary.pending) == (4, 2)
        assert list(summary.failures.values()) == [2]
        assert await query(database, GAPS) == [(at(100), at(102), "open")]
        broken.clear()
        before = len(server.asked)
        summary = await fill(writer_url, server.url)
        assert (summary.filled, summary.pending) == (2, 0)
        assert sorted(asked.parameters["ticker"] for asked in server.asked[before:]) == ["B.NZ", "D.NZ"]
    assert await query(database, GAPS) == [(at(100), at(102), "backfilled")]


async def test_killed_in_the_middle(writer_url: str, database: str) -> None:
    """Symbols that were settled before a kill stay settled."""
    await record_session(database, BEGINS - MINUTE, at(100))
    await record_session(database, at(102), ENDS + MINUTE)
    await known(writer_url, *(f"{letter}.NZ" for letter in "ABCDEFGH"))
    allowed = 3

    def script(_: Request) -> bytes:
        nonlocal allowed
        allowed -= 1
        return bars(at(100)) if allowed >= 0 else HANG

    async with scripted(script) as server:
        running = asyncio.create_task(fill(writer_url, server.url))
        async with asyncio.timeout(HANG_SECONDS):
            while await query(database, "SELECT count(*) FROM ingest.backfills WHERE status = 'filled'") != [(3,)]:
                await asyncio.sleep(0.02)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        asked = len(server.asked)
        allowed = 100
        assert (await fill(writer_url, server.url)).filled == 5
        assert len(server.asked) - asked == 5
    assert await query(database, GAPS) == [(at(100), at(102), "backfilled")]


async def test_concurrent_runs(writer_url: str, database: str) -> None:
    """A watching run and one by hand settle everything together, whichever settles the last symbols."""
    for minute in range(0, 480, 20):
        await record_session(database, at(minute or -1), at(minute + 19))
    await record_session(database, at(480), ENDS + MINUTE)
    await known(writer_url, *(f"{number}.NZ" for number in range(12)))
    async with scripted(lambda _: bars(*(at(minute) for minute in range(480)))) as server:
        for result in await asyncio.gather(*(fill(writer_url, server.url) for _ in range(3))):
            assert result.pending == 0
    assert {row[2] for row in await query(database, GAPS)} == {"backfilled"}


async def test_the_last_two_symbols_at_once(writer_url: str, database: str) -> None:
    """Two processes that settle the last two symbols at once do not leave the gap pending."""
    pieces = [GapSpan(at(minute), at(minute + 1)) for minute in range(60)]
    async with GapStore(writer_url) as one, GapStore(writer_url) as other:
        for piece in pieces:
            await one.begin(piece, ["A.NZ", "B.NZ"])
            await asyncio.gather(
                one.settle("A.NZ", [Outcome(piece, "no trades")], ()),
                other.settle("B.NZ", [Outcome(piece, "no trades")], ()),
            )
    assert await query(database, "SELECT DISTINCT status FROM ingest.backfills WHERE symbol = '*'") == [("backfilled",)]


async def test_settled_gaps_are_not_asked_for_again(writer_url: str, database: str) -> None:
    """A slower run that fails or finds nothing neither undoes another run's outcome nor stores bars."""
    piece = GapSpan(at(100), at(102))
    bar = Bar(at(100), 1.0, 1.0, 1.0, 1.0, 5)
    async with GapStore(writer_url) as gap_store:
        await gap_store.begin(piece, ["A.NZ", "B.NZ"])
        await gap_store.settle("A.NZ", [Outcome(piece, "filled", 1)], [bar])
        await gap_store.settle("B.NZ", [Outcome(piece, "no trades")], ())
        for late in (Outcome(piece, "pending", error="away"), Outcome(piece, "unfillable", error="404")):
            await gap_store.settle("A.NZ", [late], [Bar(at(101), 2.0, 2.0, 2.0, 2.0, 5)])
    assert await query(database, STATES) == [("*", "backfilled", 1), ("A.NZ", "filled", 1), ("B.NZ", "no trades", 0)]
    assert await query(database, "SELECT time FROM market.bars") == [(at(100),)]


async def test_pending_for_more_than_a_year(writer_url: str, database: str) -> None:
    """A symbol that failed until the provider no longer kept the time is unfillable, not without trades."""
    await record_session(database, BEGINS - MINUTE, at(100))
    await record_session(database, at(102), ENDS + MINUTE)
    await known(writer_url, "A.NZ")
    async with scripted(lambda _: answer({}, status=410)) as server:
        assert (await fill(writer_url, server.url)).pending == 1
    async with scripted(lambda _: bars()) as server:
        assert (await fill(writer_url, server.url, ManualClock(LATER + 400 * 86400 * SECOND))).unfillable == 1
        assert server.asked == []
    assert await query(database, GAPS) == [(at(100), at(102), "unfillable")]


async def test_another_label(writer_url: str, database: str) -> None:
    """After a change of the label, bars are moved, the gap is asked for again, and an older run stores nothing."""
    piece = GapSpan(at(100), at(102))
    async with GapStore(writer_url) as gap_store, GapStore(writer_url) as older:
        await gap_store.begin(piece, ["A.NZ"])
        found = [Bar(at(minute), 1.0, 1.0, 1.0, 1.0, minute) for minute in (99, 100, 101)]
        await gap_store.settle("A.NZ", [Outcome(piece, "filled", 3)], found)
        await gap_store.adopt("end")
        times = "SELECT time, volume FROM market.bars ORDER BY time"
        assert await query(database, times) == [(at(98), 99), (at(99), 100), (at(100), 101)]
        assert await query(database, STATES) == []
        await gap_store.begin(piece, ["A.NZ"])
        with pytest.raises(IngestorError, match="label of the bars was changed"):
            await older.settle("A.NZ", [Outcome(piece, "filled", 1)], [Bar(at(101), 9.0, 9.0, 9.0, 9.0, 9)])
        await gap_store.adopt("start")
        assert await query(database, times) == [(at(99), 99), (at(100), 100), (at(101), 101)]


async def test_only_some_symbols(writer_url: str, database: str) -> None:
    """With `--symbol` the other symbols stay pending, so the gap stays open."""
    await record_session(database, BEGINS - MINUTE, at(100))
    await record_session(database, at(102), ENDS + MINUTE)
    await known(writer_url, "A.NZ", "B.NZ")
    async with scripted(lambda _: bars(at(100))) as server, job(writer_url, server.url) as (backfill, _):
        bounds = Bounds(until=ENDS)
        await backfill.begin(await backfill.plan(bounds))
        await backfill.run(await backfill.requests(bounds, {"A.NZ"}))
        assert [asked.parameters["ticker"] for asked in server.asked] == ["A.NZ"]
    assert await query(database, STATES) == [("*", "pending", 0), ("A.NZ", "filled", 1), ("B.NZ", "pending", 0)]
    assert await query(database, GAPS) == [(at(100), at(102), "open")]


async def test_gaps_older_than_the_provider_keeps(writer_url: str, database: str) -> None:
    """A gap of more than a year ago is not asked for, and its reason is reported."""
    await record_session(database, BEGINS - MINUTE, at(100))
    await record_session(database, at(102), ENDS + MINUTE)
    await known(writer_url, "A.NZ")
    clock = ManualClock(LATER + 366 * 86400 * SECOND)
    async with scripted(lambda _: bars()) as server:
        await fill(writer_url, server.url, clock)
        assert server.asked == []
    assert await query(database, GAPS) == [(at(100), at(102), "unfillable")]
    ((error,),) = await query(database, "SELECT error FROM ingest.backfills")
    assert error == "older than the provider keeps one-minute bars (1 year)"


async def test_a_lasting_gap(writer_url: str, database: str) -> None:
    """The older part of a lasting gap is filled first and the rest later; no minute is asked for before its end."""
    await record_session(database, BEGINS - MINUTE, at(100))
    await record_session(database, at(200), ENDS + MINUTE)
    await known(writer_url, "A.NZ")
    async with scripted(lambda _: bars(*(at(minute) for minute in range(480)))) as server:
        for minute in (101, 150.2, 201, 205):
            await fill(writer_url, server.url, ManualClock(from_datetime(at(minute))))
        ends = [asked.parameters["datetime_to"] for asked in server.asked]
    assert ends == ["2026-11-20 11:29:00", "2026-11-20 12:19:00", "2026-11-20 12:21:00"]
    assert {row[2] for row in await query(database, GAPS)} == {"backfilled"}
    times = {row[0] for row in await query(database, "SELECT time FROM market.bars")}
    assert times == {at(minute) for minute in range(99, 201)}


async def test_minutes_at_the_edges_of_coverage_are_asked_for(writer_url: str, database: str) -> None:
    """Minutes within the margin of a session's ends are no gap, but their bars come from the provider."""
    await record_session(database, BEGINS - timedelta(seconds=2), ENDS + timedelta(seconds=2))
    await known(writer_url, "A.NZ")
    async with scripted(lambda _: bars(at(-1), at(0), at(1), at(493), at(494), at(495))) as server:
        await fill(writer_url, server.url)
    assert await query(database, GAPS) == []
    times = {row[0] for row in await query(database, "SELECT time FROM market.bars_1m")}
    assert {at(0), at(494)} <= times


async def test_a_minute_with_a_rejection_is_asked_for(writer_url: str, database: str) -> None:
    """A minute with a rejection lies in no gap, but its bar comes from the provider."""
    session = await record_session(database, BEGINS - MINUTE, ENDS + MINUTE)
    await execute(
        database, "INSERT INTO ingest.rejected_messages VALUES ($1, 1, 1, $2, 'not_json', 'x', 1)", session, at(50.5)
    )
    await known(writer_url, "A.NZ")
    async with scripted(lambda _: bars(at(49), at(50), at(51))) as server:
        assert (await fill(writer_url, server.url)).filled == 1
        assert (await fill(writer_url, server.url)).filled == 0
    assert await query(database, "SELECT time, source FROM market.bars_1m") == [(at(50), "backfill")]


async def test_gaps_that_a_late_spool_closes(writer_url: str, database: str) -> None:
    """A begun gap is removed if a late spool covers it."""
    session = await record_session(database, BEGINS - MINUTE, at(100), None)
    await record_session(database, at(102), ENDS + MINUTE)
    await known(writer_url, "A.NZ")
    async with scripted(lambda _: answer({}, status=410)) as server:
        assert (await fill(writer_url, server.url)).pending == 1
        proof = "UPDATE ingest.stream_sessions SET covered_until = $2, last_tick_at = $2 WHERE id = $1"
        await execute(database, proof, session, at(102))
        assert (await fill(writer_url, server.url)).pending == 0
    assert await query(database, STATES) == []


async def test_a_refused_token_ends_the_run(writer_url: str, database: str) -> None:
    """A refused token ends the run and settles nothing."""
    await record_session(database, BEGINS - MINUTE, at(100))
    await record_session(database, at(102), ENDS + MINUTE)
    await known(writer_url, "A.NZ", "B.NZ")
    async with scripted(lambda _: answer({}, status=403)) as server:
        with pytest.raises(ConfigurationError):
            await fill(writer_url, server.url)
    assert {row[1] for row in await query(database, STATES)} == {"pending"}


async def test_an_unavailable_provider(writer_url: str, database: str) -> None:
    """A run ends after some failures in a row; the next run continues."""
    await record_session(database, BEGINS - MINUTE, at(100))
    await record_session(database, at(102), ENDS + MINUTE)
    await known(writer_url, *(f"{number}.NZ" for number in range(50)))
    away = True
    async with scripted(lambda _: answer({}, status=410) if away else bars(at(100))) as server:
        summary = await fill(writer_url, server.url)
        assert 10 <= summary.pending <= 13
        assert summary.unasked == 50 - summary.pending
        away = False
        summary = await fill(writer_url, server.url)
        assert (summary.filled, summary.pending, summary.unasked) == (50, 0, 0)


async def test_instruments(writer_url: str, database: str) -> None:
    """Names come from the provider, first and last times from the ticks; delisted instruments become inactive."""
    tick = (
        "INSERT INTO market.ticks (time, received_at, price, volume, occurrence, symbol) VALUES ($1, $1, 1, 1, 1, $2)"
    )
    for minute, symbol in ((1, "A.NZ"), (5, "A.NZ"), (3, "BOND.NZ")):
        await execute(database, tick, at(minute), symbol)
    rows = "SELECT symbol, company_name, active, first_seen, last_seen FROM market.instruments ORDER BY symbol"
    async with GapStore(writer_url) as gap_store:
        listed = [Instrument("A.NZ", "A", "Things", None, True), Instrument("B.NZ", "B", None, None, True)]
        await gap_store.store_instruments(EXCHANGE, listed)
        assert await query(database, rows) == [
            ("A.NZ", "A", True, at(1), at(5)),
            ("B.NZ", "B", True, None, None),
            ("BOND.NZ", None, None, at(3), at(3)),
        ]
        await gap_store.store_instruments(EXCHANGE, listed[:1])
        assert await gap_store.active_symbols(at(100)) == ["A.NZ", "BOND.NZ"]
        await gap_store.store_instruments(EXCHANGE, [])
        assert await gap_store.active_symbols(at(100)) == ["A.NZ", "BOND.NZ"]
        await gap_store.store_instruments(
            EXCHANGE, listed[1:]
        )  # a symbol that was received shortly before may have traded
        assert await gap_store.active_symbols(at(100)) == ["A.NZ", "B.NZ", "BOND.NZ"]
        assert await gap_store.active_symbols(at(100) + timedelta(days=31)) == ["B.NZ", "BOND.NZ"]
    assert [row[2] for row in await query(database, rows)] == [False, True, None]


async def test_a_short_listing_delists_no_symbol(writer_url: str, database: str) -> None:
    """A listing that lacks a large part of the exchange delists nothing."""
    listed = [Instrument(f"{number}.NZ", None, None, None, True) for number in range(120)]
    active = "SELECT count(*) FROM market.instruments WHERE active"
    async with GapStore(writer_url) as gap_store:
        assert await gap_store.store_instruments(EXCHANGE, listed) == 0
        assert await gap_store.store_instruments(EXCHANGE, listed[:100]) == 20
        assert await gap_store.store_instruments(EXCHANGE, []) == 120
        assert await query(database, active) == [(120,)]
        assert await gap_store.store_instruments(EXCHANGE, listed[:110]) == 0
        assert await query(database, active) == [(110,)]


MARGIN = timedelta(seconds=5)


@pytest.mark.parametrize(
    ("start", "end", "first", "last"),
    [(100, 102, 99, 103), (100.5, 100.6, 100, 101), (100.05, 100.1, 99, 101), (100.5, 100.95, 100, 102),
     (100 + 5 / 60, 101 - 5 / 60, 100, 101)],
)  # fmt: skip
def test_requests_are_whole_minutes(start: float, end: float, first: int, last: int) -> None:
    """The request reaches from the minute of the start less the margin to the minute after the end plus the margin."""
    piece = GapSpan(rounded(start), rounded(end))
    assert asked_for(piece, MARGIN) == (at(first), at(last))


@pytest.mark.parametrize(
    ("now", "until"), [(104.1, 102), (104.0, 101 - 5 / 60 + 1), (101.5, None), (102.2, 101 - 5 / 60), (500, 102)]
)
def test_minutes_that_are_too_young(now: float, until: float | None) -> None:
    """A minute is asked for once it has been over for the margin and one more minute."""
    piece = GapSpan(at(100), at(102))
    part = cut(piece, rounded(now), MARGIN)
    assert part == (None if until is None else GapSpan(at(100), rounded(until)))
    if part is not None:
        assert asked_for(part, MARGIN)[1] + MARGIN + MINUTE <= rounded(now)


def rounded(minutes: float) -> datetime:
    return at(round(minutes * 60) / 60).replace(microsecond=0)
