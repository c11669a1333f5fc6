"""Faults on request, as a stream of prices produces them sooner or later."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from enum import StrEnum

from ingestor.errors import ConfigurationError
from ingestor.redaction import outside_text
from ingestor.settings import parse_duration


class Fault(StrEnum):
    """The kinds of faults."""

    DROP = "drop"
    STALL = "stall"
    HALF_OPEN = "half-open"
    GARBAGE = "garbage"
    REJECT = "reject"
    LIMIT = "limit"
    NO_ACCESS = "no-access"
    REPLAY = "replay"


DEFAULTS = {Fault.DROP: 20.0, Fault.STALL: 20.0, Fault.HALF_OPEN: 20.0, Fault.GARBAGE: 1.0}
"""The mean seconds between two faults of a kind, unless given."""

REPLAYED = 200
"""Ticks that the fault `replay` sends again at a connection."""

GARBAGE: tuple[str | bytes, ...] = (
    "not JSON",
    '{"type": "price"',
    "[]",
    '{"type": "weather", "data": {}}',
    '{"type": "price", "data": {"date": "2021-09-29T09:33:30", "price": 2.61, "symbol": "SUM020.NZ"}}',
    '{"type": "price", "data": {"date": "2021-09-29T09:33:30", "price": true, "volume": 1, "symbol": "A"}}',
    '{"type": "price", "data": {"date": "2021-09-29T09:33:30", "price": NaN, "volume": 1, "symbol": "A"}}',
    '{"type": "price", "data": {"date": "2021-09-29T09:33:30", "price": 1, "volume": -5, "symbol": "A"}}',
    '{"type": "price", "data": {"date": "2021-09-29T09:33:30", "price": 1, "volume": 0.5, "symbol": "A"}}',
    '{"type": "price", "data": {"date": "2021-09-26T02:30:00", "price": 1, "volume": 1, "symbol": "A"}}',
    '{"type": "price", "data": {"date": "yesterday", "price": 1, "volume": 1, "symbol": "A"}}',
    '{"type": "price", "data": {"date": "2121-09-29T09:33:30", "price": 1, "volume": 1, "symbol": "A"}}',
    json.dumps({"type": "price", "data": {"date": "2021-09-29T09:33:30", "price": 1, "volume": 1, "symbol": ""}}),
    b"a binary frame",
)
"""A correct client refuses each of these messages, and keeps the connection."""


class Faults:
    """The enabled faults and their times. Seeded."""

    def __init__(self, given: Iterable[str] = (), *, seed: int = 0) -> None:
        """Parse faults as on the command line: `drop`, `drop=5s`. Raises ConfigurationError."""
        self._every = dict(_parse(text) for text in given)
        self._random = random.Random(seed)  # noqa: S311 - faults, not secrets
        self._authentications = 0

    def __contains__(self, fault: Fault) -> bool:
        return fault in self._every

    def due_after(self, fault: Fault) -> float | None:
        """Return the seconds until a fault strikes next; None if it is not enabled."""
        every = self._every.get(fault)
        return None if every is None else self._random.expovariate(1 / every)

    def refusal(self) -> Fault | None:
        """Return the fault that refuses this authentication: every second one, if such a fault is enabled."""
        self._authentications += 1
        if self._authentications % 2:
            return None
        return next((fault for fault in (Fault.REJECT, Fault.LIMIT, Fault.NO_ACCESS) if fault in self), None)

    def garbage(self) -> str | bytes:
        """Return a malformed message: text, or bytes for a binary frame."""
        return self._random.choice(GARBAGE)


def _parse(text: str) -> tuple[Fault, float]:
    name, given, every = text.partition("=")
    try:
        if name not in set(Fault):
            raise ValueError(f"there is no fault {name!r}")
        fault = Fault(name)
        seconds = parse_duration(every) if given else DEFAULTS.get(fault, 1.0)
        if seconds <= 0 or (given and fault not in DEFAULTS):
            raise ValueError(f"{fault} takes no duration" if seconds > 0 else "the duration must be above zero")
    except ValueError as error:
        kinds = ", ".join(Fault)
        raise ConfigurationError(
            f"--fault {text}: {outside_text(error)}. Write one of {kinds}, with =EVERY where it has one."
        ) from None
    return fault, seconds
