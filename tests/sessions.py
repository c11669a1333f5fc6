"""Sessions of the stream, recorded by hand, for the tests of coverage."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

from ingestor.store.connect import connect

OPENS = datetime(2026, 11, 19, 21, 0, tzinfo=UTC)
"""10:00 in Auckland on Friday, 20 November 2026; the trading time begins an hour earlier, and lasts 8 h 15 min."""

BEGINS = OPENS - timedelta(hours=1)
ENDS = OPENS + timedelta(hours=7, minutes=15)
MINUTE = timedelta(minutes=1)

_SESSION = """
INSERT INTO ingest.stream_sessions (id, instance, endpoint, connected_at, authenticated_at, covered_until,
    last_message_at, last_tick_at, ended_at, end_reason, kind, last_seen_at)
VALUES ($1, $2, 'ws://localhost/ws', $3, $4, $5, $6, $6, $7, $8, $9, $10)
"""


def at(minutes: float) -> datetime:
    """Return the moment so many minutes after that day's trading time began."""
    return BEGINS + minutes * MINUTE


async def record_session(
    url: str,
    since: datetime,
    until: datetime,
    reason: str | None = "closed",
    *,
    last: datetime | None = None,
    accepted: bool = True,
    kind: str = "stream",
    instance: str = "one",
    seen: datetime | None = None,
) -> Any:
    """Record a session that covers a time; return its id. Without a reason it has not ended.

    `seen` is the last write of its process by the database's clock; the default is the session's end.
    """
    identity = uuid4()
    await execute(
        url,
        _SESSION,
        identity,
        instance,
        since,
        since if accepted else None,
        until if accepted else None,
        (last or until) if accepted else None,
        until if reason else None,
        reason,
        kind,
        seen or until,
    )
    return identity


async def execute(url: str, sql: str, *arguments: Any) -> None:
    """Run one statement."""
    connection = await connect(url)
    try:
        await connection.execute(sql, *arguments)
    finally:
        await connection.close()
