"""`check` derives its results from the facts that were read from a database."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from ingestor.admin.migrate import configuration
from ingestor.service.checks import Severity, _bars, _database, _relays
from ingestor.store.inspect import DatabaseFacts, SchemaFacts
from ingestor.store.registry import RegisteredRelay

HOUR = timedelta(hours=1)
SCHEMA = SchemaFacts(
    revision="0003",
    minimum_version=None,
    calendar="XNZE",
    exchange_timezone="Pacific/Auckland",
    coverage_lead=HOUR,
    coverage_tail=HOUR,
    coverage_margin=HOUR,
    stall_timeout=HOUR,
    last_trading_day=date(2099, 1, 1),
    stale_since=None,
    stored_until=None,
    missing_privileges=(),
)
FACTS = DatabaseFacts("17.5", 17, "UTF8", False, "with TimescaleDB 2.23.0 (Community)", None, True, SCHEMA)


@pytest.mark.parametrize(
    ("changes", "severity", "words"),
    [
        ({}, Severity.OK, "PostgreSQL 17.5 with TimescaleDB 2.23.0"),
        ({"major": 14}, Severity.PROBLEM, "15 or newer"),
        ({"encoding": "LATIN1"}, Severity.PROBLEM, "UTF8 is needed"),
        ({"standby": True}, Severity.PROBLEM, "primary"),
        ({"update": "2.24.0"}, Severity.WARNING, "2.24.0 too: psql -X, and as its first command ALTER EXTENSION"),
    ],
)
def test_the_server(changes: dict[str, Any], severity: Severity, words: str) -> None:
    """An unsupported server is an error, an outdated one a warning with the command."""
    finding = _database(replace(FACTS, **changes))
    assert finding.severity is severity
    assert words in finding.text


@pytest.mark.parametrize(
    ("edition", "aggregates", "age", "words"),
    [
        ("with TimescaleDB 2.23.0 (Community)", True, None, ""),
        ("with TimescaleDB 2.23.0 (Community)", True, HOUR, ""),
        ("with TimescaleDB 2.23.0 (Community)", True, 60 * HOUR, "`ingestor maintain` once a day"),
        ("with TimescaleDB 2.23.0 (Community)", False, None, "--convert-to-hypertable"),
        ("with TimescaleDB 2.23.0 (Apache-2)", False, 60 * HOUR, "`ingestor maintain` once a day"),
        ("without TimescaleDB", False, HOUR, ""),
        ("without TimescaleDB", False, 60 * HOUR, "`ingestor maintain` once a day"),
    ],
)
def test_maintenance_that_does_not_run(edition: str, aggregates: bool, age: timedelta | None, words: str) -> None:
    """Bars that stay stale for days are a warning, and so is a server that could compute them ahead."""
    oldest = None if age is None else datetime.now(UTC) - age
    facts = replace(FACTS, edition=edition, has_aggregates=aggregates)
    finding = _bars(facts, replace(SCHEMA, stale_since=oldest))
    assert finding.severity is (Severity.WARNING if words else Severity.OK)
    assert words in finding.text


@pytest.mark.parametrize(
    ("until", "aggregates", "words"),
    [
        (datetime(2026, 11, 20, 3, tzinfo=UTC), False, "stored until 2026-11-20 03:00 UTC only"),
        (datetime(2026, 11, 20, 3, tzinfo=UTC), True, "shows how the job refresh_bars ended"),
        (
            datetime(1, 1, 1, tzinfo=UTC),
            False,
            "no bars are stored, and queries compute the rest. Run `ingestor maintain`",
        ),
    ],
)
def test_bars_that_are_not_stored(until: datetime, aggregates: bool, words: str) -> None:
    """Ticks that have waited for their bars for days are a warning: the rollup, or the server's job, does not run."""
    finding = _bars(replace(FACTS, has_aggregates=aggregates, edition="x"), replace(SCHEMA, stored_until=until))
    assert finding.severity is Severity.WARNING
    assert words in finding.text


@pytest.mark.parametrize(
    ("silences", "severity", "words"),
    [
        ((), Severity.OK, "none listens"),
        ((3.0,), Severity.OK, "relay0 listens, with 1 client"),
        (
            (3.0, 300.0),
            Severity.WARNING,
            "relay0 listens, with 1 client; relay1 has been silent since 2026-11-26 03:00:00 UTC. It did not stop",
        ),
    ],
)
def test_relays(silences: tuple[float, ...], severity: Severity, words: str) -> None:
    """A relay that has fallen silent is a warning, for an hour."""
    seen_at = datetime(2026, 11, 26, 3, tzinfo=UTC)
    relays = [RegisteredRelay(f"relay{number}", 1, seen_at, seen_at, silent) for number, silent in enumerate(silences)]
    finding = _relays(replace(SCHEMA, relays=tuple(relays)))
    assert finding.severity is severity
    assert finding.text.startswith(words)


@pytest.mark.parametrize(("version", "is_enough"), [("2.17.2", False), ("2.18.0", True), ("2.23.0-dev", True)])
def test_the_version_of_the_extension(version: str, is_enough: bool) -> None:
    """A Community edition without the columnstore's commands must be upgraded before anything is created."""

    class Answering:
        def scalar(self, _: object) -> str:
            return version

    module = ScriptDirectory.from_config(configuration()).get_revision("0003").module
    if is_enough:
        module._check_version(Answering())
        return
    with pytest.raises(CommandError, match=r"2\.17\.2 is too old"):
        module._check_version(Answering())
