"""The checks of `ingestor check`: each has a name, a severity, and a finding or an instruction."""

from __future__ import annotations

import re
import shutil
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import date
from enum import Enum
from typing import Any
from urllib.parse import urlsplit

from ingestor.backfill.client import RestClient
from ingestor.buffer.reserve import BALLAST
from ingestor.buffer.spool import prepare_state_directory
from ingestor.clock import ClockDifference, SystemClock
from ingestor.coverage.calendar import DAYS_AHEAD, RENEW
from ingestor.errors import ConfigurationError, IngestorError, SchemaError
from ingestor.settings import Settings, require_nats, unknown_variables, variable
from ingestor.store.inspect import MINIMUM_SERVER, REFRESHED_WITHIN, DatabaseFacts, SchemaFacts, inspect, settings_drift
from ingestor.store.registry import RegisteredRelay
from ingestor.store.retry import MIGRATE, UPDATE
from ingestor.store.version import check_revision, no_schema
from ingestor.stream.connection import open_connection
from ingestor.stream.retry import check_token, classify

_CATCH_UP = {
    False: "Run `ingestor maintain`, once a day where INGESTOR_ROLLUP is off.",
    True: "Run `ingestor maintain`; timescaledb_information.job_stats shows how the job refresh_bars ended.",
}
"""The advice, by whether the server has continuous aggregates."""

SAFE_COPIES = 3
"""Copies of the stream of which one may be lost without a loss."""

REST_TIMEOUT = 5.0
"""Seconds without an answer, after which the REST API counts as unavailable."""


class Severity(Enum):
    """The result of a check. A warning does not fail the command."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One line of the report."""

    check: str
    severity: Severity
    text: str


async def check(settings: Settings) -> AsyncIterator[CheckResult]:
    """Run the checks one after the other, and yield their results; later checks run even if earlier ones fail."""
    yield _variables()
    yield _token(settings)
    yield await _endpoint(settings)
    yield await _rest(settings)
    yield _disk(settings)
    if settings.buffer_url is not None:
        async for result in check_buffer(settings):
            yield result
    try:
        facts = await inspect(settings.read_database_url())
    except IngestorError as error:
        yield CheckResult("database", Severity.PROBLEM, str(error))
        return
    yield _database(facts)
    yield _clock(facts.clock)
    yield _schema(facts.schema)
    if facts.schema is not None:
        yield _agreement(settings, facts.schema)
        yield _calendar(facts.schema, facts.now.date())
        yield _bars(facts, facts.schema)
        yield _relays(facts.schema)


def _variables() -> CheckResult:
    unknown = unknown_variables()
    if unknown:
        text = f"Unknown settings, which have no effect: {', '.join(unknown)}."
        return CheckResult("settings", Severity.WARNING, text)
    return CheckResult("settings", Severity.OK, "every variable is known and valid")


def _token(settings: Settings) -> CheckResult:
    try:
        token = settings.read_token()
        check_token(urlsplit(settings.stream_url).hostname or "", token)
    except ConfigurationError as error:
        return CheckResult("token", Severity.PROBLEM, str(error))
    if not re.fullmatch(r"(pk|tk)_.{17}", token):
        text = "does not look like a Financefeast token: 20 characters that begin with pk_ or tk_"
        return CheckResult("token", Severity.WARNING, text)
    return CheckResult("token", Severity.OK, f"{token[:3]}… is well formed (only a connection can tell if it is valid)")


async def _endpoint(settings: Settings) -> CheckResult:
    """Open a connection without sending the token, so that it does not count as a stream of the plan."""
    try:
        async with open_connection(settings.stream_url):
            return CheckResult("endpoint", Severity.OK, f"{settings.stream_url} answers as a WebSocket")
    except Exception as error:  # noqa: BLE001 - `classify` has a message for any error
        text = classify(error, accepted_before=False, now=SystemClock().wall()).message
        return CheckResult("endpoint", Severity.PROBLEM, f"{settings.stream_url}: {text}")


async def _rest(settings: Settings) -> CheckResult:
    """Validate the token at the REST API. The daemon runs without it, so a temporary failure is a warning."""
    zone, clock, url = settings.exchange_timezone, SystemClock(), settings.rest_url
    try:
        async with RestClient(url, settings.read_token(), timezone=zone, clock=clock, timeout=REST_TIMEOUT) as client:
            await client.validate()
    except ConfigurationError as error:
        return CheckResult("rest", Severity.PROBLEM, f"{url}: {error}")
    except IngestorError as error:
        return CheckResult("rest", Severity.WARNING, f"{url}: {error} Gaps can't be filled until it answers.")
    return CheckResult("rest", Severity.OK, f"{url} accepts the token")


def _disk(settings: Settings) -> CheckResult:
    try:
        directory = settings.state_path("")
        prepare_state_directory(directory)
    except ConfigurationError as error:
        return CheckResult("disk", Severity.PROBLEM, str(error))
    free = shutil.disk_usage(directory).free
    needed = settings.spool_max_bytes + BALLAST
    text = f"{directory} has {free / 2**30:.1f} GiB free for a spool of {settings.spool_max_bytes / 2**30:.1f} GiB"
    return CheckResult("disk", Severity.OK if free >= needed else Severity.WARNING, text)


async def check_buffer(settings: Settings, **options: Any) -> AsyncIterator[CheckResult]:
    """Yield the results for the replicated buffer: the stream, and what its servers may lose."""
    try:
        require_nats()
        from ingestor.jetstream.survey import survey  # noqa: PLC0415 - only with this setting

        facts = await survey(settings, **options)
    except IngestorError as error:
        yield CheckResult("buffer", Severity.PROBLEM, str(error))
        return
    if facts.state is None:
        text = (
            f"NATS {facts.version} has no stream {settings.buffer_stream} yet: `ingestor migrate`, or the first start"
        )
        yield CheckResult("buffer", Severity.OK, f"{text}, creates it")
    elif facts.differences:
        yield CheckResult(
            "buffer", Severity.WARNING, f"the stream {settings.buffer_stream}: {'; '.join(facts.differences)}"
        )
    elif facts.state.lagging:
        text = f"{facts.state.lagging} of {facts.state.replicas} copies of the stream are not in step"
        yield CheckResult("buffer", Severity.WARNING, f"{text}; one more failure can stop it")
    else:
        text = f"NATS {facts.version}, stream {settings.buffer_stream} with {facts.state.messages:,} messages"
        yield CheckResult("buffer", Severity.OK, text)
    copies = facts.state.replicas if facts.state is not None else settings.buffer_replicas
    if copies < SAFE_COPIES:
        text = f"{copies} of {SAFE_COPIES} copies: if one server is lost, so is what only the stream has"
        yield CheckResult(
            "replicas", Severity.WARNING, f"{text}. Set {variable('buffer_replicas')} to 3 and use 3 servers."
        )
    else:
        yield CheckResult("replicas", Severity.OK, f"{copies} copies: {(copies - 1) // 2} may fail at once")
    yield _sync(facts.sync_always)


def _sync(sync_always: Mapping[str, bool | None]) -> CheckResult:
    """Decide whether the servers write to their disks before they acknowledge."""
    risk = (
        "a power failure of all servers loses the last acknowledged batches, unless the recorder has them in its spool"
    )
    if late := [host for host, always in sync_always.items() if always is False]:
        text = f"{', '.join(late)} without sync_interval: always: {risk}"
        return CheckResult("sync", Severity.WARNING, text)
    if silent := [host for host, always in sync_always.items() if always is None]:
        text = (
            f"no monitoring at {', '.join(silent)}, so it is unknown whether sync_interval is always. Without it {risk}"
        )
        return CheckResult("sync", Severity.WARNING, text)
    return CheckResult("sync", Severity.OK, "the servers write to their disks before they acknowledge")


def _database(facts: DatabaseFacts) -> CheckResult:
    text = f"PostgreSQL {facts.version} {facts.edition}"
    if facts.major < MINIMUM_SERVER:
        return CheckResult("database", Severity.PROBLEM, f"{text}; PostgreSQL {MINIMUM_SERVER} or newer is needed")
    if facts.encoding != "UTF8":
        return CheckResult("database", Severity.PROBLEM, f"{text} has the encoding {facts.encoding}; UTF8 is needed")
    if facts.standby:
        return CheckResult("database", Severity.PROBLEM, f"{text} is a standby: add the primary to the URL")
    if facts.update:
        advice = f"the server has {facts.update} too: {UPDATE}"
        return CheckResult("database", Severity.WARNING, f"{text}; {advice}")
    return CheckResult("database", Severity.OK, text)


def _clock(difference: ClockDifference) -> CheckResult:
    if difference.is_large:
        advice = "one of the two is wrong, and coverage lacks this much: synchronize both machines by NTP"
        return CheckResult("clock", Severity.WARNING, f"{difference}; {advice}")
    return CheckResult("clock", Severity.OK, str(difference))


def _schema(facts: SchemaFacts | None) -> CheckResult:
    if facts is None:
        return CheckResult("schema", Severity.PROBLEM, str(no_schema()))
    try:
        check_revision(facts.revision, facts.minimum_version)
    except SchemaError as error:
        return CheckResult("schema", Severity.PROBLEM, str(error))
    if facts.missing_privileges:
        missing = ", ".join(facts.missing_privileges)
        return CheckResult("schema", Severity.PROBLEM, f"this role lacks {missing}: GRANT market_write TO it")
    return CheckResult("schema", Severity.OK, f"revision {facts.revision}, and this role may write")


def _agreement(settings: Settings, facts: SchemaFacts) -> CheckResult:
    differing = settings_drift(settings, facts)
    if differing:
        return CheckResult("agreement", Severity.WARNING, "; ".join(differing))
    return CheckResult(
        "agreement", Severity.OK, "environment and database have the same calendar, time zone and coverage"
    )


def _calendar(facts: SchemaFacts, today: date) -> CheckResult:
    if facts.last_trading_day is None:
        return CheckResult("calendar", Severity.PROBLEM, f"no trading session of {facts.calendar} is stored. {MIGRATE}")
    left = facts.days_left(today)
    text = f"{facts.calendar} is known until {facts.last_trading_day}, {left} days ahead"
    if left < DAYS_AHEAD:
        return CheckResult("calendar", Severity.WARNING, f"{text}. {RENEW}")
    return CheckResult("calendar", Severity.OK, text)


def _bars(facts: DatabaseFacts, schema: SchemaFacts) -> CheckResult:
    if not facts.has_aggregates and "Community" in facts.edition:
        advice = "this server can compute them ahead: run `ingestor migrate --convert-to-hypertable`"
        return CheckResult("bars", Severity.WARNING, f"stored in tables; {advice}")
    since = schema.stale_since
    if since is not None and facts.now - since > REFRESHED_WITHIN:
        text = f"the bars of ticks that came late are computed by each query since {since:%Y-%m-%d}"
        return CheckResult("bars", Severity.WARNING, f"{text}. Run `ingestor maintain` once a day.")
    if (until := schema.stored_until) is not None:
        what = f"bars are stored until {until:%Y-%m-%d %H:%M} UTC only" if until.year > 1 else "no bars are stored"
        text = f"{what}, and queries compute the rest"
        return CheckResult("bars", Severity.WARNING, f"{text}. {_CATCH_UP[facts.has_aggregates]}")
    by = "continuous aggregates" if facts.has_aggregates else "tables"
    return CheckResult("bars", Severity.OK, f"stored in {by}; queries compute the newest and the stale ones")


def _relays(facts: SchemaFacts) -> CheckResult:
    """List the relays. One that fell silent while it had clients is a warning, for an hour."""
    if not facts.relays:
        return CheckResult("relays", Severity.OK, "none listens")
    text = "; ".join(_relay(relay) for relay in facts.relays)
    if not all(relay.is_listening for relay in facts.relays):
        advice = "It did not stop in order: is it still there, and does it reach the database?"
        return CheckResult("relays", Severity.WARNING, f"{text}. {advice}")
    return CheckResult("relays", Severity.OK, text)


def _relay(relay: RegisteredRelay) -> str:
    if relay.is_listening:
        return f"{relay.instance} listens, with {relay.clients} client{'s' if relay.clients != 1 else ''}"
    return f"{relay.instance} has been silent since {relay.seen_at:%Y-%m-%d %H:%M:%S} UTC"
