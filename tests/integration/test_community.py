"""The features of TimescaleDB Community work: continuous aggregates, policies, the columnstore. Jobs are run by hand.

The tests use a full server (INGESTOR_TEST_TIMESCALE_URL) and one that has neither COPY nor a second connection
(INGESTOR_TEST_COMMUNITY_URL, whose database is emptied). They run in order on the same database.
"""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import pytest
from alembic import command

from ingestor.admin.aggregates import VIEWS, repair_aggregates
from ingestor.admin.engine import as_owner, create_engine, without_transactions
from ingestor.admin.hypertable import convert_to_hypertable, relations_revision
from ingestor.admin.migrate import configuration, migrate
from ingestor.settings import load_settings
from ingestor.store.connect import connect
from tests.bars import BUCKETS, TickRow, assert_bars, insert, maintained, some_ticks
from tests.servers import execute_all, query

# A server in WebAssembly takes 44 ms for each answer, so its migration alone takes more than a minute.
pytestmark = [pytest.mark.usefixtures("bundled_calendar"), pytest.mark.timeout(600)]

NOW = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
OLD = NOW - timedelta(days=60)
RECENT = NOW - timedelta(hours=8)
JOBS = """
SELECT job_id, proc_name FROM timescaledb_information.jobs
WHERE proc_name IN ('refresh_bars', 'policy_compression', 'policy_columnstore') ORDER BY job_id
"""
COMPRESSED = """
SELECT count(*) FILTER (WHERE hypertable_schema = 'market'), count(*) FILTER (WHERE hypertable_schema <> 'market')
FROM timescaledb_information.chunks WHERE is_compressed
"""
STALE = "SELECT count(*) FROM ingest.stale_bars WHERE time < (SELECT until_1m FROM ingest.rolled)"
DECOMPRESSED = "timescaledb.max_tuples_decompressed_per_dml_transaction"
LIMIT_OF_DATABASE = f"""
DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET {DECOMPRESSED} {{}}', current_database()); END $$
"""
NOTE = """
INSERT INTO ingest.stale_bars (symbol, time) SELECT DISTINCT s, date_bin('1 minute', t, '2000-01-01 00:00:00+00')
FROM unnest($1::text[], $2::timestamptz[]) AS late (s, t) WHERE t < (SELECT noted_before FROM ingest.rolled)
ON CONFLICT (symbol, time) DO UPDATE SET noted_at = clock_timestamp()
"""


async def _store(url: str, rows: list[TickRow]) -> None:
    """Store ticks as the daemon does, noting the minutes of late ones."""
    await insert(url, rows)
    connection = await connect(url)
    await connection.execute(NOTE, [row[5] for row in rows], [row[0] for row in rows])
    await connection.close()


async def _run_jobs(url: str) -> list[str]:
    jobs = await query(url, JOBS)
    await execute_all(url, *(f"CALL run_job({number})" for number, _ in jobs))
    return [name for _, name in jobs]


async def _counted(url: str) -> dict[str, Any]:
    return {name: (await query(url, f"SELECT count(*) FROM market.ohlcv_{name}"))[0][0] for name in BUCKETS}


async def test_old_ticks_and_jobs_then_maintenance(community: str) -> None:
    """Bars are exact before a job has run, after each of its steps, and after `maintain`, which leaves none stale.

    Old ticks that are copied into an empty database need no notes, whether or not its jobs have run.
    """
    await _run_jobs(community)
    await maintained(community)
    await insert(community, some_ticks(OLD, 10, 600))
    await _store(community, some_ticks(RECENT, 0.3, 300, seed=2))
    whole = await assert_bars(community)
    for _ in range(2):
        assert (await _run_jobs(community)).count("refresh_bars") == 1
        assert await assert_bars(community) == whole
    assert not [line for line in await maintained(community) if line.startswith("Bars")]
    await execute_all(community, "UPDATE ingest.rollup_state SET announced_until = DEFAULT")
    lines: list[str] = []
    moments = count(step=4)  # each step takes four seconds
    async with as_owner(community, failure="Failed", verb="Run") as engine, without_transactions(engine) as connection:
        await repair_aggregates(connection, lines.append, monotonic=lambda: float(next(moments)))
    assert len(lines) > 2
    assert all(line.startswith("Bars: computed until") for line in lines)
    assert await assert_bars(community) == whole
    assert await query(community, STALE) == [(0,)]


async def test_a_step_that_exceeds_a_limit_shrinks(community: str) -> None:
    """A step that the server cancels is repeated with half of its time, until bars are complete."""
    whole = await assert_bars(community)
    await execute_all(community, "UPDATE ingest.rollup_state SET announced_until = DEFAULT")
    limit = """
    CREATE FUNCTION ingest.limit_refresh() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.announced_until - OLD.announced_until BETWEEN '2 days' AND '7 days' THEN
            RAISE query_canceled;
        END IF;
        RETURN NEW;
    END
    $$"""
    trigger = """
    CREATE TRIGGER limit_refresh BEFORE UPDATE ON ingest.rollup_state
    FOR EACH ROW EXECUTE FUNCTION ingest.limit_refresh()
    """
    await execute_all(community, limit, trigger)
    await maintained(community)
    assert await query(community, "SELECT announced_until > now() - interval '4 hours' FROM ingest.rollup_state") == [
        (True,)
    ]
    assert await assert_bars(community) == whole
    await execute_all(community, "DROP FUNCTION ingest.limit_refresh CASCADE")


async def test_a_bar_without_ticks_goes(community: str) -> None:
    """If all ticks of stored minutes were deleted, their bars go from every width, and come back with new ticks."""
    before = await _counted(community)
    ((day,),) = await query(
        community, f"SELECT min(time) FROM market.ohlcv_1d WHERE time > '{OLD + timedelta(days=2)}'"
    )
    span = f"'{day}', '{day + timedelta(hours=26)}'"
    rows = await query(community, f"SELECT * FROM market.ticks WHERE time <@ tstzrange({span})")
    assert rows
    await execute_all(
        community,
        f"SELECT ingest.mark_stale({span})",
        f"DELETE FROM market.ticks WHERE time <@ tstzrange({span})",
    )
    for _ in range(2):
        after = await assert_bars(community)
        assert after["1d"] < before["1d"]
        await maintained(community)
    await _store(community, rows)
    for _ in range(2):
        assert await assert_bars(community) == before
        await maintained(community)


async def test_a_late_tick_is_in_every_width_at_once(community: str) -> None:
    """A late tick in a computed range needs no maintenance, and a repair of only some of the widths hides none."""
    before = await assert_bars(community)
    late = [
        (OLD - timedelta(days=3), NOW, 1.5, 10, 1, "LATE.NZ"),
        (NOW - timedelta(days=3), NOW, 2.5, 1, 1, "A.NZ"),
        *((NOW - timedelta(days=days), NOW, 4.5, 1, 1, "IDLE.NZ") for days in range(1, 41)),
    ]
    await _store(community, late)
    after = await assert_bars(community)
    assert all(after[name] > before[name] for name in BUCKETS)
    for view in VIEWS[:2]:
        await execute_all(community, f"CALL refresh_continuous_aggregate('{view}', NULL, NULL)")
        assert await assert_bars(community) == after
    await maintained(community)
    assert await assert_bars(community) == after
    assert await query(community, STALE) == [(0,)]


async def test_jobs_that_did_not_run_for_weeks(community: str) -> None:
    """If weeks were never computed, no bar of them is missing while the job catches up."""
    whole = await assert_bars(community)
    await execute_all(community, f"UPDATE ingest.rollup_state SET announced_until = '{OLD:%Y-%m-%d %H:00+00}'")
    for _ in range(3):
        await _run_jobs(community)
        assert await assert_bars(community) == whole
    await maintained(community)
    assert await assert_bars(community) == whole


@pytest.mark.parametrize("span", [timedelta(days=7), timedelta(hours=6)], ids=str)
async def test_a_day_that_outlasts_its_chunk(community: str, span: timedelta) -> None:
    """The bar of a day is computed if a span ends with the day's only chunk and no chunk follows for weeks."""
    lonely = OLD - timedelta(days=40)
    await _store(community, [(lonely, NOW, 1.5, 10, 1, f"LONELY {span}")])
    of_tick = f"""
    SELECT range_end FROM timescaledb_information.chunks
    WHERE hypertable_name = 'ticks' AND range_start <= '{lonely}' AND range_end > '{lonely}'"""
    ((end,),) = await query(community, of_tick)
    await _store(community, [(end - timedelta(minutes=1), NOW, 2.5, 10, 1, f"LONELY {span}")])
    whole = await assert_bars(community)
    until = end - timedelta(days=7)
    to_start = f"UPDATE ingest.rollup_state SET announced_until = '{until}'"
    await execute_all(community, to_start, "DELETE FROM ingest.stale_bars")  # a repair would compute it as well
    while until <= end + timedelta(days=2):
        await execute_all(community, f"""CALL ingest.refresh_bars(0, '{{"span": "{span.total_seconds()} s"}}')""")
        ((until,),) = await query(community, "SELECT announced_until FROM ingest.rollup_state")
    await maintained(community)
    assert await assert_bars(community) == whole


async def test_the_columnstore(community: str) -> None:
    """Chunks are compressed after two weeks; copies and late ticks meet the same ticks there as before.

    The repair of late ticks' bars decompresses nothing.
    """
    rows = await query(community, "SELECT * FROM market.ticks ORDER BY time, symbol")
    assert "Ticks and bars go to the columnstore" in "".join(await maintained(community, columnstore_after="15d"))
    assert not [line for line in await maintained(community, columnstore_after="15d") if "columnstore" in line]
    await _run_jobs(community)
    ((of_ticks, of_bars),) = await query(community, COMPRESSED)
    assert of_ticks >= 2
    assert of_bars >= len(VIEWS) - 1
    assert await query(community, "SELECT * FROM market.ticks ORDER BY time, symbol") == rows
    copies = (
        "INSERT INTO market.ticks SELECT * FROM market.ticks "
        "ON CONFLICT (symbol, time, price, volume, occurrence) DO NOTHING"
    )
    await execute_all(community, copies)
    assert await query(community, "SELECT count(*) FROM market.ticks") == [(len(rows),)]
    equal = rows[5]
    await _store(community, [(*equal[:4], 99, equal[5])])
    await assert_bars(community)
    # A new session of a full server has the database's setting; the build in WebAssembly has one session for all.
    await execute_all(community, LIMIT_OF_DATABASE.format("= 1"), f"SET {DECOMPRESSED} = 1")
    await maintained(community, columnstore_after="15d")
    await execute_all(community, LIMIT_OF_DATABASE.format("TO DEFAULT"), f"RESET {DECOMPRESSED}")
    assert await query(community, STALE) == [(0,)]
    assert await query(community, "SELECT count(*) FROM market.ticks") == [(len(rows) + 1,)]
    await assert_bars(community)
    (line,) = [line for line in await maintained(community, columnstore_after="off") if "columnstore" in line]
    assert line == "Ticks and bars go to the columnstore never."
    # The build in WebAssembly (2.23.0-dev) groups a chunk's ticks wrongly after it has compressed the chunk twice.
    await execute_all(community, "SELECT decompress_chunk(chunk, true) FROM show_chunks('market.ticks') AS chunk")


async def test_an_interrupted_migration(community: str) -> None:
    """If the job is missing, `migrate` computes the missing bars and adds it; a second run does nothing."""
    await execute_all(
        community,
        "SELECT delete_job(job_id) FROM timescaledb_information.jobs WHERE proc_name = 'refresh_bars'",
        "UPDATE ingest.rollup_state SET announced_until = DEFAULT",
    )
    lines: list[str] = []
    await migrate(community, load_settings(), lines.append)
    assert any(line.startswith("Bars: computed until") for line in lines)
    assert (await _run_jobs(community)).count("refresh_bars") == 1
    await assert_bars(community)
    lines.clear()
    await migrate(community, load_settings(), lines.append)
    assert not any(line.startswith("Bars") for line in lines)


async def test_a_server_that_changed_its_edition(community: str) -> None:
    """If views were made under another licence, `migrate` replaces them by aggregates of all ticks."""
    whole = await assert_bars(community)
    grants = (
        "SELECT grantee::regrole::text, privilege_type FROM pg_class, aclexplode(relacl) "
        "WHERE oid = 'market.ohlcv_1m'::regclass ORDER BY 1, 2"
    )
    before = await query(community, grants)
    relations: Any = relations_revision()
    engine = create_engine(community)
    async with engine.begin() as connection:
        await connection.run_sync(relations.drop_relations)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(relations.bars, "is_community", lambda _: False)
            await connection.run_sync(relations.make_relations)
        await connection.exec_driver_sql("GRANT SELECT ON market.ohlcv_1m TO market_read")
    await engine.dispose()
    lines: list[str] = []
    await convert_to_hypertable(community, load_settings(), lines.append)
    assert lines[0] == "market.ticks is a hypertable already; its bars are continuous aggregates now."
    assert any(line.startswith("Bars: computed until") for line in lines)
    await _run_jobs(community)
    assert await assert_bars(community) == whole
    assert await query(community, grants) == before
    lines.clear()
    await convert_to_hypertable(community, load_settings(), lines.append)
    assert lines == ["market.ticks is a hypertable already: there is nothing to convert."]


async def test_down_and_up_with_data(community: str) -> None:
    """A downgrade and an upgrade remove and restore aggregates and columnstore and keep every tick."""
    whole = await assert_bars(community)
    ticks = "SELECT count(*) FROM market.ticks"
    before = await query(community, ticks)
    config = configuration()
    await execute_all(community, "SELECT compress_chunk(chunk, true) FROM show_chunks('market.ticks') AS chunk")
    await asyncio.to_thread(_alembic, command.downgrade, config, community, "0002")
    assert await query(community, ticks) == before
    assert await query(community, COMPRESSED) == [(0, 0)]
    await migrate(community, load_settings(), lambda _: None)
    await _run_jobs(community)
    assert await assert_bars(community) == whole


def _alembic(run: Any, config: Any, url: str, revision: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INGESTOR_DATABASE_URL", url)
        run(config, revision)


@pytest.mark.parametrize("seed", range(3))
async def test_bars_are_exact_at_every_step(community: str, seed: int) -> None:
    """The bars equal the ticks after each write, each refresh of a random window and width, and each repair."""
    chance = random.Random(seed)
    for step in range(15):
        action = chance.choice(["write", "write", "refresh", "refresh", "job"])
        if action == "write":
            times = [
                NOW - timedelta(minutes=chance.choice([0, 70, 130, chance.randrange(60 * 24 * 20)])) for _ in "123"
            ]
            rows = [
                (t, NOW, chance.random(), 1, 1000 * (seed + 1) + 10 * step + n, "A.NZ") for n, t in enumerate(times)
            ]
            await _store(community, rows)
        elif action == "job":
            await execute_all(community, "CALL ingest.refresh_bars(0, NULL)")
        else:
            since = NOW - timedelta(hours=chance.randrange(30, 24 * 20))
            until = since + timedelta(hours=chance.randrange(49, 24 * 9))
            window = f"'{since}', '{until}'" if chance.random() < 0.8 else "NULL, NULL"
            await execute_all(community, f"CALL refresh_continuous_aggregate('{chance.choice(VIEWS)}', {window})")
        await assert_bars(community)


async def test_retention_keeps_the_bars(community: str) -> None:
    """Retention keeps the bars of dropped ticks; a late tick among them is merged into its bar and dropped too."""
    whole = await assert_bars(community)
    assert any("dropped" in line for line in await maintained(community, retention="30d"))
    assert await _counted(community) == whole
    bar = "SELECT time, ticks, high FROM market.ohlcv_1m WHERE symbol = 'A.NZ' AND time < $1 ORDER BY time LIMIT 1"
    ((time, ticks, _),) = await query(community, bar.replace("$1", f"'{OLD + timedelta(days=2)}'"))
    await _store(community, [(time + timedelta(seconds=30), NOW, 9.0, 1, 1, "A.NZ")])
    for _ in range(2):
        assert await query(community, bar.replace("$1", f"'{OLD + timedelta(days=2)}'")) == [(time, ticks + 1, 9.0)]
        assert await _counted(community) == whole
        await maintained(community, retention="20d")
        assert await query(
            community, f"SELECT count(*) FROM market.ticks WHERE time < '{OLD + timedelta(days=2)}'"
        ) == [(0,)]
