"""The messages that mark gaps in a stream. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Self

from ingestor.clock import from_datetime, to_datetime
from ingestor.model import Micros
from ingestor.relay.encoder import instant, message


class GapMarks:
    """The gaps of a stream that were not sent yet: each begins at an arrival, in order."""

    def __init__(self, marks: Iterable[tuple[Micros, bytes]]) -> None:
        self._marks = deque(sorted(marks))

    @classmethod
    def of(cls, gaps: Iterable[Mapping[str, Any]]) -> Self:
        """Return the marks of recorded gaps."""
        return cls((from_datetime(gap["started_at"]), gap_message(**gap)) for gap in gaps)

    def add_dropped(self, since: Micros, ticks_since: datetime | None) -> None:
        """Mark ticks before `ticks_since` as dropped, if a client reads from before that."""
        if ticks_since is not None and since < from_datetime(ticks_since):
            mark = since, gap_message(to_datetime(since), ticks_since, "retention", "unfillable")
            self._marks = deque(sorted([mark, *self._marks]))

    def divides(self, received_at: Micros) -> bool:
        """Return whether the next gap comes before a tick that arrived then."""
        return bool(self._marks) and self._marks[0][0] <= received_at

    def until(self, received_at: Micros) -> bytes:
        """Return the messages of the gaps that begin before an arrival, and forget them."""
        found = []
        while self.divides(received_at):
            found.append(self._marks.popleft()[1])
        return b"".join(found)

    def rest(self) -> bytes:
        """Return the messages of all gaps that are left, and forget them."""
        found = b"".join(mark for _, mark in self._marks)
        self._marks.clear()
        return found


def gap_message(started_at: datetime, ended_at: datetime, cause: str, status: str) -> bytes:
    """Return the frame that marks a gap."""
    data = {"from": instant(started_at), "to": instant(ended_at), "cause": cause, "status": status}
    return message("gap", data)
