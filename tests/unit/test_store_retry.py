from __future__ import annotations

import pytest

from ingestor.errors import PoolerError, SchemaError, StoreError
from ingestor.store.retry import RetryAction, classify


@pytest.mark.parametrize(
    ("sqlstate", "constraint", "remedy"),
    [
        (None, None, RetryAction.RETRY),  # the network, a timeout, a missing server
        ("57P01", None, RetryAction.RETRY),  # admin shutdown
        ("57P03", None, RetryAction.RETRY),  # cannot connect now
        ("40P01", None, RetryAction.RETRY_AT_ONCE),  # deadlock
        ("40001", None, RetryAction.RETRY_AT_ONCE),  # serialization failure
        ("53100", None, RetryAction.RETRY),  # disk full
        ("53300", None, RetryAction.RETRY),  # too many connections
        ("25006", None, RetryAction.RECONNECT),  # read-only: a standby
        ("XX000", None, RetryAction.RETRY),
        ("P0001", None, RetryAction.RETRY),  # a trigger's own error
        ("22P02", None, RetryAction.RETRY),  # everything that is not known to be a row's fault
        ("22P03", None, RetryAction.RETRY),  # bad binary format: our own fault
        ("22003", None, RetryAction.QUARANTINE),
        ("22007", None, RetryAction.QUARANTINE),
        ("22008", None, RetryAction.QUARANTINE),
        ("22021", None, RetryAction.QUARANTINE),
        ("22P05", None, RetryAction.QUARANTINE),
        ("23502", None, RetryAction.QUARANTINE),
        ("23505", "ticks_symbol_time_price_volume_occurrence_key", RetryAction.USE_STAGING),
        ("23514", None, RetryAction.MAKE_PARTITION),
        ("23514", "some_check", RetryAction.QUARANTINE),
        ("28P01", None, RetryAction.RETRY_SLOWLY),  # wrong password
        ("28000", None, RetryAction.RETRY_SLOWLY),
        ("3D000", None, RetryAction.RETRY_SLOWLY),  # no such database
        ("42P01", None, RetryAction.RETRY_SLOWLY),  # no such table
        ("42501", None, RetryAction.RETRY_SLOWLY),  # no privilege
    ],
)
def test_table(sqlstate: str | None, constraint: str | None, remedy: RetryAction) -> None:
    """Every failure is retried; only the delay and the method differ."""
    assert classify(StoreError("x", sqlstate=sqlstate, constraint=constraint)) is remedy


def test_schema() -> None:
    """A missing or old schema requires operator action, so it is checked every few seconds."""
    assert classify(SchemaError("x")) is RetryAction.RETRY_SLOWLY
    assert classify(PoolerError("x")) is RetryAction.RETRY_SLOWLY
