"""Other clients: `python -m benchmarks.rivals NAME STREAM_URL DATABASE_URL TICKS`.

Each follows the examples of its libraries, without reconnects, numbering, spool or coverage. All but the last fill
`market.ticks` with its unique key; a running number replaces the occurrence.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import asyncpg
from websockets.asyncio.client import connect

from benchmarks.frames import TOKEN
from ingestor.batch import COLUMNS

BATCH = 1_000
"""Rows per insert."""

_number = count(1)
_Row = tuple[datetime, datetime, float, int, int, str]
_Rows = list[_Row]


def row(text: str | bytes) -> _Row:
    """Return the row of a price message."""
    data = json.loads(text)["data"]
    time = datetime.fromisoformat(data["date"]).astimezone(UTC)
    return time, datetime.now(UTC), data["price"], data["volume"], next(_number), data["symbol"]


def official_client(_: str, database: str, ticks: int) -> None:
    """Use the provider's client, which connects to port 5005 of this machine, and psycopg's `executemany`."""
    import psycopg  # noqa: PLC0415 - each client has its own libraries
    from financefeast.common import EnvironmentsStream  # noqa: PLC0415
    from financefeast.stream import Stream  # noqa: PLC0415

    connection = psycopg.connect(database)
    insert = f"INSERT INTO market.ticks ({', '.join(COLUMNS)}) VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING"
    rows: _Rows = []
    left = ticks

    def on_data(_: Any, text: bytes) -> None:
        nonlocal left
        if b'"price"' not in text:
            return
        rows.append(row(text))
        left -= 1
        if len(rows) == BATCH or not left:
            with connection.cursor() as cursor:
                cursor.executemany(insert, rows)
            connection.commit()
            rows.clear()

    Stream(TOKEN, on_data=on_data, environment=EnvironmentsStream.local).connect()


async def asyncpg_executemany(stream: str, database: str, ticks: int) -> None:
    """Use `websockets` and asyncpg's `executemany`."""
    connection = await asyncpg.connect(database)
    places = ", ".join(f"${n + 1}" for n in range(len(COLUMNS)))
    insert = f"INSERT INTO market.ticks ({', '.join(COLUMNS)}) VALUES ({places}) ON CONFLICT DO NOTHING"
    await _in_batches(stream, ticks, lambda rows: connection.executemany(insert, rows))


async def asyncpg_copy(stream: str, database: str, ticks: int) -> None:
    """Use `websockets` and asyncpg's `copy_records_to_table`."""
    connection = await asyncpg.connect(database)
    await _in_batches(
        stream,
        ticks,
        lambda rows: connection.copy_records_to_table("ticks", schema_name="market", columns=COLUMNS, records=rows),
    )


async def cryptofeed(stream: str, database: str, ticks: int) -> None:
    """Use `websockets` and cryptofeed's PostgreSQL backend, with the table of its documentation."""
    from cryptofeed.backends.postgres import TradePostgres  # noqa: PLC0415
    from cryptofeed.types import Trade  # noqa: PLC0415

    at = urlsplit(database)
    backend = TradePostgres(
        host=at.hostname, user=at.username, pw=at.password, db=at.path[1:], port=at.port, table="public.trades"
    )
    backend.start(asyncio.get_running_loop())
    async with connect(stream) as connection:
        await _authenticate(connection)
        for _ in range(ticks):
            time, received, price, volume, _, symbol = row(await connection.recv())
            trade = Trade("NZX", symbol, "buy", float(volume), price, time.timestamp())
            await backend(trade, received.timestamp())
        await backend.queue.join()
        await connection.wait_closed()


async def _in_batches(stream: str, ticks: int, write: Callable[[_Rows], Awaitable[object]]) -> None:
    async with connect(stream) as connection:
        await _authenticate(connection)
        rows: _Rows = []
        for left in range(ticks - 1, -1, -1):
            rows.append(row(await connection.recv()))
            if len(rows) == BATCH or not left:
                await write(rows)
                rows = []
        await connection.wait_closed()


async def _authenticate(connection: Any) -> None:
    await connection.send(json.dumps({"type": "authenticate", "data": {"token": TOKEN}}))
    await connection.recv()


CLIENTS: dict[str, Callable[[str, str, int], Any]] = {
    "official_client": official_client,
    "asyncpg_executemany": asyncpg_executemany,
    "asyncpg_copy": asyncpg_copy,
    "cryptofeed": cryptofeed,
}


def main() -> None:
    """Run one client until it is killed."""
    name, stream, database, ticks = sys.argv[1:]
    outcome = CLIENTS[name](stream, database, int(ticks))
    if asyncio.iscoroutine(outcome):
        asyncio.run(outcome)


if __name__ == "__main__":
    main()
