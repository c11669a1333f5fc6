"""`make storage-report URL=… ROWS=…`: fills an empty database with a year of ticks, measures, and writes the page."""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import time
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path

import asyncpg
from rich.progress import Progress

from ingestor.admin.maintenance import maintain
from ingestor.admin.migrate import migrate
from ingestor.errors import IngestorError
from ingestor.settings import load_settings
from ingestor.store.connect import connect
from ingestor.store.inspect import inspect
from tests.examples import PAGE, examples
from tests.storage.fill import fill

PROJECT = Path(__file__).parents[2]
REPORT = PROJECT / "docs" / "explanation" / "storage.md"
PLANS = PROJECT / "benchmarks" / "plans"
EDITIONS = ["plain", "apache", "community"]
LAST = date(2026, 11, 21)
ROWS = 20_000_000
RUNS = 5
PLAN_LINES = 14

AIMS = {
    "one symbol, one day of one-minute bars": (
        "SELECT * FROM market.bars_1m "
        "WHERE symbol = 'AIR.NZ' AND time >= '2026-11-20 00:00+13' AND time < '2026-11-21 00:00+13'"
    ),
    "all symbols, a year of daily bars": (
        "SELECT * FROM market.ohlcv_1d WHERE time >= '2025-11-21 00:00+13' AND time < '2026-11-21 00:00+13'"
    ),
}

_SIZES = """
SELECT coalesce(sum(pg_relation_size(c.oid)), 0)::bigint AS heap,
       coalesce(sum((SELECT sum(pg_relation_size(i.indexrelid)) FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid
                     JOIN pg_am a ON a.oid = x.relam WHERE i.indrelid = c.oid AND a.amname = 'btree')), 0)::bigint
           AS key,
       coalesce(sum((SELECT sum(pg_relation_size(i.indexrelid)) FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid
                     JOIN pg_am a ON a.oid = x.relam WHERE i.indrelid = c.oid AND a.amname = 'brin')), 0)::bigint
           AS buckets
FROM pg_class c WHERE c.relkind = 'r' AND c.oid IN (
    SELECT inhrelid FROM pg_inherits WHERE inhparent = 'market.ticks'::regclass)
"""
_BARS = """
SELECT sum(pg_table_size(format('ingest.rollup_%s', width)::regclass))::bigint AS heap,
       sum(pg_indexes_size(format('ingest.rollup_%s', width)::regclass))::bigint AS key
FROM unnest(ARRAY['1m', '5m', '1h', '1d']) AS width
"""
_RESTARTS = """
INSERT INTO ingest.stream_sessions (id, instance, endpoint, connected_at, authenticated_at, covered_until,
    last_message_at, last_tick_at, last_seen_at, ended_at, end_reason)
SELECT gen_random_uuid(), 'one', 'ws://x', since, since, until, until, until, until, until, 'closed'
FROM (
    SELECT opens_at - interval '1 hour' AS first, opens_at + interval '3 hours' AS cut,
           closes_at + interval '1 hour' AS last
    FROM ingest.trading_sessions
    WHERE calendar = 'XNZE' AND opens_at > now() - interval '6 years' AND opens_at < now() - interval '1 year 10 days'
) AS d, LATERAL (VALUES (first, cut), (cut + interval '90 seconds', last)) AS part (since, until)
"""
_LATE = """
WITH late AS (
    INSERT INTO market.ticks (time, received_at, price, volume, occurrence, symbol)
    SELECT time, now(), price, volume, 1000 + row_number() OVER (), symbol FROM market.ticks
    WHERE time > now() - interval '6 months' AND time < now() - interval '8 days' AND random() < $1
    RETURNING symbol, time
), noted AS (
    INSERT INTO ingest.stale_bars (symbol, time)
    SELECT DISTINCT symbol, date_bin('1 minute', time, '2000-01-01 00:00:00+00'::timestamptz) FROM late
)
SELECT count(*) FROM late
"""
_HYPERTABLE = "SELECT hypertable_size('market.ticks')"
_AGGREGATES = """
SELECT sum(hypertable_size(
    format('%I.%I', materialization_hypertable_schema, materialization_hypertable_name)::regclass))
FROM timescaledb_information.continuous_aggregates
"""
_JOB = "SELECT job_id FROM timescaledb_information.jobs WHERE proc_schema = 'ingest' AND proc_name = 'refresh_bars'"


@dataclass
class Section:
    """The results of one server's run."""

    title: str
    lines: list[str] = field(default_factory=list)
    plans: list[str] = field(default_factory=list)

    @property
    def edition(self) -> str:
        """The name of the server's edition, by which sections are identified and sorted."""
        return edition_of(self.title)

    def table(self, *rows: tuple[str, ...]) -> None:
        """Add a table whose first row is the head."""
        head, *body = rows
        self.lines += ["", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        self.lines += [f"| {' | '.join(row)} |" for row in body]


async def main(url: str, rows: int, *, is_filled: bool) -> None:
    """Fill, measure and write."""
    await migrate(url, load_settings(database_url=url), _report)
    facts = await inspect(url)
    section = Section(f"PostgreSQL {facts.version.split()[0]} {facts.edition}")
    filled = "" if is_filled else await _fill(url, rows)
    began = time.monotonic()
    await maintain(load_settings(database_url=url), _report)
    kept = f", maintained in {time.monotonic() - began:,.0f} s" * (not is_filled)
    connection = await connect(url)
    await connection.execute("VACUUM (ANALYZE)")
    count = await connection.fetchval("SELECT count(*) FROM market.ticks")
    section.lines += ["", f"{count:,} ticks; measured on {datetime.now(UTC):%Y-%m-%d}{filled}{kept}."]
    await _measure_sizes(connection, section, count, is_community="Community" in facts.edition)
    await connection.execute("SET TIME ZONE 'Pacific/Auckland'")
    await connection.execute("SET jit = off")
    await _measure_queries(connection, section)
    await _measure_restarts(connection, section)
    await _measure_repair(connection, url, section, count)
    await connection.close()
    _write(section)


async def _fill(url: str, rows: int) -> str:
    connection = await connect(url)
    if await connection.fetchval("SELECT EXISTS (SELECT FROM market.ticks)"):
        raise IngestorError("This database contains ticks: name an empty one, or add --filled.")
    began = time.monotonic()
    with Progress() as bar:
        task = bar.add_task("ticks", total=rows)
        await fill(connection, rows, LAST, lambda done: bar.update(task, completed=done))
    await connection.close()
    return f", filled in {time.monotonic() - began:,.0f} s"


async def _measure_sizes(connection: asyncpg.Connection, section: Section, count: int, *, is_community: bool) -> None:
    sizes = await connection.fetchrow(_SIZES)
    assert sizes is not None
    found = [(name, sizes[name]) for name in ("heap", "key", "buckets")]
    if is_community:
        before = await connection.fetchval(_HYPERTABLE)
        await connection.execute("SELECT compress_chunk(chunk, true) FROM show_chunks('market.ticks') AS chunk")
        after = await connection.fetchval(_HYPERTABLE)
        found += [("total before the columnstore", before), ("total in the columnstore", after)]
        found += [("bars of all widths before the columnstore", await connection.fetchval(_AGGREGATES))]
        await connection.execute(f"CALL run_job({await connection.fetchval(_JOB)})")  # those older than 14 days
        found += [("bars of all widths", await connection.fetchval(_AGGREGATES))]
        found += [("together", after + found[-1][1])]
    else:
        bars = await connection.fetchrow(_BARS)
        assert bars is not None
        found += [("bars of all widths, rows", bars["heap"]), ("bars of all widths, indexes", bars["key"])]
        found += [("together", sum(size for _, size in found))]
    names = {"heap": "rows", "key": "the key's index", "buckets": "the index on time"}
    section.table(
        ("part", "MiB", "bytes a tick"),
        *((names.get(name, name), f"{size / 2**20:,.1f}", f"{size / count:,.2f}") for name, size in found),
    )


async def _measure_queries(connection: asyncpg.Connection, section: Section) -> None:
    page = PAGE.read_text(encoding="utf-8")
    titles = iter(line.removeprefix("### ") for line in page.splitlines() if line.startswith("### "))
    asked = dict(AIMS)
    for each in examples(page):
        if each.language == "sql" and each.output:
            asked[next(titles)] = each.code.strip().removesuffix(";")
    results: list[tuple[str, str, str]] = []
    for title, sql in asked.items():
        rows, took = await _timed(connection, sql)
        results.append((title, f"{rows:,}", f"{took:,.1f}"))
        plan = [row[0] for row in await connection.fetch(f"EXPLAIN (COSTS OFF) {sql}")]
        more = [f"… {len(plan) - PLAN_LINES} more lines"] if len(plan) > PLAN_LINES else []
        section.plans += ["", f"{title}:", "", *(f"    {line[:150]}" for line in [*plan[:PLAN_LINES], *more])]
        print(f"{title}: {results[-1][2]} ms", flush=True)
    section.table(("query", "rows", f"ms (median of {RUNS})"), *results)
    section.lines += ["", f"[The plans](../../benchmarks/plans/{section.edition}.txt) of these queries."]


async def _measure_restarts(connection: asyncpg.Connection, section: Section) -> None:
    """Measure the views of coverage with five years of a daemon that is restarted every day."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        await connection.execute(_RESTARTS)
        results = []
        for name in ("gaps", "coverage", "condition"):
            sql = f"SELECT * FROM market.{name}"
            rows, took = await _timed(connection, sql)
            results.append((f"`{sql}`", f"{rows:,}", f"{took:,.1f}"))
    finally:
        await transaction.rollback()
    section.table(("with five years of daily restarts", "rows", f"ms (median of {RUNS})"), *results)


async def _measure_repair(connection: asyncpg.Connection, url: str, section: Section, count: int) -> None:
    """Measure the repair of late ticks that are scattered over half a year, 0.75 % of all."""
    await connection.execute("SELECT setseed(0.5)")
    late = await connection.fetchval(_LATE, 0.015)
    await connection.close()
    lines: list[str] = []
    began = time.monotonic()
    await maintain(load_settings(database_url=url), lambda line: lines.append(line) if "Bars" in line else None)
    took = time.monotonic() - began
    section.lines += ["", f"{late:,} late ticks, scattered over half a year: `ingestor maintain` took {took:,.1f} s."]
    print(section.lines[-1], *lines, sep="\n", flush=True)


async def _timed(connection: asyncpg.Connection, sql: str) -> tuple[int, float]:
    """Return the number of rows, and the median of the milliseconds."""
    times, rows = [], 0
    for _ in range(RUNS):
        began = time.perf_counter()
        rows = len(await connection.fetch(sql))
        times.append(1000 * (time.perf_counter() - began))
    return rows, statistics.median(times)


def _write(section: Section) -> None:
    """Write the section into the page in place of the same edition's older one, and its plans into a file."""
    head, *old = re.split(r"^(?=## )", REPORT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    kept = [text for text in old if edition_of(text) != section.edition]
    new = f"## {section.title}\n" + "\n".join(section.lines) + "\n\n"
    ordered = sorted([*kept, new], key=lambda text: EDITIONS.index(edition_of(text)))
    REPORT.write_text(head + "".join(ordered).rstrip() + "\n", encoding="utf-8")
    plans = "\n".join([section.title, *section.plans])
    (PLANS / f"{section.edition}.txt").write_text(f"{plans}\n", encoding="utf-8")


def edition_of(text: str) -> str:
    """Return the edition that the first line of a section names."""
    title = text.partition("\n")[0]
    return next(
        (name for name, words in {"apache": "Apache-2", "community": "Community"}.items() if words in title), "plain"
    )


def _report(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="an empty database, with a role that owns it")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--filled", action="store_true", help="measure the ticks that an earlier run has inserted")
    options = parser.parse_args()
    asyncio.run(main(options.url, options.rows, is_filled=options.filled))
