"""The coverage that a daemon takes over from a relay, whose record grows, has holes that close, and shrinks."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from ingestor.model import SECOND, Micros
from ingestor.relay.coverage import coverage_messages
from ingestor.stream.decoder import Decoder
from ingestor.stream.frames import whole_texts
from ingestor.stream.recorded import Covered, RecordedDecoder
from ingestor.stream.upstream import CoverageChange, UpstreamCoverage

BEGIN = 1_790_000_000
DECODER = RecordedDecoder(Decoder("UTC"))

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("extend"), st.integers(1, 5)),
        st.tuples(st.just("hole"), st.integers(1, 5)),
        st.tuples(st.just("fill"), st.integers(0, 40)),
        st.tuples(st.just("silence"), st.just(0)),
    ),
    max_size=30,
)
SHRINKING = st.lists(
    st.one_of(
        st.tuples(st.just("extend"), st.integers(1, 5)),
        st.tuples(st.just("hole"), st.integers(1, 5)),
        st.tuples(st.just("shrink"), st.integers(1, 5)),
    ),
    max_size=30,
)


def at(second: int) -> Micros:
    return (BEGIN + second) * SECOND


class Record:
    """The relay's record: the seconds that it covers."""

    def __init__(self) -> None:
        self.covered: set[int] = set()
        self.now = 0
        self.last = 0  # the seconds that were covered last, which may be withdrawn, once

    def apply(self, step: str, number: int) -> None:
        if step == "extend":
            self.covered |= set(range(self.now, self.now + number))
            self.last = number
        if step in {"extend", "hole"}:
            self.now += number
        if step == "fill" and number < self.now:
            self.covered.add(number)
        if step == "shrink" and self.covered:
            last, self.last = self.last, 0
            end = max(self.covered) + 1
            self.covered -= set(range(end - min(number, last), end))

    @property
    def spans(self) -> list[tuple[Micros, Micros]]:
        seconds = sorted(self.covered)
        breaks = [each for pair in pairwise(seconds) if pair[1] > pair[0] + 1 for each in pair]
        edges = [*seconds[:1], *breaks, *seconds[-1:]]
        return [(at(begin), at(end + 1)) for begin, end in zip(edges[::2], edges[1::2], strict=True)]


class Follower:
    """The relay's side of one client, and the sessions of the daemon that it is: each with what it covers."""

    def __init__(self, base: int) -> None:
        self.base = at(base)
        self.stated_until = self.base
        self.coverage = UpstreamCoverage(self.base)
        self.sessions: list[list[Micros]] = [[self.base, self.base]]

    def follow(self, spans: list[tuple[Micros, Micros]]) -> None:
        frames = b"".join(coverage_messages(spans, self.base, self.stated_until))
        self.stated_until = max((end for _, end in spans), default=self.base)
        for payload in whole_texts(frames, 0)[0]:
            message = DECODER.decode(payload, at(100))
            assert isinstance(message, Covered)
            self.apply(message)

    def apply(self, message: Covered) -> None:
        coverage = self.coverage
        apply = coverage.report if message.is_complete else coverage.withdraw
        change = apply(message.since, message.until)
        if change is CoverageChange.WITHDRAWN:  # the views cut it back, since it ends as a mute one
            self.sessions[-1][1] = min(self.sessions[-1][1], coverage.until)
        if change in {CoverageChange.BEGINS, CoverageChange.NEXT}:
            assert coverage.since is not None
            self.sessions.append([coverage.since, coverage.until])
        if change is CoverageChange.EXTENDED:
            self.sessions[-1][1] = coverage.until

    @property
    def covered(self) -> set[int]:
        seconds = [(begin // SECOND - BEGIN, end // SECOND - BEGIN) for begin, end in self.sessions]
        return {second for begin, end in seconds for second in range(begin, end)}


@given(steps=STEPS, base=st.integers(0, 20), all_at_once=st.booleans())
def test_never_more_than_the_record(steps: list[tuple[str, int]], base: int, all_at_once: bool) -> None:
    """The daemon never covers what the record does not, and always the newest span; at once all of it."""
    record, follower = Record(), Follower(base)
    for step in steps:
        record.apply(*step)
        if step[0] == "silence":
            follower.coverage.stop()
        elif not all_at_once:
            follower.follow(record.spans)
            assert follower.covered <= record.covered
    record.apply("extend", 1)
    follower.follow(record.spans)
    wanted = {second for second in record.covered if second >= base}
    assert follower.covered <= wanted
    begin, end = (edge // SECOND - BEGIN for edge in record.spans[-1])
    assert set(range(max(begin, base), end)) <= follower.covered
    if all_at_once:
        assert follower.covered == wanted


@given(steps=SHRINKING, base=st.integers(0, 5))
def test_withdrawn_coverage(steps: list[tuple[str, int]], base: int) -> None:
    """When the end of the record is withdrawn, the daemon does not cover it either."""
    record, follower = Record(), Follower(base)
    for step in steps:
        record.apply(*step)
        follower.follow(record.spans)
        assert follower.covered <= record.covered
