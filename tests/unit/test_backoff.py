from __future__ import annotations

from typing import Any

import pytest
from tenacity import AsyncRetrying, retry_if_exception_type
from websockets.datastructures import Headers
from websockets.exceptions import InvalidStatus
from websockets.http11 import Response

from ingestor.errors import StreamError
from ingestor.model import EndReason
from ingestor.stream.retry import Backoff, classify


async def waits(
    reason: EndReason | InvalidStatus, attempts: int, *, lived: float = 0.0, accepted_before: bool = False
) -> list[float]:
    """Fail `attempts` times in the same way; return the waits between, without waiting."""
    failure = StreamError("x", reason=reason) if isinstance(reason, EndReason) else reason
    slept: list[float] = []
    backoff = Backoff(lambda error: classify(error, accepted_before=accepted_before, now=0), max_delay=60)

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def session() -> Any:
        backoff.session_ended(lived)
        raise failure

    retrying = AsyncRetrying(
        wait=backoff,
        sleep=sleep,
        stop=lambda _: len(slept) == attempts,
        retry=retry_if_exception_type((StreamError, InvalidStatus)),
        reraise=True,
    )
    with pytest.raises((StreamError, InvalidStatus)):
        await retrying(session)
    return slept


async def test_full_jitter_up_to_the_cap() -> None:
    """The first retry comes within a second, the bound doubles up to 60 s, and each wait is drawn below it."""
    runs = [await waits(EndReason.CLOSED, 12) for _ in range(200)]
    for attempt, slept in enumerate(zip(*runs, strict=True)):
        bound = min(60, 2**attempt)
        assert all(0 <= seconds <= bound for seconds in slept)
        assert max(slept) > bound * 0.9
        assert min(slept) < bound * 0.1


async def test_only_a_healthy_session_resets_it() -> None:
    """The backoff continues if a server accepts and then closes; a session of a minute resets it."""
    short = [await waits(EndReason.CLOSED, 10, lived=59.9) for _ in range(20)]
    healthy = [await waits(EndReason.CLOSED, 10, lived=60) for _ in range(20)]
    assert max(map(max, short)) > 10
    assert max(map(max, healthy)) <= 1


async def test_stream_limit_waits_longer() -> None:
    """The server may still count our own dead session: the wait grows from 15 s to 60 s."""
    slept = await waits(EndReason.STREAM_LIMIT, 12)
    assert min(slept) >= 15
    assert max(slept) <= 60


async def test_alert_retries_every_minute() -> None:
    """A failure after an earlier acceptance is retried every minute."""
    slept = await waits(EndReason.NOT_AUTHORISED, 5, accepted_before=True)
    assert all(60 <= seconds <= 65 for seconds in slept)


@pytest.mark.parametrize(("asked", "least", "most"), [("20", 20, 60), ("60", 60, 66), ("86400", 600, 600)])
async def test_retry_after_is_honoured(asked: str, least: float, most: float) -> None:
    """No retry comes before the server's time, spread a little; the wait is ten minutes at most."""
    slept = await waits(InvalidStatus(Response(429, "", Headers({"Retry-After": asked}))), 12)
    assert min(slept) >= least
    assert max(slept) <= most
