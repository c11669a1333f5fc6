from __future__ import annotations

import json
from typing import Any

import pytest

from ingestor.buffer.fifo import Buffer
from ingestor.errors import StreamError
from ingestor.model import Batch, EndReason
from ingestor.service.recorder import Recorder, new_recorder
from ingestor.settings import load
from ingestor.stream.protocol import Decoder
from ingestor.telemetry.events import Telemetry
from tests.clocks import ManualClock

AUTHENTICATED = b'{"type": "authenticated", "data": {"message": "welcome"}}'
PRICE = json.dumps(
    {"type": "price", "data": {"date": "2026-09-21T22:00:00Z", "price": 1, "volume": 1, "symbol": "AIR.NZ"}}
).encode()


class Recording:
    """A recorder whose time is in our hands: keepalive 10 s + 8 s, a look at the clock every second."""

    def __init__(self, **changes: Any) -> None:
        self.clock = ManualClock()
        self.buffer = Buffer(memory_max_bytes=2**20, clock=self.clock, telemetry=Telemetry())
        self.recorder: Recorder = new_recorder(
            load(**changes),
            endpoint="ws://localhost/ws",
            kind="stream",
            clock=self.clock,
            decoder=Decoder("Pacific/Auckland"),
            buffer=self.buffer,
            telemetry=Telemetry(),
        )
        self.recorder.frame(AUTHENTICATED)

    def run(self, seconds: int) -> None:
        """Let time pass as it does in a process that runs."""
        for _ in range(seconds):
            self.clock.advance(1)
            self.recorder.check_time()

    def flushed(self) -> Batch:
        self.recorder.flush()
        return self.buffer.in_memory[-1]

    def reason(self) -> EndReason | None:
        if not self.recorder.failed.done():
            return None
        error = self.recorder.failed.exception()
        assert isinstance(error, StreamError)
        return error.reason


async def test_coverage_follows_messages() -> None:
    """While the process runs, a message proves the time until its arrival."""
    recording = Recording()
    recording.run(100)
    recording.recorder.frame(PRICE)
    assert recording.flushed().covered_until == recording.recorder.last_message_at
    assert recording.reason() is None


async def test_after_a_pause_coverage_waits_for_a_pong() -> None:
    """What is found in the socket after a pause is kept, but when it arrived is not known."""
    recording = Recording()
    recorder = recording.recorder
    recording.run(10)
    recorder.frame(PRICE)
    before = recorder.clock.now()
    recording.clock.advance(6)  # stopped, and let go on
    recorder.frame(PRICE)
    batch = recording.flushed()
    assert (batch.count, batch.covered_until) == (2, recorder.authenticated.result())
    recorder.pong(before)  # that was sent before the pause proves no more than that
    recorder.frame(PRICE)
    assert recording.flushed().covered_until == before
    recording.run(1)
    after = recorder.clock.now()
    recording.run(1)
    recorder.pong(after)
    assert recording.flushed().covered_until == after
    recorder.frame(PRICE)
    assert recording.flushed().covered_until == recorder.last_message_at
    assert recording.reason() is None


@pytest.mark.parametrize("first", ["frame", "check", "ping"])
async def test_a_frozen_process(first: str) -> None:
    """After a stop longer than the keepalive the session ends, and vouches for nothing after the stop began."""
    recording = Recording()
    recording.run(10)
    recording.recorder.frame(PRICE)
    before = recording.flushed().covered_until
    recording.clock.advance(18.5)
    if first == "check":
        recording.recorder.check_time()
    elif first == "ping":
        recording.recorder.pong(recording.recorder.clock.now())
    recording.recorder.frame(PRICE)
    batch = recording.flushed()
    assert (batch.count, batch.covered_until) == (1, before)
    assert recording.reason() is EndReason.FROZEN
    recording.run(5)
    recording.recorder.frame(PRICE)
    recording.recorder.end(EndReason.FROZEN)
    last = recording.buffer.in_memory[-1]
    assert last.end is not None
    assert (last.count, last.covered_until) == (1, before)


async def test_a_step_of_the_clock() -> None:
    """A wall clock that was set, or a machine that slept, ends the session before anything is vouched for again."""
    for seconds in (-3600, -2, 2, 3600):
        recording = Recording()
        recording.run(10)
        recording.recorder.frame(PRICE)
        before = recording.flushed().covered_until
        recording.clock.step(seconds)
        recording.recorder.frame(PRICE)
        assert recording.flushed().covered_until == before
        assert recording.reason() is EndReason.CLOCK_STEP


async def test_small_corrections_of_the_clock() -> None:
    """A clock that is kept right by small steps ends nothing."""
    recording = Recording()
    recording.clock.step(0.9)
    recording.recorder.frame(PRICE)
    assert recording.flushed().covered_until == recording.recorder.last_message_at
    assert recording.reason() is None


async def test_a_slow_answer_to_the_token_is_no_pause() -> None:
    """Before authentication time is looked at as well, so that waiting is not taken for standing still."""
    recording = Recording()
    recorder = recording.recorder
    recording.run(9)
    recorder.frame(PRICE)
    assert recording.flushed().covered_until == recorder.last_message_at
