"""Registers a relay, so that writers write the log of commits, and keeps the log short."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

import asyncpg

from ingestor.store.queries import QUERIES
from ingestor.store.record import LOG_KEPT

CHANNEL = "ingestor_ticks"
"""The channel of the notice that each commit sends."""


async def register(connection: asyncpg.Connection, relay: UUID, instance: str) -> None:
    """Register a relay while no writer writes: every later transaction of a writer is in the log.

    If the log was not written until now, it begins again.
    """
    async with connection.transaction(isolation="read_committed"):
        await connection.execute(QUERIES["lock_ticks"])
        if not await connection.fetchval(QUERIES["log_is_followed"]):
            await connection.execute(QUERIES["begin_log"])
        await connection.execute(QUERIES["register_relay"], relay, instance)
        await connection.execute(QUERIES["forget_relays"])


async def renew(connection: asyncpg.Connection, relay: UUID, clients: int) -> bool:
    """Report that a relay is there. Returns False if it must register again, because the log may have a hole."""
    return await connection.fetchval(QUERIES["renew_relay"], relay, clients) is not None


async def prune(connection: asyncpg.Connection, kept: timedelta = LOG_KEPT) -> None:
    """Delete the log's entries that are older than that, some thousands at a time."""
    await connection.execute(QUERIES["prune_log"], kept)
