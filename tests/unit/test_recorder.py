from __future__ import annotations

import json
from typing import Any

import pytest

from ingestor.buffer.fifo import Buffer
from ingestor.errors import StreamError
from ingestor.model import Batch, EndReason
from ingestor.service.recorder import Recorder, new_recorder
from ingestor.settings import load_settings
from ingestor.stream.decoder import Decoder
from ingestor.telemetry.events import Telemetry
from tests.clocks import ManualClock

AUTHENTICATED = b'{"type": "authenticated", "data": {"message": "welcome"}}'
PRICE = json.dumps(
    {"type": "price", "data": {"date": "2026-09-21T22:00:00Z", "price": 1, "volume": 1, "symbol": "AIR.NZ"}}
).encode()


class Recording:
    """A recorder with a clock of the test: keepalive 10 s + 8 s, a check of the clock every second."""

    def __init__(self, **changes: Any) -> None:
        self.clock = ManualClock()
        self.buffer = Buffer(memory_max_bytes=2**20, clock=self.clock, telemetry=Telemetry())
        self.recorder: Recorder = new_recorder(
            load_settings(**changes),
            endpoint="ws://localhost/ws",
            kind="stream",
            clock=self.clock,
            decoder=Decoder("Pacific/Auckland"),
            buffer=self.buffer,
            telemetry=Telemetry(),
        )
        self.recorder.frame(AUTHENTICATED)

    def run(self, seconds: int) -> None:
        """Advance the time as in a running process."""
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
    """A message read after a pause is kept, but its arrival is unknown."""
    recording = Recording()
    recorder = recording.recorder
    recording.run(10)
    recorder.frame(PRICE)
    before = recorder.clock.now()
    recording.clock.advance(6)  # stopped and continued
    recorder.frame(PRICE)
    batch = recording.flushed()
    assert (batch.count, batch.covered_until) == (2, recorder.authenticated.result())
    recorder.pong(before)  # sent before the pause, so it proves no later time
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
    """After a freeze longer than the keepalive the session ends, and covers nothing after the freeze began."""
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
    """After a change of the wall clock, or a sleep of the machine, the session ends before it covers any more."""
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
    """Small steps that correct the clock do not end a session."""
    recording = Recording()
    recording.clock.step(0.9)
    recording.recorder.frame(PRICE)
    assert recording.flushed().covered_until == recording.recorder.last_message_at
    assert recording.reason() is None


async def test_a_slow_answer_to_the_token_is_no_pause() -> None:
    """The clock is also checked before authentication, so that a wait is not taken for a pause."""
    recording = Recording()
    recorder = recording.recorder
    recording.run(9)
    recorder.frame(PRICE)
    assert recording.flushed().covered_until == recorder.last_message_at


async def test_a_pong_does_not_cover_an_unfinished_message() -> None:
    """Coverage ends at the beginning of an unfinished message, however many pongs come between its fragments."""
    recording = Recording()
    recorder = recording.recorder
    recording.run(10)
    before = recorder.clock.now()
    recording.run(1)
    recorder.partial()
    began = recorder.clock.now()
    recorder.pong(before)
    assert recording.flushed().covered_until == before
    for _ in range(3):
        recording.run(4)
        recorder.partial()  # another piece of the same message
        recorder.pong(recorder.clock.now())
        assert recording.flushed().covered_until == began
    recorder.frame(PRICE)
    assert recording.flushed().covered_until == recorder.last_message_at
    recording.run(1)
    sent_at = recorder.clock.now()
    recorder.pong(sent_at)
    assert recording.flushed().covered_until == sent_at


async def test_a_message_that_is_never_finished() -> None:
    """The end of a session with an unfinished message covers no more time."""
    recording = Recording()
    recording.run(5)
    recording.recorder.frame(PRICE)
    last = recording.recorder.last_message_at
    recording.recorder.partial()
    recording.run(5)
    recording.recorder.heartbeat()
    recording.recorder.end(EndReason.CLOSED)
    assert {batch.covered_until for batch in recording.buffer.in_memory if batch.count} == {last}
    assert recording.buffer.in_memory[-1].covered_until == last


@pytest.mark.parametrize("noticed", [True, False])
async def test_a_message_that_began_during_a_pause(noticed: bool) -> None:
    """After a pause the beginning of an unfinished message is unknown, so pongs between its fragments prove nothing."""
    recording = Recording()
    recorder = recording.recorder
    recording.run(10)
    recorder.frame(PRICE)
    before = recording.flushed().covered_until
    recording.clock.advance(6)
    if noticed:
        recorder.check_time()
    recorder.partial()
    recording.run(1)
    recorder.pong(recorder.clock.now())
    assert recording.flushed().covered_until == before
    recorder.frame(PRICE)
    assert recording.flushed().covered_until == before  # it began at some time since then
    recording.run(1)
    recorder.pong(recorder.clock.now())
    assert recording.flushed().covered_until == recorder.clock.now()


UNKNOWN = b'{"type": "heartbeat"}'
REFUSED = PRICE.replace(b'"volume": 1', b'"volume": -1')


@pytest.mark.parametrize(
    ("payload", "binary"),
    [(UNKNOWN, False), (b"", False), (b"\xff", False), (REFUSED, False), (PRICE, True), (AUTHENTICATED, False)],
)
async def test_only_a_tick_shows_that_prices_come(payload: bytes, binary: bool) -> None:
    """Only a tick moves the time of the last tick, which decides stalls and is recorded."""
    recording = Recording()
    recorder = recording.recorder
    recorder.frame(PRICE)
    ticked = recorder.last_tick_at
    recording.run(10)
    recorder.frame(payload, binary)
    batch = recording.flushed()
    assert recorder.last_tick_at == batch.last_tick_at == ticked is not None
    recorder.frame(PRICE)
    assert recorder.last_tick_at == recording.flushed().last_tick_at == recorder.last_message_at
