"""The messages that report when the record is complete. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ingestor.clock import to_datetime
from ingestor.model import Micros
from ingestor.relay.encoder import instant, message


def coverage_messages(spans: Sequence[tuple[Micros, Micros]], since: Micros, stated_until: Micros) -> Iterator[bytes]:
    """Yield the frames of a statement to a client: first, if need be, which time before `stated_until` is withdrawn.

    `spans` are disjoint and ascending, and reported from `since` on. `stated_until` is the end of the last span that
    the client was sent, or `since`.
    """
    if stated_until > since and not any(begin < stated_until <= end for begin, end in spans):
        left = max((end for _, end in spans if end < stated_until), default=since)
        yield coverage_message(max(left, since), stated_until, is_complete=False)
    for begin, end in spans:
        if end > since:
            yield coverage_message(max(begin, since), end)


def coverage_message(since: Micros, until: Micros, *, is_complete: bool = True) -> bytes:
    """Return the frame that reports a span, or withdraws an earlier report of it."""
    data: dict[str, object] = {"from": instant(to_datetime(since)), "to": instant(to_datetime(until))}
    return message("coverage", data if is_complete else {**data, "complete": False})
