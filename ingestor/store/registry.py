"""Registers and lists relays, so that writers write the log of commits, and keeps the log short."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

import asyncpg

from ingestor.redaction import outside_text
from ingestor.store.queries import QUERIES
from ingestor.store.record import LOG_KEPT

CHANNEL = "ingestor_ticks"
"""The channel of the notice that each commit sends."""


LISTENING_SECONDS = 60.0
"""A relay reports every 20 s; one that has been silent for longer than this does not run, or has lost the database."""


@dataclass(frozen=True, slots=True)
class RegisteredRelay:
    """A relay for which the log is written, with the number of its clients when it last reported (`seen_at`).

    `silent` is the time in seconds since then.
    """

    instance: str
    clients: int
    started_at: datetime
    seen_at: datetime
    silent: float

    @property
    def is_listening(self) -> bool:
        """Whether it has reported lately."""
        return self.silent <= LISTENING_SECONDS


async def listed_relays(connection: asyncpg.Connection) -> tuple[RegisteredRelay, ...]:
    """Return the relays that listen, and those that fell silent within an hour while they had clients; by name.

    A relay that stopped in order has no clients left.
    """
    rows = await connection.fetch(QUERIES["listed_relays"])
    found = [RegisteredRelay(outside_text(instance), *others) for instance, *others in rows]
    return tuple(relay for relay in found if relay.is_listening or relay.clients)


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
