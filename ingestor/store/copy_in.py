"""Sends packed rows by COPY, in pieces that show progress on a slow link."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

import asyncpg

from ingestor.batch import COLUMNS, COPY_HEADER, COPY_TRAILER

PIECE = 64 * 1024
"""Bytes that are handed to the driver at once. It takes the next piece when it has sent nearly all of the last one."""


async def copy_rows(
    connection: asyncpg.Connection, schema: str, table: str, rows: Iterable[bytes], on_piece: Callable[[], None]
) -> int:
    """Send runs of packed rows to a table; return how many rows there were. Each piece that leaves calls `on_piece`."""
    status = await connection.copy_to_table(
        table, schema_name=schema, columns=COLUMNS, source=_body(connection, rows, on_piece), format="binary"
    )
    return count_of(status)


async def _body(
    connection: asyncpg.Connection, rows: Iterable[bytes], on_piece: Callable[[], None]
) -> AsyncIterator[bytes]:
    yield COPY_HEADER
    for run in rows:
        for start in range(0, len(run), PIECE):
            # Otherwise the driver notices a lost connection only after all pieces, and asyncio logs each of them.
            await asyncio.sleep(0)
            if connection.is_closed():
                return
            on_piece()
            yield run[start : start + PIECE]
    on_piece()
    yield COPY_TRAILER


def count_of(status: str) -> int:
    """Return the number at the end of a command's status, such as `COPY 5000` or `INSERT 0 12`."""
    return int(status.rsplit(" ", 1)[1])
