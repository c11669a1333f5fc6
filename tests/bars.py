"""Expected bars, computed in Python from the ticks of a database and compared with its relations."""

from __future__ import annotations

import math
import random
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from ingestor.admin.maintenance import maintain
from ingestor.settings import load_settings
from ingestor.store.connect import connect

AUCKLAND = ZoneInfo("Pacific/Auckland")
INSERT = """
INSERT INTO market.ticks (time, received_at, price, volume, occurrence, symbol)
SELECT * FROM unnest($1::timestamptz[], $2::timestamptz[], $3::float8[], $4::bigint[], $5::integer[], $6::text[])
"""

TickRow = tuple[datetime, datetime, float, int, int, str]


def _binned(seconds: int) -> Callable[[datetime], datetime]:
    return lambda time: datetime.fromtimestamp(int(time.timestamp()) // seconds * seconds, UTC)


def _day(time: datetime) -> datetime:
    return time.astimezone(AUCKLAND).replace(hour=0, minute=0, second=0, microsecond=0).astimezone(UTC)


BUCKETS: dict[str, Callable[[datetime], datetime]] = {
    "1m": _binned(60), "5m": _binned(300), "1h": _binned(3600), "1d": _day,
}  # fmt: skip


def some_ticks(start: datetime, days: float, count: int, seed: int = 1) -> list[TickRow]:
    """Return ticks of a few symbols: many in a second, some equal, in random order of arrival."""
    chance = random.Random(seed)
    seen: dict[tuple[Any, ...], int] = defaultdict(int)
    rows: list[TickRow] = []
    for number in range(count):
        time = start + timedelta(seconds=int(days * 86400 * (number // 7) / (count / 7)) + chance.choice([0, 0, 1, -1]))
        key = (time, chance.choice([1.5, 1.51, 0.0, -2.25]), chance.choice([0, 1, 100]), chance.choice("ABC") + ".NZ")
        seen[key] += 1
        arrived = time + timedelta(seconds=1, microseconds=chance.randrange(2_000_000))
        rows.append((time, arrived, key[1], key[2], seen[key], key[3]))
    return rows


async def insert(url: str, rows: Iterable[TickRow]) -> None:
    """Store ticks by INSERT, which every server supports."""
    connection, rows = await connect(url), list(rows)
    for month in {row[0].replace(day=1).date() for row in rows}:
        await connection.execute("SELECT ingest.ensure_partition($1)", month)
    await connection.execute(INSERT, *map(list, zip(*rows, strict=True)))
    await connection.close()


async def assert_bars(url: str) -> dict[str, int]:
    """Compare every bar of every width with the ticks; return the number of bars by width."""
    ticks = await _fetch(url, "SELECT * FROM market.ticks")
    counts: dict[str, int] = {}
    for name, bucket in BUCKETS.items():
        found = await _fetch(url, f"SELECT * FROM market.ohlcv_{name} ORDER BY symbol, time")
        groups: dict[tuple[str, datetime], list[Any]] = defaultdict(list)
        for tick in ticks:
            groups[tick["symbol"], bucket(tick["time"])].append(tick)
        keys = [(row["symbol"], row["time"]) for row in found]
        assert keys == sorted(groups), (name, sorted(set(keys) ^ set(groups)))
        for row in found:
            _assert_bar(dict(row), groups[row["symbol"], row["time"]], name)
        counts[name] = len(found)
    return counts


async def _fetch(url: str, sql: str) -> list[Any]:
    connection = await connect(url)
    try:
        return list(await connection.fetch(sql))
    finally:
        await connection.close()


def _assert_bar(row: dict[str, Any], ticks: list[Any], name: str) -> None:
    ticks = sorted(ticks, key=lambda tick: (tick["time"], tick["received_at"], tick["occurrence"]))
    prices, volume = [tick["price"] for tick in ticks], sum(tick["volume"] for tick in ticks)
    turnover = math.fsum(tick["price"] * tick["volume"] for tick in ticks)
    where = (name, row["symbol"], row["time"])
    assert (row["open"], row["high"], row["low"], row["close"]) == (
        prices[0], max(prices), min(prices), prices[-1]
    ), where  # fmt: skip
    assert (row["volume"], row["ticks"]) == (volume, len(ticks)), where
    assert math.isclose(row["turnover"], turnover, rel_tol=1e-9, abs_tol=1e-9), where
    assert (row["vwap"] is None) == (volume == 0), where
    assert volume == 0 or math.isclose(row["vwap"], turnover / volume, rel_tol=1e-9, abs_tol=1e-9), where


async def maintained(url: str, **changes: str) -> list[str]:
    """Run `ingestor maintain`; return its report."""
    lines: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # exchange-calendars uses what the newest pandas deprecates
        await maintain(load_settings(database_url=url, **changes), lines.append)
    return lines
