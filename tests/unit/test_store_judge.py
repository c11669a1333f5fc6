from __future__ import annotations

import pytest

from ingestor.errors import PoolerError, SchemaError, StoreError
from ingestor.store.judge import Remedy, judge


@pytest.mark.parametrize(
    ("sqlstate", "constraint", "remedy"),
    [
        (None, None, Remedy.RETRY),  # the network, a time-out, a server that is not there
        ("57P01", None, Remedy.RETRY),  # admin shutdown
        ("57P03", None, Remedy.RETRY),  # cannot connect now
        ("40P01", None, Remedy.RETRY_AT_ONCE),  # deadlock
        ("40001", None, Remedy.RETRY_AT_ONCE),  # serialization failure
        ("53100", None, Remedy.RETRY),  # disk full
        ("53300", None, Remedy.RETRY),  # too many connections
        ("25006", None, Remedy.RECONNECT),  # read-only: a standby
        ("XX000", None, Remedy.RETRY),
        ("P0001", None, Remedy.RETRY),  # a trigger's own error
        ("22P02", None, Remedy.RETRY),  # all that is not known to be a row's fault
        ("22P03", None, Remedy.RETRY),  # bad binary format: our own fault
        ("22003", None, Remedy.SIFT),
        ("22007", None, Remedy.SIFT),
        ("22008", None, Remedy.SIFT),
        ("22021", None, Remedy.SIFT),
        ("22P05", None, Remedy.SIFT),
        ("23502", None, Remedy.SIFT),
        ("23505", "ticks_symbol_time_price_volume_occurrence_key", Remedy.STAGED),
        ("23514", None, Remedy.MAKE_PARTITION),
        ("23514", "some_check", Remedy.SIFT),
        ("28P01", None, Remedy.RETRY_SLOWLY),  # wrong password
        ("28000", None, Remedy.RETRY_SLOWLY),
        ("3D000", None, Remedy.RETRY_SLOWLY),  # no such database
        ("42P01", None, Remedy.RETRY_SLOWLY),  # no such table
        ("42501", None, Remedy.RETRY_SLOWLY),  # no privilege
    ],
)
def test_table(sqlstate: str | None, constraint: str | None, remedy: Remedy) -> None:
    """Every trouble is tried again; only how soon, and by which way, differs."""
    assert judge(StoreError("x", sqlstate=sqlstate, constraint=constraint)) is remedy


def test_schema() -> None:
    """A schema that is missing or old needs a person, so it is looked at every few seconds."""
    assert judge(SchemaError("x")) is Remedy.RETRY_SLOWLY
    assert judge(PoolerError("x")) is Remedy.RETRY_SLOWLY
