"""The tables as SQLAlchemy Core metadata: what the migrations must arrive at, held by `alembic check`.

The migrations alone divide `market.ticks` into a hypertable's chunks or monthly partitions, and make its index on time.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    CheckConstraint,
    Column,
    Identity,
    Index,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import (
    BIGINT,
    BOOLEAN,
    BYTEA,
    DATE,
    DOUBLE_PRECISION,
    INTEGER,
    INTERVAL,
    TEXT,
    TIMESTAMP,
    UUID,
)

SCHEMAS = ("market", "ingest")
TIME = TIMESTAMP(timezone=True)

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "ck": "%(table_name)s_%(constraint_name)s_check",
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
    }
)


def column(name: str, kind: Any, comment: str, *, null: bool = False, default: str | None = None) -> Column[Any]:
    """Return a column; the default is an SQL expression."""
    return Column(
        name, kind, nullable=null, comment=comment, server_default=text(default) if default is not None else None
    )


ticks = Table(
    "ticks",
    metadata,
    column("time", TIME, "When the trade happened, by the exchange's clock, which has whole seconds."),
    column("received_at", TIME, "When the message arrived here; orders the trades within a second."),
    column("price", DOUBLE_PRECISION, "Price of one unit, in the symbol's currency, as it was sent."),
    column("volume", BIGINT, "Units traded."),
    column("occurrence", INTEGER, "1 for the first, 2 for the second … of equal trades in the same second."),
    column("symbol", TEXT, "The exchange's symbol with its suffix, such as AIR.NZ."),
    UniqueConstraint("symbol", "time", "price", "volume", "occurrence"),
    schema="market",
    comment="Every trade that was received, exactly once.",
)

instruments = Table(
    "instruments",
    metadata,
    column("symbol", TEXT, "The exchange's symbol with its suffix."),
    column("exchange", TEXT, "The exchange, such as nzx."),
    column("company_name", TEXT, "Name of the issuer.", null=True),
    column("industry", TEXT, "Industry, in the provider's words.", null=True),
    column("uuid", UUID, "The provider's id of the instrument.", null=True),
    column("active", BOOLEAN, "Whether the provider lists it as active.", null=True),
    column("first_seen", TIME, "Time of the first tick.", null=True),
    column("last_seen", TIME, "Time of the last tick.", null=True),
    PrimaryKeyConstraint("symbol"),
    schema="market",
    comment="The traded instruments.",
)

bars = Table(
    "bars",
    metadata,
    column("symbol", TEXT, "The exchange's symbol with its suffix."),
    column("time", TIME, "Start of the bar."),
    column("resolution", INTERVAL, "Length of the bar."),
    column("open", DOUBLE_PRECISION, "First price."),
    column("high", DOUBLE_PRECISION, "Highest price."),
    column("low", DOUBLE_PRECISION, "Lowest price."),
    column("close", DOUBLE_PRECISION, "Last price."),
    column("volume", BIGINT, "Units traded."),
    column("source", TEXT, "The provider of the bar."),
    column("fetched_at", TIME, "When it was fetched.", default="now()"),
    PrimaryKeyConstraint("symbol", "resolution", "time"),
    schema="market",
    comment="Bars fetched from the provider's REST API, for the minutes that are not covered.",
)

stream_sessions = Table(
    "stream_sessions",
    metadata,
    column("id", UUID, "Made by the daemon (UUIDv7), so that a session can begin while the database is unavailable."),
    column("instance", TEXT, "Which daemon it was."),
    column("endpoint", TEXT, "The stream's address; of a replay, the file's name."),
    column("connected_at", TIME, "When the connection was open."),
    column("kind", TEXT, "stream or replay; only a stream covers.", default="'stream'"),
    column("authenticated_at", TIME, "When the server accepted the token; coverage begins here.", null=True),
    column(
        "covered_until",
        TIME,
        "All ticks before this were received; null: not proved. Never later than the database's clock.",
        null=True,
    ),
    column("last_message_at", TIME, "Arrival of the last message.", null=True),
    column("last_tick_at", TIME, "Arrival of the last message that was a tick.", null=True),
    column(
        "last_seen_at",
        TIME,
        "When its own process last wrote here, by the database's clock: it is alive for a minute after that. "
        "Null: never.",
        null=True,
    ),
    column("last_batch", BIGINT, "Number of the last committed batch: it makes each one count once.", default="0"),
    column(
        "last_batch_messages",
        BIGINT,
        "Messages of that batch that are committed, while it is written in parts; null: all.",
        null=True,
    ),
    column("ended_at", TIME, "When it ended; null while it lives.", null=True),
    column("end_reason", TEXT, "Why it ended, from a fixed list.", null=True),
    column("close_code", INTEGER, "The WebSocket's close code, where there was one.", null=True),
    column("ticks", BIGINT, "Ticks committed, duplicates included.", default="0"),
    column("rejected", BIGINT, "Messages kept in ingest.rejected_messages.", default="0"),
    column("duplicates", BIGINT, "Ticks that were in the table already.", default="0"),
    column("cursor", TEXT, "Of the last tick, if a relay was recorded from: the place to resume at.", null=True),
    PrimaryKeyConstraint("id"),
    CheckConstraint("kind IN ('stream', 'replay')", name="kind"),
    Index(None, "connected_at"),
    schema="ingest",
    comment="Each connection to the feed and each replay. Coverage is computed from these rows.",
)

rejected_messages = Table(
    "rejected_messages",
    metadata,
    column("session_id", UUID, "The session that received it."),
    column("batch", BIGINT, "The batch that brought it."),
    column("position", INTEGER, "Its place among the batch's messages, from 1."),
    column("received_at", TIME, "When it arrived."),
    column("reason", TEXT, "Why it is not a tick, from a fixed list."),
    column("raw", BYTEA, "Its first 64 KiB."),
    column("raw_bytes", INTEGER, "Its full size in bytes."),
    PrimaryKeyConstraint("session_id", "batch", "position"),
    Index(None, "received_at"),
    schema="ingest",
    comment="Messages that could not be stored as ticks: nothing is dropped in silence.",
)

trading_sessions = Table(
    "trading_sessions",
    metadata,
    column("calendar", TEXT, "XNZE, or always."),
    column("trading_day", DATE, "The exchange's day."),
    column("opens_at", TIME, "Opening."),
    column("closes_at", TIME, "Close."),
    PrimaryKeyConstraint("calendar", "trading_day"),
    CheckConstraint("opens_at < closes_at", name="order"),
    CheckConstraint("closes_at <= opens_at + interval '2 days'", name="length"),
    CheckConstraint(
        "trading_day BETWEEN (opens_at AT TIME ZONE 'UTC')::date - 7 AND (opens_at AT TIME ZONE 'UTC')::date + 7",
        name="day",
    ),
    schema="ingest",
    comment="The exchange's trading sessions. A part that is not covered is a gap.",
)

backfills = Table(
    "backfills",
    metadata,
    column("gap_from", TIME, "Start of the gap."),
    column("gap_until", TIME, "End of the gap."),
    column("symbol", TEXT, "The symbol that was asked for; * stands for all of them."),
    column(
        "status",
        TEXT,
        "pending, filled, no trades, partial, unfillable; of the whole gap: pending, backfilled, partial, unfillable.",
    ),
    column("bars", INTEGER, "Bars received.", default="0"),
    column("attempts", INTEGER, "How often it was tried.", default="0"),
    column("error", TEXT, "Why it is partial or unfillable, or what the last attempt failed with.", null=True),
    column("started_at", TIME, "First attempt.", default="now()"),
    column("finished_at", TIME, "When it was settled.", null=True),
    column(
        "next_attempt_at",
        TIME,
        "Of what is pending: not before this does ingestor backfill --watch ask again.",
        null=True,
    ),
    PrimaryKeyConstraint("gap_from", "gap_until", "symbol"),
    CheckConstraint(
        "status IN ('pending', 'filled', 'no trades', 'unfillable', 'backfilled', 'partial')", name="status"
    ),
    CheckConstraint("gap_from < gap_until", name="order"),
    Index("backfills_pending_idx", "gap_from", postgresql_where=text("status = 'pending'")),
    Index("backfills_whole_idx", "gap_from", postgresql_where=text("symbol = '*'")),
    schema="ingest",
    comment="The backfill of each gap: a row for each symbol, and one named * for the complete gap.",
)

exclusions = Table(
    "exclusions",
    metadata,
    column("excluded_from", TIME, "From when on."),
    column("excluded_until", TIME, "Until when."),
    column("reason", TEXT, "The reason, in the words of the person who recorded it."),
    column("noted_at", TIME, "When it was put on record.", default="now()"),
    PrimaryKeyConstraint("excluded_from", "excluded_until"),
    CheckConstraint("excluded_from < excluded_until", name="order"),
    schema="ingest",
    comment="Times in which the exchange itself did not trade or publish: a gap in them is excluded.",
)

reconciliations = Table(
    "reconciliations",
    metadata,
    column("symbol", TEXT, "The exchange's symbol with its suffix."),
    column("time", TIME, "Start of the minute."),
    column("trading_day", DATE, "The exchange's day."),
    column("difference", TEXT, "missing here, missing there, or differs."),
    *(
        column(f"{whose}_{name}", BIGINT if name == "volume" else DOUBLE_PRECISION, f"{what} by {by}.", null=True)
        for whose, by in (("our", "our ticks"), ("their", "the provider"))
        for name, what in (
            ("open", "First price"),
            ("high", "Highest price"),
            ("low", "Lowest price"),
            ("close", "Last price"),
            ("volume", "Units traded"),
        )
    ),
    column("compared_at", TIME, "When they were compared.", default="now()"),
    PrimaryKeyConstraint("symbol", "time"),
    CheckConstraint("difference IN ('missing here', 'missing there', 'differs')", name="difference"),
    Index(None, "trading_day"),
    schema="ingest",
    comment="Minutes that were wholly covered, in which our bar and the provider's are not the same.",
)

_BAR = {
    "open": "First price.",
    "high": "Highest price.",
    "low": "Lowest price.",
    "close": "Last price.",
    "volume": "Units traded.",
    "turnover": "Money traded: the sum of price times volume.",
    "ticks": "Number of ticks.",
    "first_at": "Time of the first tick: a late tick is placed by it after retention.",
    "last_at": "Time of the last tick.",
    "last_received_at": "When the last of its ticks to arrive was received.",
}


def rollup(width: str, comment: str, *extra: Any) -> Table:
    """Return the table of stored bars of a width."""
    kinds = {"volume": BIGINT, "ticks": BIGINT, "first_at": TIME, "last_at": TIME, "last_received_at": TIME}
    return Table(
        f"rollup_{width}",
        metadata,
        column("symbol", TEXT, "The exchange's symbol with its suffix."),
        column("time", TIME, "Start of the bar."),
        *(column(name, kinds.get(name, DOUBLE_PRECISION), comment) for name, comment in _BAR.items()),
        *extra,
        PrimaryKeyConstraint("symbol", "time"),
        schema="ingest",
        comment=comment,
    )


rollup_1m = rollup(
    "1m",
    "Stored one-minute bars, read through market.ohlcv_1m. They outlive their ticks.",
    Index(None, "time", postgresql_using="brin"),
)
rollup_5m = rollup(
    "5m", "Stored five-minute bars, read through market.ohlcv_5m.", Index(None, "time", postgresql_using="brin")
)
rollup_1h = rollup(
    "1h", "Stored one-hour bars, read through market.ohlcv_1h.", Index(None, "time", postgresql_using="brin")
)
rollup_1d = rollup("1d", "Stored bars of the exchange's days, read through market.ohlcv_1d.")

rollup_state = Table(
    "rollup_state",
    metadata,
    column("id", BOOLEAN, "There is one row.", default="true"),
    column(
        "announced_until",
        TIME,
        "A writer puts the bars of older ticks on the list of stale bars.",
        default="'0001-01-01 00:00:00+00'",
    ),
    column("until_1m", TIME, "The one-minute bars before this are stored.", default="'0001-01-01 00:00:00+00'"),
    column("until_5m", TIME, "The five-minute bars before this are stored.", default="'0001-01-01 00:00:00+00'"),
    column("until_1h", TIME, "The one-hour bars before this are stored.", default="'0001-01-01 00:00:00+00'"),
    column("until_1d", TIME, "The bars of days before this are stored.", default="'0001-01-01 00:00:00+00'"),
    PrimaryKeyConstraint("id"),
    CheckConstraint("id", name="id"),
    CheckConstraint("until_1m <= announced_until", name="announced"),
    schema="ingest",
    comment="How far bars are stored. One row.",
)

stale_bars = Table(
    "stale_bars",
    metadata,
    column("symbol", TEXT, "The exchange's symbol with its suffix."),
    column("time", TIME, "Start of the minute."),
    column("noted_at", TIME, "When the last of the ticks came.", default="clock_timestamp()"),
    PrimaryKeyConstraint("symbol", "time"),
    schema="ingest",
    comment=(
        "Minutes into which ticks came after their bars were stored. Views compute these bars from ticks until they "
        "are repaired."
    ),
)

day_changes = Table(
    "day_changes",
    metadata,
    column("trading_day", DATE, "The exchange's day."),
    Column("id", BIGINT, Identity(always=True), nullable=False, comment="The database's number of the note."),
    column("changed_at", TIME, "When they changed: by late ticks, a delayed commit, a backfill or an exclusion."),
    PrimaryKeyConstraint("trading_day", "id"),
    schema="ingest",
    comment=(
        "When a day's data changed otherwise than by ticks that were stored as they arrived. The newest row of a day "
        "counts."
    ),
)

settings = Table(
    "settings",
    metadata,
    column("singleton", BOOLEAN, "There is one row.", default="true"),
    column("calendar", TEXT, "The trading calendar in force."),
    column("exchange_timezone", TEXT, "The exchange's time zone."),
    column("coverage_lead", INTERVAL, "Time before the opening that counts as trading time."),
    column("coverage_tail", INTERVAL, "Time after the close that counts as trading time."),
    column("coverage_margin", INTERVAL, "Doubt between the exchange's clock and ours."),
    column("stall_timeout", INTERVAL, "Silence in trading hours after which a stream counts as dead."),
    column("coverage_since", TIME, "Start of coverage; null: the first session.", null=True),
    column("minimum_version", TEXT, "Oldest ingestor that may write here; null: any.", null=True),
    column(
        "bar_label",
        TEXT,
        "Whether the provider's bars carry the time of their start or of their end; ingestor reconcile finds out.",
        default="'start'",
    ),
    column(
        "ticks_since",
        TIME,
        "Ticks older than this were dropped, or may be, as INGESTOR_RETENTION said; null: none were.",
        null=True,
    ),
    PrimaryKeyConstraint("singleton"),
    CheckConstraint("singleton", name="singleton"),
    CheckConstraint(
        "coverage_lead BETWEEN '0' AND '1 day' AND coverage_tail BETWEEN '0' AND '1 day' "
        "AND coverage_margin BETWEEN '0' AND '1 day' AND stall_timeout BETWEEN '0' AND '1 day' "
        "AND isfinite(coverage_since)",
        name="coverage",
    ),
    CheckConstraint("bar_label IN ('start', 'end')", name="bar_label"),
    schema="ingest",
    comment="The settings that SQL needs. The first migration writes them; later changes are deliberate.",
)

tick_log = Table(
    "tick_log",
    metadata,
    Column(
        "id",
        BIGINT,
        Identity(always=True),
        nullable=False,
        comment="In the order of commits: the writers' lock is held when it is given.",
    ),
    column("session_id", UUID, "The session that brought the ticks."),
    column("batch", BIGINT, "The last batch whose ticks these are."),
    column("logged_at", TIME, "When it was written, by the database's clock.", default="clock_timestamp()"),
    column("ticks", INTEGER, "Number of the ticks."),
    column("rows", BYTEA, "The rows that were inserted into market.ticks, in the binary format of COPY."),
    PrimaryKeyConstraint("id"),
    schema="ingest",
    comment="The ticks of each commit of about the last hour, while a relay is registered.",
)

tick_log_state = Table(
    "tick_log_state",
    metadata,
    column("singleton", BOOLEAN, "There is one row.", default="true"),
    column(
        "identity",
        UUID,
        "Changes whenever the log begins again, so that old cursors are refused.",
        default="gen_random_uuid()",
    ),
    column("complete_after", BIGINT, "Each later id is in the log; this and earlier ones may be gone.", default="0"),
    PrimaryKeyConstraint("singleton"),
    CheckConstraint("singleton", name="singleton"),
    schema="ingest",
    comment="From which commit on the log is complete. One row.",
)

relays = Table(
    "relays",
    metadata,
    column("id", UUID, "Made by the relay at its start."),
    column("instance", TEXT, "The name of the relay, by default of its machine."),
    column("started_at", TIME, "When it registered.", default="clock_timestamp()"),
    column("seen_at", TIME, "When it last reported, by the database's clock.", default="clock_timestamp()"),
    column("clients", INTEGER, "Streams that it served then.", default="0"),
    PrimaryKeyConstraint("id"),
    schema="ingest",
    comment="The relays that follow the log. It is written while one of them was seen within an hour.",
)

relay_tokens = Table(
    "relay_tokens",
    metadata,
    column("name", TEXT, "The client, in the operator's words."),
    column("hash", BYTEA, "SHA-256 of the token, which is random and stored nowhere."),
    column("max_streams", INTEGER, "Streams at once at one relay."),
    column("created_at", TIME, "When it was made.", default="clock_timestamp()"),
    column("expires_at", TIME, "From then on it is refused; null: never.", null=True),
    PrimaryKeyConstraint("name"),
    UniqueConstraint("hash"),
    CheckConstraint("max_streams > 0", name="max_streams"),
    schema="ingest",
    comment="The tokens by which clients use a relay. ingestor relay-token makes them.",
)
