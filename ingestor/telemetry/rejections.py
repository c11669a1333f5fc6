"""Detects a feed whose messages are all unreadable, as opposed to a few malformed messages among ticks."""

from __future__ import annotations

from collections import Counter

from ingestor.model import SECOND, Batch, Duration, Micros

MIN_COUNT = 3
MIN_SPAN: Duration = 5 * SECOND
MAX_PAUSE: Duration = 60 * SECOND


class RejectionRun:
    """The rejections since the last tick, across the sessions of a process.

    They are a problem once there are `MIN_COUNT` of them over `MIN_SPAN` without a pause longer than `MAX_PAUSE`, until
    the next tick. A burst of malformed messages is no problem, nor is an occasional notice at night. The exchange's
    hours do not matter: a feed that is unreadable in the evening will be unreadable at the opening.
    """

    def __init__(self) -> None:
        self._reasons: Counter[str] = Counter()
        self._first_at: Micros = 0
        self._last_at: Micros = 0
        self.is_problem = False

    @property
    def since(self) -> Micros:
        """The arrival of the first rejection."""
        return self._first_at

    @property
    def count(self) -> int:
        """The number of rejections."""
        return self._reasons.total()

    @property
    def reason(self) -> str:
        """The most frequent reason."""
        return self._reasons.most_common(1)[0][0]

    @property
    def detail(self) -> str:
        """The problem in one sentence."""
        return f"No ticks: {self.count:,} messages were rejected, most of them as {self.reason}."

    def add(self, batch: Batch) -> None:
        """Add the rejections of a batch; a tick ends the run."""
        if batch.count:
            self._start()
            self.is_problem = False
        ticked_at = batch.last_tick_at or 0
        for each in batch.rejections:
            if each.received_at > ticked_at:
                self._add(each.reason, each.received_at)

    def _start(self) -> None:
        self._reasons.clear()

    def _add(self, reason: str, at: Micros) -> None:
        if not self.is_problem and at - self._last_at > MAX_PAUSE:
            self._start()
        if not self._reasons:
            self._first_at = at
        self._reasons[reason] += 1
        self._last_at = at
        self.is_problem = self.is_problem or (self.count >= MIN_COUNT and at - self._first_at >= MIN_SPAN)
