from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from ingestor.batch import Batcher, unpack_rows
from ingestor.buffer.fifo import Buffer
from ingestor.clock import SessionClock, to_datetime
from ingestor.model import SECOND, Batch, EndReason, Micros, ResumePoint, Session
from ingestor.protocol.messages import CURSOR_TOO_OLD
from ingestor.relay.options import parse_options
from ingestor.service.recorder import new_session_id
from ingestor.service.upstream import SILENCE, UpstreamRecorder
from ingestor.settings import load_settings
from ingestor.stream.decoder import Decoder
from ingestor.stream.upstream import OVERLAP, UpstreamStart, choose_start, relay_address
from ingestor.telemetry.events import Telemetry
from tests.clocks import ManualClock

NOW = ManualClock().wall()
AUTHENTICATED = b'{"type": "authenticated", "data": {"message": "welcome"}}'
POINT = ResumePoint("c.1.0", NOW - 100)


@pytest.mark.parametrize(
    ("point", "gaps", "refused", "expected"),
    [
        (None, [], set(), UpstreamStart(NOW, None, NOW - OVERLAP)),
        (None, [NOW - 9, NOW - 5], set(), UpstreamStart(NOW - 9, None, NOW - 9 - OVERLAP)),
        (POINT, [], set(), UpstreamStart(NOW - 100, "c.1.0", None)),
        (POINT, [NOW - 100], set(), UpstreamStart(NOW - 100, "c.1.0", None)),
        (POINT, [NOW - 50], set(), UpstreamStart(NOW - 100, "c.1.0", None)),
        (POINT, [NOW - 300], set(), UpstreamStart(NOW - 300, "c.1.0", NOW - 300 - OVERLAP)),
        (POINT, [], {"c.1.0"}, UpstreamStart(NOW - 100, None, NOW - 100 - OVERLAP)),
        (POINT, [NOW - 300], {"c.1.0"}, UpstreamStart(NOW - 300, None, NOW - 300 - OVERLAP)),
        (ResumePoint(None, NOW - 100), [], set(), UpstreamStart(NOW - 100, None, NOW - 100 - OVERLAP)),
    ],
)
def test_the_start(point: ResumePoint | None, gaps: list[Micros], refused: set[str], expected: UpstreamStart) -> None:
    """A connection begins behind the cursor, at an earlier gap, or if the cursor is refused at the covered instant."""
    assert choose_start(point, gaps, refused, NOW) == expected


@pytest.mark.parametrize("start", [UpstreamStart(NOW, "0123abcd.1.0", None), UpstreamStart(NOW, None, NOW - OVERLAP)])
def test_the_address(start: UpstreamStart) -> None:
    """The relay reads from the address what was meant."""
    url = start.url("wss://relay.example.org/ws?meta=1&from=2026-01-01T00:00:00Z")
    assert url.startswith("wss://relay.example.org/ws?")
    options = parse_options(urlsplit(url).query, NOW + SECOND)
    assert (options.filter.meta, options.coverage, options.since) == (True, NOW, start.since)
    assert (options.resume is not None) == (start.cursor is not None)
    assert set(parse_qs(urlsplit(url).query)) <= {"meta", "coverage", "from", "resume"}


def test_which_address_is_a_relays() -> None:
    """Only a query with meta=1 makes an address that of a relay."""
    assert relay_address("ws://localhost/ws") is None
    assert relay_address("ws://localhost/ws?meta=1") == ("ws://localhost/ws", None)
    found = relay_address("ws://localhost/ws?meta=1&from=2026-01-01T00:00:00Z")
    assert found is not None
    assert to_datetime(found[1] or 0).isoformat() == "2026-01-01T00:00:00+00:00"


class Recording:
    """A recorder of a relay, from a minute ago on, with a clock of the test."""

    def __init__(self, cursor: str | None = "old", since: Micros | None = None) -> None:
        self.clock = ManualClock()
        self.telemetry = Telemetry()
        self.buffer = Buffer(memory_max_bytes=2**20, clock=self.clock, telemetry=self.telemetry)
        session_clock = SessionClock(self.clock)

        def new_batcher() -> Batcher:
            now = session_clock.now()
            session = Session(new_session_id(now), "test", "ws://localhost/ws?meta=1", now)
            return Batcher(session, max_rows=1000, occurrence_keys=1)

        self.recorder = UpstreamRecorder(
            UpstreamStart(at(0), cursor, since),
            new_batcher=new_batcher,
            clock=session_clock,
            decoder=Decoder("Pacific/Auckland"),
            buffer=self.buffer,
            telemetry=self.telemetry,
            max_delay=0.05,
        )

    def log_in(self) -> Recording:
        self.recorder.frame(AUTHENTICATED)
        return self

    def covers(self, since: int, until: int, *, complete: bool = True) -> None:
        self.say("coverage", {"from": text(since), "to": text(until), "complete": complete})

    def tick(self, arrival: int, occurrence: int = 1) -> None:
        data = {"date": text(arrival), "price": 1.5, "volume": 1, "symbol": "AIR.NZ", "received_at": text(arrival)}
        self.say("price", {**data, "occurrence": occurrence, "cursor": f"c{arrival}"})

    def say(self, kind: str, data: dict[str, Any]) -> None:
        self.recorder.frame(json.dumps({"type": kind, "data": data}).encode())

    def wait(self, seconds: int) -> None:
        """Let the time pass as in a running process, in which pings are answered."""
        for _ in range(seconds):
            self.clock.advance(1)
            self.recorder.check_time()
            self.recorder.pong(self.recorder.clock.now())
            self.recorder.check_silence()

    @property
    def batches(self) -> tuple[Batch, ...]:
        self.recorder.flush()
        return self.buffer.in_memory

    @property
    def sessions(self) -> list[tuple[Micros | None, Micros | None, str]]:
        """The seconds that each session covers by its last batch, and the reason of its end."""
        last = {batch.session.id: batch for batch in self.batches}
        found = []
        for batch in last.values():
            since, until = (
                None if instant is None else (instant - at(0)) // SECOND
                for instant in (batch.authenticated_at, batch.covered_until)
            )
            found.append((since, until, str(batch.end.reason) if batch.end else ""))
        return found


def at(seconds: int) -> Micros:
    return NOW - 60 * SECOND + seconds * SECOND


def text(seconds: int) -> str:
    return to_datetime(at(seconds)).isoformat()


async def test_arrivals_and_pongs_cover_nothing() -> None:
    """Only what the relay reports is covered: not the arrival of its ticks, and not the time of a pong."""
    recording = Recording().log_in()
    recording.tick(5)
    recording.wait(10)
    assert recording.sessions == [(0, 0, "")]
    recording.covers(0, 4)
    assert recording.sessions == [(0, 4, "")]


async def test_ticks_in_any_order() -> None:
    """Ticks keep number and arrival, in any order; the session's last tick is the one that arrived last."""
    recording = Recording().log_in()
    for arrival, occurrence in ((5, 3), (2, 7), (4, 1)):
        recording.tick(arrival, occurrence)
    last = recording.batches[-1]
    assert [(row[1], row[4]) for batch in recording.batches for row in unpack_rows(batch.rows)] == [
        (at(5), 3),
        (at(2), 7),
        (at(4), 1),
    ]
    assert (last.last_tick_at, last.cursor) == (at(5), "c4")


async def test_a_hole() -> None:
    """A hole between two spans ends the session; the next one covers the next span, and knows the last tick."""
    recording = Recording().log_in()
    recording.tick(9)
    recording.covers(0, 10)
    recording.covers(20, 30)
    recording.covers(20, 31)
    assert recording.sessions == [(0, 10, "upstream_gap"), (20, 31, "")]
    last = recording.batches[-1]
    assert (last.last_tick_at, last.cursor) == (at(9), "c9")
    assert not recording.recorder.failed.done()


async def test_a_hole_at_the_beginning() -> None:
    """If the record begins later than the time that was asked for, the first session covers nothing."""
    recording = Recording().log_in()
    recording.covers(7, 9)
    assert recording.sessions == [(0, 0, "upstream_gap"), (7, 9, "")]


async def test_silence_and_more() -> None:
    """After a minute of silence the session ends; the next one covers again once the record goes on."""
    recording = Recording().log_in()
    recording.covers(0, 10)
    recording.wait(SILENCE // SECOND)
    assert [session[2] for session in recording.sessions] == [""]
    recording.wait(1)
    assert recording.sessions == [(0, 10, "upstream_gap"), (None, None, "")]
    (problem,) = (each for each in recording.telemetry.readiness.problems if each.check == "stream")
    assert problem.detail == "The relay has reported neither ticks nor coverage for 60 s."
    recording.covers(0, 10)
    assert recording.sessions[1:] == [(None, None, "")]
    recording.covers(0, 70)
    assert recording.sessions[1:] == [(0, 70, "")]


async def test_ticks_are_no_silence() -> None:
    """While ticks come, as in a long replay, the session goes on without any report."""
    recording = Recording().log_in()
    for number in range(5):
        recording.wait(SILENCE // SECOND - 10)
        recording.tick(number)
    assert recording.sessions == [(0, 0, "")]


async def test_withdrawn() -> None:
    """Withdrawn coverage ends the session as a mute one: the views then cut it back to its last tick."""
    recording = Recording().log_in()
    recording.tick(3)
    recording.covers(0, 10)
    recording.covers(3, 10, complete=False)
    assert recording.sessions == [(0, 10, "stall"), (None, None, "")]
    assert recording.recorder.point == ResumePoint("c3", at(3))


async def test_a_hole_that_closes() -> None:
    """If a hole is closed later, the next session begins before it."""
    recording = Recording().log_in()
    recording.covers(0, 10)
    recording.covers(20, 30)
    recording.covers(0, 30)
    recording.covers(0, 31)
    assert recording.sessions == [(0, 10, "upstream_gap"), (20, 30, "upstream_gap"), (0, 31, "")]


@pytest.mark.parametrize(("since", "carried"), [(None, "old"), (at(0) - OVERLAP, None)])
async def test_the_point_before_the_first_tick(since: Micros | None, carried: str | None) -> None:
    """A cursor is stored again only if it leads to all that was asked for."""
    recording = Recording(since=since).log_in()
    assert recording.batches[-1].cursor == carried
    assert recording.recorder.point == ResumePoint(carried, at(0))


async def test_a_refused_cursor() -> None:
    """The relay's answer to an old cursor is recognized; another error is not."""
    for words, refused in ((f"{CURSOR_TOO_OLD}; use from", True), ("from: lies in the future", False)):
        recording = Recording().log_in()
        recording.say("error", {"message": words})
        assert recording.recorder.is_cursor_refused == refused
        assert recording.recorder.failed.exception() is not None


async def test_a_clock_that_was_set_and_a_frozen_process() -> None:
    """Neither ends the session: the relay has what was missed."""
    recording = Recording().log_in()
    recording.clock.step(3600)
    recording.clock.advance(50)
    recording.wait(2)
    recording.covers(0, 10)
    assert recording.sessions == [(0, 10, "")]


async def test_the_end() -> None:
    """The last batch has the cursor, and what comes later is ignored."""
    recording = Recording().log_in()
    recording.tick(3)
    recording.recorder.end(EndReason.CLOSED)
    recording.tick(4)
    last = recording.buffer.in_memory[-1]
    assert (last.count, last.cursor, last.end and last.end.reason) == (1, "c3", EndReason.CLOSED)


@pytest.mark.parametrize(
    ("url", "is_valid"),
    [
        ("ws://localhost/ws?meta=1", True),
        ("ws://localhost/ws?meta=1&from=2026-01-01T00:00:00Z", True),
        ("ws://relay.example.org/ws?meta=1", False),
        ("wss://relay.example.org/ws?meta=0", False),
        ("wss://relay.example.org/ws?meta=1&symbols=AIR.NZ", False),
        ("wss://relay.example.org/ws?token=secret", False),
    ],
)
def test_the_setting(url: str, is_valid: bool) -> None:
    """The address of a relay is accepted; any other query, which might hold a secret, is not."""
    if is_valid:
        assert load_settings(stream_url=url).stream_url == url
    else:
        with pytest.raises(Exception, match="INGESTOR_STREAM_URL"):
            load_settings(stream_url=url)
