"""The features of TimescaleDB Community work: continuous aggregates, policies, the columnstore. Jobs are run by hand.

The tests use a full server (INGESTOR_TEST_TIMESCALE_URL) and one that has neither COPY nor a second connection
(INGESTOR_TEST_COMMUNITY_URL, whose database is emptied). They run in order on the same database.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from alembic import command
from alembic.script import ScriptDirectory

from ingestor.admin.aggregates import LEVELS
from ingestor.admin.engine import create_engine
from ingestor.admin.hypertable import convert_to_hypertable
from ingestor.admin.migrate import configuration, migrate
from ingestor.settings import load_settings
from ingestor.store.connect import connect
from ingestor.store.queries import QUERIES
from tests.bars import BUCKETS, TickRow, assert_bars, insert, maintained, some_ticks
from tests.servers import execute_all, query

pytestmark = pytest.mark.usefixtures("bundled_calendar")

NOW = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
OLD = NOW - timedelta(days=60)
RECENT = NOW - timedelta(hours=8)
JOBS = "SELECT job_id, proc_name FROM timescaledb_information.jobs WHERE proc_name LIKE 'policy_%' ORDER BY job_id"
COMPRESSED = "SELECT count(*) FROM timescaledb_information.chunks WHERE hypertable_name = 'ticks' AND is_compressed"


async def _store_late(url: str, rows: list[TickRow]) -> None:
    """Store ticks as the daemon does, marking stale ranges."""
    await insert(url, rows)
    connection = await connect(url)
    await connection.execute(QUERIES["note_late"], min(row[0] for row in rows), max(row[0] for row in rows))
    await connection.close()


async def _run_jobs(url: str) -> list[str]:
    jobs = await query(url, JOBS)
    await execute_all(url, *(f"CALL run_job({number})" for number, _ in jobs))
    return [name for _, name in jobs]


async def _counted(url: str) -> dict[str, Any]:
    return {name: (await query(url, f"SELECT count(*) FROM market.ohlcv_{name}"))[0][0] for name in BUCKETS}


async def test_old_ticks_and_a_policy_then_maintenance(community: str) -> None:
    """Late rows before a policy's range are missing until `maintain` recomputes the stale ranges."""
    await _store_late(community, some_ticks(OLD, 10, 600))
    await insert(community, some_ticks(RECENT, 0.3, 300, seed=2))
    whole = await assert_bars(community)
    names = await _run_jobs(community)
    assert names.count("policy_refresh_continuous_aggregate") == len(LEVELS)
    assert (await _counted(community))["1m"] < whole["1m"]
    lines = await maintained(community)
    assert sum("Bars recomputed" in line for line in lines) == 1
    assert await assert_bars(community) == whole
    assert await query(community, "SELECT count(*) FROM ingest.stale_ranges") == [(0,)]


async def test_bars_before_the_computed_range(community: str) -> None:
    """If a recent window was computed before weeks of older ticks, `maintain` computes the older bars."""
    rows = [(NOW - timedelta(days=days), NOW, 4.5, 1, 1, "IDLE.NZ") for days in range(1, 41)]
    await insert(community, rows)
    count = "SELECT count(*) FROM market.ohlcv_1d WHERE symbol = 'IDLE.NZ'"
    await _run_jobs(community)
    assert (await query(community, count))[0][0] < 40
    await maintained(community, retention="90d")
    assert await query(community, count) == [(40,)]
    await assert_bars(community)


async def test_late_ticks(community: str) -> None:
    """A late tick in a computed range appears in every width after `maintain`."""
    before = await assert_bars(community)
    late = OLD - timedelta(days=3)
    await _store_late(
        community, [(late, NOW, 1.5, 10, 1, "LATE.NZ"), (NOW - timedelta(days=3), NOW, 2.5, 1, 1, "A.NZ")]
    )
    # As if the jobs had not run for weeks, and then only the recent ones.
    await insert(community, [(NOW - timedelta(days=20), NOW, 3.5, 1, 1, "LEFT.NZ")])
    assert await _counted(community) == before
    await maintained(community)
    after = await assert_bars(community)
    assert all(after[name] > before[name] for name in BUCKETS)
    assert await query(community, "SELECT count(*) FROM market.ohlcv_1d WHERE symbol = 'LEFT.NZ'") == [(1,)]


async def test_the_columnstore(community: str) -> None:
    """Chunks are compressed after two weeks; copies and late ticks meet the same ticks there as before."""
    rows = await query(community, "SELECT * FROM market.ticks ORDER BY time, symbol")
    assert "Ticks go to the columnstore" in "".join(await maintained(community, columnstore_after="15d"))
    assert not [line for line in await maintained(community, columnstore_after="15d") if "columnstore" in line]
    await _run_jobs(community)
    ((compressed,),) = await query(community, COMPRESSED)
    assert compressed >= 2
    assert await query(community, "SELECT * FROM market.ticks ORDER BY time, symbol") == rows
    copies = (
        "INSERT INTO market.ticks SELECT * FROM market.ticks "
        "ON CONFLICT (symbol, time, price, volume, occurrence) DO NOTHING"
    )
    await execute_all(community, copies)
    assert await query(community, "SELECT count(*) FROM market.ticks") == [(len(rows),)]
    equal = rows[5]
    await _store_late(community, [(*equal[:4], 99, equal[5])])
    await maintained(community, columnstore_after="15d")
    assert await query(community, "SELECT count(*) FROM market.ticks") == [(len(rows) + 1,)]
    await assert_bars(community)
    (line,) = [line for line in await maintained(community, columnstore_after="off") if "columnstore" in line]
    assert line == "Ticks go to the columnstore never."


async def test_an_interrupted_migration(community: str) -> None:
    """If a policy is missing, `migrate` first computes the missing bars; a second run does nothing."""
    for level in LEVELS[:2]:
        await execute_all(community, f"SELECT remove_continuous_aggregate_policy('{level.view}')")
    lines: list[str] = []
    await migrate(community, load_settings(), lines.append)
    assert any(line.startswith("Bars of 1m: computed until") for line in lines)
    assert not any(line.startswith("Bars of 1h") for line in lines)
    assert (await _run_jobs(community)).count("policy_refresh_continuous_aggregate") == len(LEVELS)
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
    relations = ScriptDirectory.from_config(configuration()).get_revision("0003").module
    engine = create_engine(community)
    async with engine.begin() as connection:
        await connection.run_sync(relations.drop_relations)
        await connection.run_sync(relations._make_views)
        await connection.exec_driver_sql(relations.BARS_1M)
        await connection.exec_driver_sql("GRANT SELECT ON market.ohlcv_1m TO market_read")
    await engine.dispose()
    lines: list[str] = []
    await convert_to_hypertable(community, load_settings(), lines.append)
    assert lines[0] == "market.ticks is a hypertable already; its bars are continuous aggregates now."
    assert any(line.startswith("Bars of 1d: computed until") for line in lines)
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
    assert await query(community, COMPRESSED) == [(0,)]
    await migrate(community, load_settings(), lambda _: None)
    await _run_jobs(community)
    assert await assert_bars(community) == whole


def _alembic(run: Any, config: Any, url: str, revision: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INGESTOR_DATABASE_URL", url)
        run(config, revision)


async def test_retention_keeps_the_bars(community: str) -> None:
    """Retention keeps the bars of dropped ticks, and a late tick among them does not replace those bars."""
    whole = await assert_bars(community)
    assert any("dropped" in line for line in await maintained(community, retention="30d"))
    assert await _counted(community) == whole
    late = (OLD + timedelta(days=1), NOW, 9.0, 1, 1, "A.NZ")
    await _store_late(community, [late])
    await maintained(community, retention="30d")
    assert await _counted(community) == whole
    assert await query(community, "SELECT count(*) FROM market.ohlcv_1m WHERE high = 9") == [(0,)]
