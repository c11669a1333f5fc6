from __future__ import annotations

from ingestor.relay.admission import DELAY_SECONDS, FORGET_SECONDS, FREE_FAILURES, Failures, Lobby, Streams, Welcome
from tests.clocks import ManualClock


def test_wrong_tokens_are_answered_later_and_later() -> None:
    """The first wrong tokens of an address are answered at once, the next ones after a growing delay with an end."""
    clock = ManualClock()
    failures = Failures(clock)
    delays = [failures.note("192.0.2.1") for _ in range(FREE_FAILURES + 8)]
    assert delays[:FREE_FAILURES] == [0.0] * FREE_FAILURES
    assert delays[FREE_FAILURES:] == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0]
    assert failures.note("192.0.2.2") == 0.0
    clock.advance(FORGET_SECONDS + 1)
    assert failures.note("192.0.2.1") == 0.0


def test_many_addresses_are_forgotten_in_order() -> None:
    """The memory for addresses is bounded."""
    failures = Failures(ManualClock())
    for _ in range(FREE_FAILURES):
        failures.note("first")
    for number in range(9_999):
        failures.note(str(number))
    assert failures.note("first") == DELAY_SECONDS
    for number in range(10_000):
        failures.note(str(number))
    assert failures.note("first") == 0.0


def test_one_address_cannot_fill_the_lobby() -> None:
    """Beyond its share, an address is refused, and soon dropped; others are admitted."""
    lobby = Lobby(most=10, most_of_one=2)
    found = [lobby.enter("192.0.2.1") for _ in range(5)]
    assert found == [Welcome.ADMITTED] * 2 + [Welcome.REFUSED] * 2 + [Welcome.DROPPED]
    assert lobby.enter("192.0.2.2") is Welcome.ADMITTED
    for _ in range(4):
        lobby.leave("192.0.2.1")
    assert lobby.enter("192.0.2.1") is Welcome.ADMITTED


def test_all_addresses_together_are_limited() -> None:
    """The lobby is full for all. This machine's programs share all of it, since they have one address."""
    lobby = Lobby(most=4, most_of_one=1)
    assert [lobby.enter("127.0.0.1") for _ in range(4)] == [Welcome.ADMITTED] * 4
    assert [lobby.enter(str(number)) for number in range(5)] == [Welcome.REFUSED] * 4 + [Welcome.DROPPED]


def test_the_limits_of_streams() -> None:
    """The limit that is exceeded is the token's own, else the relay's."""
    streams = Streams(3)
    for _ in range(2):
        streams.enter(b"one")
    assert streams.exceeded(b"one", 2) == 2
    assert streams.exceeded(b"one", 5) is None
    streams.enter(b"two")
    assert streams.exceeded(b"three", 5) == 3
    streams.leave(b"one")
    assert streams.exceeded(b"three", 5) is None
