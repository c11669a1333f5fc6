"""`gaps`, `backfill`, `reconcile` and `maintain` work as a user runs them."""

from __future__ import annotations

import asyncio
import json
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ingestor.cli import _backfill
from ingestor.clock import from_datetime
from ingestor.model import Tick
from ingestor.settings import load_settings
from ingestor.simulator.server import TOKEN, Simulator
from ingestor.store.gaps import Bounds
from tests.clocks import HANG_SECONDS
from tests.commands import ingestor, start
from tests.recording import until
from tests.rest import HANG, Request, answer, scripted
from tests.servers import query
from tests.sessions import BEGINS, ENDS, MINUTE, at, execute, record_session

UNTIL = ("--until", "2026-11-21")
TICK = "INSERT INTO market.ticks (time, received_at, price, volume, occurrence, symbol) VALUES ($1, $1, $2, $3, 1, $4)"


LISTED = answer({"data": [{"symbol": "A.NZ"}, {"symbol": "B.NZ", "uuid4": "no uuid", "active": True}]})


@pytest.fixture(autouse=True)
def _wide_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the terminal so wide that no line of a table is wrapped."""
    monkeypatch.setenv("COLUMNS", "200")


async def with_a_gap(database: str) -> None:
    """Cover Friday except for two minutes."""
    await record_session(database, BEGINS - MINUTE, at(100), "closed")
    await record_session(database, at(102), ENDS + MINUTE, "stopped")


def seconds(minute: float) -> int:
    return from_datetime(at(minute))


async def test_gaps_as_a_table(writer_url: str, database: str) -> None:
    """The table shows totals, the incomplete day, the gap with cause and local time, and the meaning of its outcome."""
    status, output, _ = await ingestor("gaps", DATABASE_URL=writer_url)
    assert (status, output) == (
        0, "There was no trading time yet. Coverage begins with the first session of `ingestor run`.\n",
    )  # fmt: skip
    await with_a_gap(database)
    status, output, _ = await ingestor("gaps", *UNTIL, DATABASE_URL=writer_url)
    assert status == 1
    for words in ("1 trading day, 8 h 15 min", "Coverage: 99.59 %", "Fri 2026-11-20", "10:40:00", "2 min 0 s",
                  "the connection was closed or cut", "open: missed, and not filled yet"):  # fmt: skip
        assert words in output, output
    status, output, _ = await ingestor("gaps", "--until", "2026-11-20T10:30:00+13:00", DATABASE_URL=writer_url)
    assert status == 0
    assert "No gap." in output


async def test_gaps_for_programs(writer_url: str, database: str, tmp_path: Path) -> None:
    """JSON and CSV go to standard output or a file; the exit status tells whether a gap is open."""
    await with_a_gap(database)
    status, output, _ = await ingestor("gaps", "--format", "json", *UNTIL, DATABASE_URL=writer_url)
    document = json.loads(output)
    assert status == 1
    assert (document["version"], document["since"], document["until"]) == (1, None, "2026-11-21")
    assert document["coverage"] == [
        {"trading_day": "2026-11-20", "trading_minutes": 495.0, "covered_minutes": 493.0, "missing_minutes": 2.0,
         "backfilled_minutes": 0.0, "percent": 99.59}
    ]  # fmt: skip
    assert document["gaps"] == [
        {"trading_day": "2026-11-20", "started_at": at(100).isoformat(), "ended_at": at(102).isoformat(),
         "seconds": 120.0, "cause": "the connection was closed or cut", "status": "open"}
    ]  # fmt: skip
    status, output, _ = await ingestor("gaps", "--format=csv", "--output=gaps.csv", *UNTIL, DATABASE_URL=writer_url)
    assert (status, output) == (1, "")
    assert len((tmp_path / "gaps.csv").read_text(encoding="utf-8").splitlines()) == 2
    await ingestor("gaps", "--format=html", "--output=gaps.html", *UNTIL, DATABASE_URL=writer_url)
    assert (tmp_path / "gaps.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    await ingestor("gaps", "--output=gaps.txt", *UNTIL, DATABASE_URL=writer_url)
    assert "Coverage: 99.59 %" in (tmp_path / "gaps.txt").read_text(encoding="utf-8")
    for form in ("html", "table"):
        status, _, errors = await ingestor("gaps", f"--format={form}", "--output=/proc/x", DATABASE_URL=writer_url)
        assert (status, errors) == (69, "ingestor: /proc/x cannot be written: No such file or directory.\n")


async def test_an_exclusion(writer_url: str, database: str) -> None:
    """A halt is recorded with its reason, and its gap is no longer open."""
    await with_a_gap(database)
    arguments = (
        "gaps",
        "--exclude",
        "2026-11-20T10:00:00+13:00",
        "2026-11-20T11:00:00+13:00",
        "trading [/b] halt of [NZX]",
        *UNTIL,
    )
    status, output, _ = await ingestor(*arguments, DATABASE_URL=writer_url)
    assert status == 0
    assert "excluded: trading [/b] halt of [NZX]" in output
    assert (await ingestor("gaps", *UNTIL, DATABASE_URL=writer_url))[0] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("--since", "yesterday"),
        ("--until", "2026-11-20T10:00:00"),
        ("--format", "xml"),
        ("--exclude", "2026-11-20", "2026-11-20", "nothing"),
        ("--exclude", "2026-11-20", "soon", "nothing"),
        ("--exclude", "2026-11-20", "2026-11-21"),
        ("--exclude", "0001-01-01", "2026-11-21", "long ago"),
        ("--since", "2026-11-21", "--until", "2026-11-20"),
        ("--since", "2026-11-21T00:00:00Z", "--until", "2026-11-20T00:00:00Z"),
        ("--until", "9999-12-31T23:59:59-05:00"),
    ],
)
async def test_wrong_options(writer_url: str, arguments: tuple[str, ...]) -> None:
    """Each wrong option is reported, with exit status 2."""
    status, _, errors = await ingestor("gaps", *arguments, DATABASE_URL=writer_url)
    assert status == 2
    assert "Traceback" not in errors


async def test_without_a_schema(empty_database: str) -> None:
    """A missing schema is reported in one line with its remedy, as an error that requires operator action."""
    status, _, errors = await ingestor("gaps", DATABASE_URL=empty_database)
    assert status == 78
    assert "ingestor migrate" in errors


async def test_backfill(writer_url: str, database: str) -> None:
    """A dry run lists the requests, a run stores the bars, and a second run has nothing to do."""
    await with_a_gap(database)
    async with Simulator(port=0, rate=0) as simulator:
        simulator.send([Tick("AIR.NZ", seconds(100.5), 0.5, 10), Tick("FPH.NZ", seconds(300), 30.0, 10)])
        environment = {"DATABASE_URL": writer_url, "REST_URL": simulator.rest_url, "TOKEN": TOKEN}
        status, output, _ = await ingestor("backfill", "--dry-run", *UNTIL, **environment)
        assert status == 0
        assert "36 instruments are listed." in output
        assert "2026-11-19 21:39:55 UTC, 2 min 10 s: 36 symbols" in output
        assert await query(database, "SELECT count(*) FROM ingest.backfills") == [(0,)]
        status, output, _ = await ingestor("backfill", "--symbol", "AIR.NZ", *UNTIL, **environment)
        assert status == 0
        assert "1 requests, 1 bars. Symbols of gaps: 1 filled, 0 without trades, 0 unfillable, 0 to be" in output
        status, _, errors = await ingestor("backfill", "--symbol", "AIR", *UNTIL, **environment)
        assert (status, "Unknown symbol: AIR" in errors) == (69, True)
        status, output, _ = await ingestor("backfill", *UNTIL, **environment)
        assert status == 0
        assert "35 symbols of gaps that an earlier run began" in output
        assert "35 requests, 0 bars. Symbols of gaps: 0 filled, 35 without trades" in output
        status, output, _ = await ingestor("backfill", *UNTIL, **environment)
        assert (status, output) == (0, "36 instruments are listed.\nNo gap is open.\n")
    assert (await ingestor("gaps", *UNTIL, DATABASE_URL=writer_url))[0] == 0
    assert await query(database, "SELECT symbol, time, source FROM market.bars_1m") == [("AIR.NZ", at(100), "backfill")]


async def test_backfill_that_fails(writer_url: str, database: str) -> None:
    """Failures are reported with their number, and exit status 1 means that symbols are pending."""
    await with_a_gap(database)

    def script(asked: Request) -> bytes:
        return LISTED if asked.path == "/info/ticker" else answer({}, status=410)

    async with scripted(script) as server:
        environment = {"DATABASE_URL": writer_url, "REST_URL": server.url, "TOKEN": TOKEN}
        status, output, _ = await ingestor("backfill", *UNTIL, **environment)
    assert status == 1
    assert "2 to be tried again" in output
    assert "2 times: /data/intraday: the server answered 410" in output


async def test_backfill_with_a_refused_token(writer_url: str, database: str) -> None:
    """A refused token ends the command as an error that requires operator action, and is not shown."""
    await with_a_gap(database)
    async with Simulator(port=0, rate=0) as simulator:
        environment = {"DATABASE_URL": writer_url, "REST_URL": simulator.rest_url, "TOKEN": "tk_unmistakable_7Qz"}
        status, output, errors = await ingestor("backfill", *UNTIL, **environment)
    assert status == 78
    assert errors.startswith("ingestor: INGESTOR_TOKEN: 127.0.0.1 refused it (403")
    assert "7Qz" not in output + errors


async def test_backfill_that_watches(writer_url: str, database: str) -> None:
    """With `--watch`, gaps are filled as they appear, until a signal ends the command."""
    await record_session(database, BEGINS - MINUTE, at(100), "closed")
    later = await record_session(database, at(100), ENDS + MINUTE, "stopped")
    async with Simulator(port=0, rate=0) as simulator:
        simulator.send([Tick("AIR.NZ", seconds(100.5), 0.5, 10)])
        process = await start(
            "backfill", "--watch", "--every=1s", *UNTIL,
            DATABASE_URL=writer_url, REST_URL=simulator.rest_url, TOKEN=TOKEN,
        )  # fmt: skip
        await until(database, "SELECT count(*) FROM market.instruments", 36)
        await execute(database, "UPDATE ingest.stream_sessions SET authenticated_at = $2 WHERE id = $1", later, at(102))
        await until(database, "SELECT count(*) FROM ingest.backfills WHERE status = 'backfilled'", 1)
        process.send_signal(signal.SIGTERM)
        _, errors = await asyncio.wait_for(process.communicate(), HANG_SECONDS)
    assert process.returncode == 0, errors
    assert await query(database, "SELECT symbol, time FROM market.bars") == [("AIR.NZ", at(100))]


async def test_watching_with_a_token_that_is_refused_for_a_while(
    writer_url: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that was accepted is retried with an error in the log; the listing is requested once an hour."""
    await record_session(database, BEGINS - MINUTE, at(100), "closed")
    later = await record_session(database, at(102), ENDS + MINUTE, "stopped")
    status = 200

    def script(asked: Request) -> bytes:
        return LISTED if asked.path == "/info/ticker" else answer({"data": []}, status=status)

    monkeypatch.setattr(_backfill, "REFUSED_PAUSE_SECONDS", 0.05)
    filled = "SELECT count(*) FROM ingest.backfills WHERE status = 'backfilled'"
    async with scripted(script) as server:
        settings = load_settings(database_url=writer_url, rest_url=server.url, token=TOKEN)
        watching = asyncio.create_task(_backfill.watch(settings, Bounds(until=ENDS), (), 0.05))
        await until(database, filled, 1)
        status, before = 403, len(server.asked)
        await execute(database, "UPDATE ingest.stream_sessions SET authenticated_at = $2 WHERE id = $1", later, at(104))
        async with asyncio.timeout(HANG_SECONDS):
            while len(server.asked) < before + 6:
                await asyncio.sleep(0.01)
        status = 200
        await until(database, filled, 2)
        assert [asked.path for asked in server.asked].count("/info/ticker") == 1
        signal.raise_signal(signal.SIGTERM)
        await asyncio.wait_for(watching, HANG_SECONDS)


async def test_a_stop_during_the_request_for_the_listing(writer_url: str, database: str) -> None:
    """A signal ends a watching command at once, whatever it waits for."""
    await with_a_gap(database)
    async with scripted(lambda _: HANG) as server:
        process = await start("backfill", "--watch", DATABASE_URL=writer_url, REST_URL=server.url, TOKEN=TOKEN)
        async with asyncio.timeout(HANG_SECONDS):
            while not server.asked:
                await asyncio.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, errors = await asyncio.wait_for(process.communicate(), HANG_SECONDS)
    assert (process.returncode, errors) == (0, b"")


def ohlcv(price: float, volume: int, minute: float) -> dict[str, Any]:
    prices = dict.fromkeys(("open", "high", "low", "close"), price)
    return {"timestamp": at(minute).isoformat(), **prices, "volume": volume}


async def test_reconcile(writer_url: str, database: str) -> None:
    """Differences are shown and recorded under the matching label; then none are left."""
    await record_session(database, BEGINS - MINUTE, ENDS + MINUTE, "stopped")
    for minute in (*range(40, 52), 15, 20):
        await execute(database, TICK, at(minute), 1.5 + minute, 100, "A.NZ")
    labelled = [ohlcv(1.5 + minute, 100, minute + 1) for minute in range(40, 52)]
    labelled += [ohlcv(16.5, 90, 16), ohlcv(7, 70, 31)]

    def script(asked: Request) -> bytes:
        if asked.path == "/info/ticker":
            return LISTED
        if asked.parameters["ticker"] == "GONE.NZ":
            return answer({}, status=404)
        return answer({"data": labelled if asked.parameters["ticker"] == "A.NZ" else []})

    await execute(database, "INSERT INTO market.instruments (symbol, exchange) VALUES ('GONE.NZ', 'nzx')")
    async with scripted(script) as server:
        environment = {"DATABASE_URL": writer_url, "REST_URL": server.url, "TOKEN": TOKEN}
        status, output, _ = await ingestor("reconcile", "--date=2026-11-20", **environment)
        assert status == 1
        assert "495 minutes wholly covered, 2 symbols. Bars compared: 15, the same: 12, different: 3." in output, output
        assert "The provider labels a bar by its end: 12 bars fit, by its start 0." in output
        assert "Unknown to the provider: GONE.NZ" in output
        assert "run this again with --set-bar-label" in output
        sql = "SELECT time, difference, our_volume, their_volume FROM ingest.reconciliations ORDER BY time"
        assert await query(database, sql) == [
            (at(15), "differs", 100, 90),
            (at(20), "missing there", 100, None),
            (at(30), "missing here", None, 70),
        ]
        labelled[12:] = [ohlcv(16.5, 100, 16), ohlcv(21.5, 100, 21)]
        status, output, _ = await ingestor("reconcile", "--date=2026-11-20", "--set-bar-label", **environment)
        assert status == 0
        assert "From now on bars are taken by their end." in output
        assert await query(database, sql) == []
        assert await query(database, "SELECT bar_label FROM ingest.settings") == [("end",)]
        status, output, _ = await ingestor("reconcile", "--date=2026-11-20", "--symbol=A.NZ", **environment)
        assert status == 0
        assert "1 symbols" in output
        assert "adopt" not in output


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"high": 1.0}, "a high below another price (2026-11-19T20:45:00+00:00)"),
        ({"timestamp": "soon"}, "no timestamp that can be read (soon)"),
    ],
)
async def test_a_wrong_record_is_no_difference(
    wrong: dict[str, Any], reason: str, writer_url: str, database: str
) -> None:
    """The minute of a wrong record is reported and not compared; the others are."""
    await record_session(database, BEGINS - MINUTE, ENDS + MINUTE, "stopped")
    for minute in range(40, 52):
        await execute(database, TICK, at(minute), 1.5 + minute, 100, "A.NZ")
    theirs = [{**ohlcv(1.5 + minute, 100, minute), **(wrong if minute == 45 else {})} for minute in range(40, 52)]

    def script(asked: Request) -> bytes:
        return LISTED if asked.path == "/info/ticker" else answer({"data": theirs})

    async with scripted(script) as server:
        environment = {"DATABASE_URL": writer_url, "REST_URL": server.url, "TOKEN": TOKEN}
        status, output, _ = await ingestor("reconcile", "--date=2026-11-20", "--symbol=A.NZ", **environment)
    assert status == 1
    assert "Bars compared: 11, the same: 11, different: 0." in output
    assert f"A.NZ: 1 of 12 records are wrong: {reason}: these minutes are not compared." in output
    assert await query(database, "SELECT * FROM ingest.reconciliations") == []


async def test_wrong_records_of_a_backfill_are_counted(writer_url: str, database: str) -> None:
    """Wrong records are counted by reason over all symbols and the listing, and the run is incomplete."""
    await with_a_gap(database)

    def script(asked: Request) -> bytes:
        if asked.path == "/info/ticker":
            return answer({"data": [{"symbol": "A.NZ"}, {"symbol": "B.NZ"}, {"name": "C.NZ"}]})
        return answer({"data": [ohlcv(-1, 5, 100), ohlcv(1, -5, 101), ohlcv(2, 5, 102)]})

    async with scripted(script) as server:
        environment = {"DATABASE_URL": writer_url, "REST_URL": server.url, "TOKEN": TOKEN}
        status, output, _ = await ingestor("backfill", "--until=2026-11-21", **environment)
    assert status == 1
    assert "The list of instruments: 1 of 3 records are wrong: no symbol (record 3)." in output
    assert (
        "Wrong records in the answers (details in ingest.backfills): "
        "a price that is not above zero: 2; a negative volume: 2." in output
    )


async def test_reconcile_finds_ticks_that_the_server_dropped(writer_url: str, database: str) -> None:
    """The simulator's bars reveal ticks that the server dropped while the stream looked alive."""
    await record_session(database, BEGINS - MINUTE, ENDS + MINUTE, "stopped")
    async with Simulator(port=0, rate=0) as simulator:
        for minute in range(5, 25):
            simulator.send([Tick("AIR.NZ", seconds(minute + part), 1.0 + minute / 100, 10) for part in (0.1, 0.6)])
            for part in (0.1, 0.6):
                if minute not in {8, 20} and (minute, part) != (12, 0.6):
                    await execute(database, TICK, at(minute + part), 1.0 + minute / 100, 10, "AIR.NZ")
        environment = {"DATABASE_URL": writer_url, "REST_URL": simulator.rest_url, "TOKEN": TOKEN}
        status, output, _ = await ingestor("reconcile", "--date=2026-11-20", **environment)
    assert status == 1
    assert "The provider labels a bar by its start: 17 bars fit" in output
    assert await query(database, "SELECT time, difference FROM ingest.reconciliations ORDER BY time") == [
        (at(8), "missing here"), (at(12), "differs"), (at(20), "missing here")
    ]  # fmt: skip


async def test_reconcile_without_anything_to_compare(writer_url: str, database: str) -> None:
    """A day without trading or coverage is reported."""
    await record_session(database, BEGINS - MINUTE, BEGINS + timedelta(seconds=5))
    environment = {"DATABASE_URL": writer_url, "REST_URL": "http://127.0.0.1:1", "TOKEN": TOKEN}
    status, _, errors = await ingestor("reconcile", "--date=2026-11-21", **environment)
    assert (status, errors) == (69, "ingestor: 2026-11-21 is not a trading day on record.\n")
    status, _, errors = await ingestor("reconcile", "--date=2026-11-20", **environment)
    assert status == 69
    assert "No minute of 2026-11-20 is fully covered" in errors
    assert (await ingestor("reconcile", "--date=2026-11-20T10:00:00Z", **environment))[0] == 2


async def test_maintain(database: str, writer_url: str) -> None:
    """Missing, moved and invalid sessions of the stored calendar are corrected."""
    await execute(database, "DELETE FROM ingest.trading_sessions WHERE trading_day = '2026-11-20'")
    early = "UPDATE ingest.trading_sessions SET closes_at = closes_at - $1::interval WHERE trading_day = '2026-11-19'"
    await execute(database, early, MINUTE)
    await execute(
        database, "INSERT INTO ingest.trading_sessions VALUES ('XNZE', '2026-11-21', $1, $2)",
        at(60) + timedelta(days=1), at(90) + timedelta(days=1),
    )  # fmt: skip
    status, output, errors = await ingestor("maintain", DATABASE_URL=database)
    assert status == 0, errors
    assert "trading sessions changed, known until 20" in output
    days = await query(
        database, "SELECT trading_day::text, closes_at - opens_at FROM ingest.trading_sessions "
        "WHERE calendar = 'XNZE' AND trading_day BETWEEN '2026-11-19' AND '2026-11-22' ORDER BY 1",
    )  # fmt: skip
    assert days == [("2026-11-19", timedelta(hours=6.75)), ("2026-11-20", timedelta(hours=6.75))]
    again = (await ingestor("maintain", DATABASE_URL=database))[1]
    assert ": 0 trading sessions changed" in again
    await execute(database, early, MINUTE)
    status, _, errors = await ingestor("maintain", DATABASE_URL=writer_url)
    assert status == 69
    assert "Maintain as a role that owns the database" in errors
