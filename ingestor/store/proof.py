"""Decides which coverage batches prove if the database or the spool has lost earlier ones. No I/O."""

from __future__ import annotations

from collections.abc import Sequence

from ingestor.model import Batch, Micros


def proof(batches: Sequence[Batch], held: int) -> tuple[Micros | None, int]:
    """Return until when a session's batches prove coverage, and how many messages before one of them are missing.

    The database has `held` messages of it. It lacks earlier ones after a restore, or a failover to a standby that
    lagged behind; and some may be missing between these batches, where a spool was damaged. Coverage would reach over
    them: later batches prove nothing, since the lost ones stay missing.
    """
    covered_until: Micros | None = None
    missing = 0
    for batch in batches:
        missing = max(missing, batch.messages_before - held)
        if not missing:
            covered_until = batch.covered_until
        held += batch.count + len(batch.rejections)
    return covered_until, missing
