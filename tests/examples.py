"""The documented queries: read from the page, run against a fixed small market, and compared.

`python -m tests.examples` writes their answers into the page.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg

from ingestor.store.connect import connect, driver_url
from tests.bars import TickRow, insert

PAGE = Path(__file__).parents[1] / "docs" / "analysts.md"
_BLOCK = re.compile(r"^```(sql|python)\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)

MINUTE, SECOND = timedelta(minutes=1), timedelta(seconds=1)
FRIDAY = datetime(2026, 11, 19, 21, tzinfo=UTC)
"""10:00 in Auckland on 20 November 2026; the exchange opens."""

DAYS = tuple(FRIDAY - timedelta(days=days) for days in (2, 1, 0))
SESSION = timedelta(hours=6, minutes=45)
CUTS = {DAYS[1]: (240.0, 242.0, "keepalive"), DAYS[2]: (90.0, 102.0, "closed")}
"""When the stream was cut, in minutes after the opening, and with which reason. The last gap was backfilled."""

MARKET = (
    ("AIR.NZ", "Air New Zealand Limited", "Industrials", 0.62, 0.005, 20),
    ("FPH.NZ", "Fisher & Paykel Healthcare Corporation Limited", "Health Care", 36.5, 0.01, 27),
    ("MEL.NZ", "Meridian Energy Limited", "Utilities", 5.8, 0.01, 34),
    ("SPK.NZ", "Spark New Zealand Limited", "Communication Services", 2.31, 0.005, 41),
)
"""Symbol, name, industry, price, step of the price, seconds between trades."""


@dataclass(frozen=True, slots=True)
class Example:
    """A block of the page with its answer; empty if none is shown."""

    language: str
    code: str
    output: str


def examples(page: str) -> list[Example]:
    """Return the blocks of a page that are run."""
    return [Example(language, code, output or "") for language, code, output in _BLOCK.findall(page)]


def trades() -> list[TickRow]:
    """Return the trades: the opening auction, then a trade now and then, some of them twice in a second."""
    rows: list[TickRow] = []
    for number, opens in enumerate(DAYS):
        for symbol, _, _, price, step, pause in MARKET:
            for index in range(int(SESSION / SECOND) // pause + 1):
                time = opens + index * pause * SECOND
                move = (index * index * 3 + index * 5 + number * 7) % 17 - 8 + 2 * number
                value = round(price + step * move, 4)
                volume = 25_000 if index == 0 else 100 * (1 + index * 7 % 13)
                arrived = time + timedelta(milliseconds=150 + index * 37 % 400)
                rows.append((time, arrived, value, volume, 1, symbol))
                if index % 50 == 49:
                    rows.append((time, arrived + timedelta(milliseconds=3), value, volume, 2, symbol))
    return rows


async def seed(url: str) -> None:
    """Store three trading days as received, and the backfilled bars."""
    rows = trades()
    await insert(url, [row for row in rows if not _is_missing(row[0])])
    connection = await connect(url)
    for opens in DAYS:
        await _record_sessions(connection, opens)
    for symbol, name, industry, *_ in MARKET:
        await connection.execute(
            "INSERT INTO market.instruments (symbol, exchange, company_name, industry, active) "
            "VALUES ($1, 'nzx', $2, $3, true)",
            symbol, name, industry,
        )  # fmt: skip
    await _backfill(connection, rows)
    await connection.execute("SELECT ingest.mark_stale($1, $2)", DAYS[0], FRIDAY + timedelta(days=1))
    await connection.close()


def _is_missing(time: datetime) -> bool:
    return any(opens + start * MINUTE <= time < opens + end * MINUTE for opens, (start, end, _) in CUTS.items())


async def _record_sessions(connection: asyncpg.Connection, opens: datetime) -> None:
    start, end, reason = CUTS.get(opens, (0.0, 0.0, ""))
    begins, ends = opens - 70 * MINUTE, opens + SESSION + 75 * MINUTE
    spans = [(begins, ends, "stopped")]
    if reason:
        spans = [(begins, opens + start * MINUTE, reason), (opens + end * MINUTE, ends, "stopped")]
    for since, until, why in spans:
        await connection.execute(
            "INSERT INTO ingest.stream_sessions (id, instance, endpoint, connected_at, authenticated_at, "
            "covered_until, last_message_at, last_tick_at, ended_at, end_reason) "
            "VALUES (gen_random_uuid(), 'one', 'ws://x', $1, $1, $2, $2, $2, $2, $3)",
            since, until, why,
        )  # fmt: skip


async def _backfill(connection: asyncpg.Connection, rows: list[TickRow]) -> None:
    """Store the bars of a gap and the minutes beside it, and record that they are complete."""
    start, end, _ = CUTS[FRIDAY]
    groups: dict[tuple[str, datetime], list[TickRow]] = {}
    for row in sorted(rows):
        if FRIDAY + (start - 1) * MINUTE <= row[0] < FRIDAY + (end + 1) * MINUTE:
            groups.setdefault((row[5], row[0].replace(second=0)), []).append(row)
    for (symbol, time), ticks in groups.items():
        prices = [tick[2] for tick in ticks]
        await connection.execute(
            "INSERT INTO market.bars (symbol, time, resolution, open, high, low, close, volume, source) "
            "VALUES ($1, $2, interval '1 minute', $3, $4, $5, $6, $7, 'financefeast')",
            symbol, time, prices[0], max(prices), min(prices), prices[-1], sum(tick[3] for tick in ticks),
        )  # fmt: skip
    await connection.execute(
        "INSERT INTO ingest.backfills (gap_from, gap_until, symbol, status, finished_at) "
        "VALUES ($1, $2, '*', 'backfilled', now())",
        FRIDAY + start * MINUTE, FRIDAY + end * MINUTE,
    )  # fmt: skip


async def answers(url: str, found: list[Example]) -> list[str]:
    """Run the blocks, all SQL in one session, and return their answers."""
    connection = await connect(url)
    answered = [await _table(connection, each.code) if each.language == "sql" else "" for each in found]
    await connection.close()  # some servers accept one connection at a time
    return [
        _printed(url, each.code) if each.language == "python" else text
        for each, text in zip(found, answered, strict=True)
    ]


async def _table(connection: asyncpg.Connection, sql: str) -> str:
    """Run one statement; return its rows as the server's text."""
    statement = await connection.prepare(sql.strip().removesuffix(";"))
    columns = [attribute.name for attribute in statement.get_attributes()]
    if not columns:
        await connection.execute(sql)
        return ""
    texts = ", ".join(f'q."{column}"::text' for column in columns)
    rows = await connection.fetch(f"SELECT {texts} FROM ({sql.strip().removesuffix(';')}) AS q")
    return _aligned(columns, [[("" if value is None else value) for value in row] for row in rows])


def _aligned(columns: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    is_number = [all(re.fullmatch(r"-?[\d.]*(e[+-]\d+)?", row[index]) for row in rows) for index in range(len(columns))]

    def line(cells: list[str]) -> str:
        sides = zip(cells, widths, is_number, strict=True)
        return "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in sides).rstrip()

    return "".join(
        f"{text}\n" for text in (line(columns), "  ".join("-" * width for width in widths), *map(line, rows))
    )


def _printed(url: str, code: str) -> str:
    """Run a script as an analyst would, with the address in the environment; return its output."""
    address = driver_url(url).replace("postgresql://", "postgresql+psycopg://")
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "DATABASE_URL": address}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if done.returncode:
        raise AssertionError(f"{code}\n{done.stderr}")
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())


def rewritten(page: str, outputs: list[str]) -> str:
    """Return the page with these answers."""
    remaining = iter(outputs)

    def block(match: re.Match[str]) -> str:
        output = next(remaining)
        shown = f"\n```text\n{output}```\n" if output else ""
        return f"```{match[1]}\n{match[2]}```\n{shown}"

    return _BLOCK.sub(block, page)


async def _write() -> None:
    from tests.servers import TestServer, plain_server

    with plain_server() as server_url:
        server = TestServer(server_url, "plain")
        await server.prepare()
        url = await server.create(server.new_name(), server.template)
        await seed(url)
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(rewritten(page, await answers(url, examples(page))), encoding="utf-8")


if __name__ == "__main__":
    asyncio.run(_write())
