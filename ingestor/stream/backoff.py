"""How long to wait before the next try to connect: tenacity's strategies, chosen by the judgement."""

from __future__ import annotations

from collections.abc import Callable

from tenacity import RetryCallState, wait_fixed, wait_random, wait_random_exponential

from ingestor.retry_after import MAX_RETRY_AFTER
from ingestor.stream.judge import Judgement, Pace

LOUD_WAIT = 60.0
SLOW_WAIT = 15.0

RETRY_AFTER_SPREAD = 0.1
"""Share of a server's `Retry-After` by which we come later, at random, so that its clients do not return together."""


class Backoff:
    """A wait strategy for tenacity.

    Full jitter, so that many clients of a server that comes back do not come at once. It starts anew only
    after a session that lived for `max_delay`: a server that accepts and then closes is not hammered.
    """

    def __init__(self, judged: Callable[[BaseException], Judgement], *, max_delay: float) -> None:
        self._judged = judged
        self._healthy_after = max_delay
        self._waits = {
            Pace.BACKOFF: wait_random_exponential(multiplier=1, max=max_delay),
            Pace.SLOW: wait_fixed(SLOW_WAIT) + wait_random_exponential(multiplier=5, max=45),
            Pace.LOUD: wait_fixed(LOUD_WAIT) + wait_random(0, 5),
        }
        self.lived = 0.0
        """Seconds that the last session was authenticated; the service keeps it."""

    def __call__(self, state: RetryCallState) -> float:
        """Return seconds to wait after a failed attempt."""
        assert state.outcome is not None
        error = state.outcome.exception()
        assert error is not None
        if self.lived >= self._healthy_after:
            state.attempt_number = 1
        judged = self._judged(error)
        asked = judged.retry_after + wait_random(0, judged.retry_after * RETRY_AFTER_SPREAD)(state)
        return max(self._waits[judged.pace](state), min(asked, MAX_RETRY_AFTER))
