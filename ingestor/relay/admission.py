"""Admits clients: limits of connections and streams, and a delay for an address that sends wrong tokens."""

from __future__ import annotations

from collections import Counter, OrderedDict
from enum import Enum

from ingestor.clock import Clock
from ingestor.settings import is_loopback

FREE_FAILURES = 5
"""Wrong tokens of one address that are answered at once."""

DELAY_SECONDS, MAX_DELAY_SECONDS = 0.5, 8.0
"""The next wrong token is answered after the first, each further one after twice as long, up to the second."""

FORGET_SECONDS = 60.0
MAX_ADDRESSES = 10_000


class Welcome(Enum):
    """The answer to a new connection."""

    ADMITTED = "admitted"
    REFUSED = "refused"
    """It gets an answer in order, and is closed."""
    DROPPED = "dropped"
    """It is closed at once: so many are being refused already."""


class Lobby:
    """The connections that are not authenticated yet: at most `most`, of which one address may have `most_of_one`.

    Twice as many may be open, those that are being refused included.
    """

    def __init__(self, most: int, most_of_one: int) -> None:
        self._most, self._most_of_one = most, most_of_one
        self._counts: Counter[str] = Counter()

    def enter(self, address: str) -> Welcome:
        """Count a connection, also a refused one, until it leaves."""
        self._counts[address] += 1
        most_of_one = self._most if is_loopback(address) else self._most_of_one
        share = max(self._counts.total() / self._most, self._counts[address] / most_of_one)
        if share > 2:
            return Welcome.DROPPED
        return Welcome.REFUSED if share > 1 else Welcome.ADMITTED

    def leave(self, address: str) -> None:
        """Count the end of a connection, or its authentication."""
        self._counts[address] -= 1
        if not self._counts[address]:
            del self._counts[address]


class Failures:
    """Counts wrong tokens by address, for a minute after the last one."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._counts: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def note(self, address: str) -> float:
        """Count a wrong token; return the time in seconds after which it is answered."""
        now = self._clock.monotonic()
        count, at = self._counts.pop(address, (0, now))
        count = 1 if now - at > FORGET_SECONDS else count + 1
        self._counts[address] = (count, now)
        if len(self._counts) > MAX_ADDRESSES:
            self._counts.popitem(last=False)
        return self._delay(count)

    def _delay(self, count: int) -> float:
        if count <= FREE_FAILURES:
            return 0.0
        return float(min(DELAY_SECONDS * 2 ** min(count - FREE_FAILURES - 1, 10), MAX_DELAY_SECONDS))


class Streams:
    """The authenticated streams, by client."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._counts: dict[bytes, int] = {}

    @property
    def total(self) -> int:
        """The number of streams."""
        return sum(self._counts.values())

    def exceeded(self, token: bytes, most: int) -> int | None:
        """Return the limit that one more stream of a token would exceed: the relay's, or its own `most`."""
        if self._counts.get(token, 0) >= most:
            return most
        return self._most if self.total >= self._most else None

    def enter(self, token: bytes) -> None:
        """Count a stream."""
        self._counts[token] = self._counts.get(token, 0) + 1

    def leave(self, token: bytes) -> None:
        """Count the end of a stream."""
        self._counts[token] -= 1
        if not self._counts[token]:
            del self._counts[token]
