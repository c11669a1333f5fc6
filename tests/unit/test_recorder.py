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
    """A recorder whose time is in our hands: keepalive 10 s + 8 s, a look at the clock every second."""

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


async def test_a_pong_does_not_cover_an_unfinished_message() -> None:
    """However many pongs come between its fragments, coverage ends where it began, until it is whole."""
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
    """The end of the session proves nothing more."""
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
    """When it began is not known, so pongs between its fragments prove nothing, not even up to when it was read."""
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
    assert recording.flushed().covered_until == before  # it came at some time since then
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
    """Whatever else arrives, in whatever frame: it does not move the last tick, for the stall and for the record."""
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
