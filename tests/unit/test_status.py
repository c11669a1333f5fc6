"""Readiness and status: reading them changes nothing, and the daemon's loop keeps them current."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from ingestor.model import SECOND, Batch, EndReason, Session
from ingestor.service.daemon import WATCH_INTERVAL, Daemon
from ingestor.service.recorder import new_session_id
from ingestor.settings import load_settings
from tests.clocks import SteppedClock

NOW = 1_790_000_000 * SECOND
SESSION = Session(new_session_id(NOW), "test", "ws://localhost/ws", NOW)


@pytest.fixture
def clock() -> SteppedClock:
    return SteppedClock(NOW)


@pytest.fixture
def daemon(clock: SteppedClock, tmp_path: Path) -> Daemon:
    """Return a daemon that does not run and has no problem."""
    settings = load_settings(
        token="tk_12345678901234567",
        stream_url="ws://127.0.0.1:1/ws",
        database_url="postgresql://ingestor@127.0.0.1:1/none",
        spool_dir=tmp_path,
        exchange_calendar="always",
        memory_max_bytes="1MiB",
    )
    daemon = Daemon(settings, clock=clock)
    daemon.telemetry.readiness.passes("stream")
    daemon.telemetry.readiness.passes("database")
    return daemon


def block(daemon: Daemon) -> None:
    """Put more than the buffer may hold."""
    daemon.buffer.put(Batch(SESSION, 1, rows=bytes(3 * 2**20), count=1))
    assert daemon.buffer.blocked_by is EndReason.BUFFER_FULL


def read(daemon: Daemon) -> tuple[Any, Any]:
    """Read what `/readyz` and `/status` answer, and what is scraped."""
    daemon.status.facts()
    return daemon.status.readiness(), daemon.status.status()["ready"]


def test_reading_changes_nothing(daemon: Daemon, clock: SteppedClock) -> None:
    """Nor does it when the facts have changed and time passes: no `since` moves, and no event is logged."""
    block(daemon)
    with capture_logs() as lines:
        assert read(daemon) == read(daemon) == ({"ready": True, "problems": []},) * 2
        daemon.status.refresh()
        first = read(daemon)
        clock.advance(60)
        assert read(daemon) == read(daemon) == first
    assert first[0]["problems"] == [
        {
            "check": "spool",
            "since": "2026-09-21T14:13:20.000+00:00",
            "detail": "The buffer is full.",
        }
    ]
    assert not lines


async def test_the_loop_refreshes_readiness(daemon: Daemon, clock: SteppedClock) -> None:
    """Within a second of the fact, though no request comes."""
    daemon.buffer.claim()
    await daemon.buffer.open()
    watching = asyncio.create_task(daemon._watch())
    await asyncio.sleep(0.01)
    block(daemon)
    assert not daemon.telemetry.readiness.problems
    clock.advance(WATCH_INTERVAL)
    await asyncio.sleep(0.01)
    assert [problem.detail for problem in daemon.telemetry.readiness.problems] == ["The buffer is full."]
    await daemon.buffer.take()
    await daemon.buffer.acknowledge()
    clock.advance(WATCH_INTERVAL)
    await asyncio.sleep(0.01)
    assert not daemon.telemetry.readiness.problems
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    await daemon.buffer.close()


async def test_readiness_is_refreshed_before_the_spool_is_open(daemon: Daemon) -> None:
    """Opening a long spool takes time, in which the stream is received already."""
    block(daemon)
    watching = asyncio.create_task(daemon._watch())
    await asyncio.sleep(0.01)
    assert [problem.check for problem in daemon.telemetry.readiness.problems] == ["spool"]
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
