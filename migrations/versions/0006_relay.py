"""The log of commits, which relays follow, with the registered relays and their clients' tokens.

Revision 0006, after 0005. Adds only, so a daemon of before goes on; but it writes no log, so relays miss its ticks.
"""

from __future__ import annotations

import logging

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

log = logging.getLogger("ingestor.migrations")

WRITER = "market_write"
RELAY = "market_relay"

# Rows are not compressed: the writer would pay for it, and they live for an hour.
TABLES = """
CREATE TABLE ingest.tick_log (
    id BIGINT GENERATED ALWAYS AS IDENTITY,
    session_id UUID NOT NULL,
    batch BIGINT NOT NULL,
    logged_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
    ticks INTEGER NOT NULL,
    rows BYTEA NOT NULL,
    CONSTRAINT tick_log_pkey PRIMARY KEY (id)
);
ALTER TABLE ingest.tick_log ALTER COLUMN rows SET STORAGE EXTERNAL;
CREATE TABLE ingest.tick_log_state (
    singleton BOOLEAN DEFAULT true NOT NULL,
    identity UUID DEFAULT gen_random_uuid() NOT NULL,
    complete_after BIGINT DEFAULT 0 NOT NULL,
    CONSTRAINT tick_log_state_pkey PRIMARY KEY (singleton),
    CONSTRAINT tick_log_state_singleton_check CHECK (singleton)
);
INSERT INTO ingest.tick_log_state DEFAULT VALUES;
CREATE TABLE ingest.relays (
    id UUID NOT NULL,
    instance TEXT NOT NULL,
    started_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
    seen_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
    clients INTEGER DEFAULT 0 NOT NULL,
    CONSTRAINT relays_pkey PRIMARY KEY (id)
);
CREATE TABLE ingest.relay_tokens (
    name TEXT NOT NULL,
    hash BYTEA NOT NULL,
    max_streams INTEGER NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
    expires_at TIMESTAMP WITH TIME ZONE,
    CONSTRAINT relay_tokens_pkey PRIMARY KEY (name),
    CONSTRAINT relay_tokens_hash_key UNIQUE (hash),
    CONSTRAINT relay_tokens_max_streams_check CHECK (max_streams > 0)
)
"""

CURSOR = "ALTER TABLE ingest.stream_sessions ADD COLUMN cursor TEXT"
CAUSE = "WHEN 'upstream_gap' THEN 'the relay that was recorded from had a gap'"

# Ticks are inserted nearly in the order of their arrival, so it takes kilobytes.
INDEX = "CREATE INDEX ticks_received_at_idx ON market.ticks USING brin (received_at) WITH (autosummarize = on)"

COMMENTS = {
    "TABLE ingest.tick_log": "The ticks of each commit of about the last hour, while a relay is registered.",
    "COLUMN ingest.tick_log.id": "In the order of commits: the writers' lock is held when it is given.",
    "COLUMN ingest.tick_log.session_id": "The session that brought the ticks.",
    "COLUMN ingest.tick_log.batch": "The last batch whose ticks these are.",
    "COLUMN ingest.tick_log.logged_at": "When it was written, by the database's clock.",
    "COLUMN ingest.tick_log.ticks": "Number of the ticks.",
    "COLUMN ingest.tick_log.rows": "The rows that were inserted into market.ticks, in the binary format of COPY.",
    "TABLE ingest.tick_log_state": "From which commit on the log is complete. One row.",
    "COLUMN ingest.tick_log_state.singleton": "There is one row.",
    "COLUMN ingest.tick_log_state.identity": "Changes whenever the log begins again, so that old cursors are refused.",
    "COLUMN ingest.tick_log_state.complete_after": "Each later id is in the log; this and earlier ones may be gone.",
    "TABLE ingest.relays": "The relays that follow the log. It is written while one of them was seen within an hour.",
    "COLUMN ingest.stream_sessions.cursor": "Of the last tick, if a relay was recorded from: the place to resume at.",
    "COLUMN ingest.relays.id": "Made by the relay at its start.",
    "COLUMN ingest.relays.instance": "The name of the relay, by default of its machine.",
    "COLUMN ingest.relays.started_at": "When it registered.",
    "COLUMN ingest.relays.seen_at": "When it last reported, by the database's clock.",
    "COLUMN ingest.relays.clients": "Streams that it served then.",
    "TABLE ingest.relay_tokens": "The tokens by which clients use a relay. ingestor relay-token makes them.",
    "COLUMN ingest.relay_tokens.name": "The client, in the operator's words.",
    "COLUMN ingest.relay_tokens.hash": "SHA-256 of the token, which is random and stored nowhere.",
    "COLUMN ingest.relay_tokens.max_streams": "Streams at once at one relay.",
    "COLUMN ingest.relay_tokens.created_at": "When it was made.",
    "COLUMN ingest.relay_tokens.expires_at": "From then on it is refused; null: never.",
}

WRITER_GRANTS = f"""
GRANT INSERT ON ingest.tick_log TO {WRITER};
GRANT SELECT ON ingest.relays TO {WRITER};
"""
RELAY_GRANTS = f"""
GRANT USAGE ON SCHEMA market, ingest TO {RELAY};
GRANT SELECT ON market.ticks, market.gaps, ingest.settings, ingest.alembic_version, ingest.relay_tokens,
    ingest.covered TO {RELAY};
GRANT SELECT, DELETE ON ingest.tick_log TO {RELAY};
GRANT SELECT, UPDATE ON ingest.tick_log_state TO {RELAY};
GRANT SELECT, INSERT, UPDATE, DELETE ON ingest.relays TO {RELAY};
"""


def upgrade() -> None:
    """Add the tables, the index on the arrival of ticks, and the role of relays."""
    connection = op.get_bind()
    _run(connection, TABLES)
    connection.exec_driver_sql(INDEX)
    connection.exec_driver_sql(CURSOR)
    _change_cause(connection, "ELSE end_reason", f"{CAUSE}\n        ELSE end_reason")
    for what, comment in COMMENTS.items():
        escaped = comment.replace("'", "''")
        connection.exec_driver_sql(f"COMMENT ON {what} IS '{escaped}'")
    if _role_exists(connection, WRITER):
        _run(connection, WRITER_GRANTS)
    else:
        log.warning("There is no role %s. When it is made, it needs in addition: %s", WRITER, _line(WRITER_GRANTS))
    _grant_relay(connection)


def downgrade() -> None:
    """Drop what was added. The role stays: other databases of the server may use it."""
    connection = op.get_bind()
    if _role_exists(connection, RELAY):
        connection.exec_driver_sql(f"REVOKE ALL ON ALL TABLES IN SCHEMA market, ingest FROM {RELAY}")
        connection.exec_driver_sql(f"REVOKE ALL ON SCHEMA market, ingest FROM {RELAY}")
    op.execute("DROP INDEX market.ticks_received_at_idx")
    op.execute("ALTER TABLE ingest.stream_sessions DROP COLUMN cursor")
    _change_cause(connection, f"{CAUSE}\n        ELSE end_reason", "ELSE end_reason")
    for table in ("relay_tokens", "relays", "tick_log_state", "tick_log"):
        op.execute(f"DROP TABLE ingest.{table}")


def _change_cause(connection: sa.Connection, old: str, new: str) -> None:
    """Replace a line of the function that puts end reasons into words."""
    definition = connection.scalar(sa.text("SELECT pg_get_functiondef('ingest.cause(text)'::regprocedure)"))
    assert isinstance(definition, str)
    assert definition.count(old) == 1
    connection.exec_driver_sql(definition.replace(old, new))


def _grant_relay(connection: sa.Connection) -> None:
    """Make the role that a relay's login is a member of; if that is not allowed, report the SQL to run."""
    try:
        with connection.begin_nested():
            if not _role_exists(connection, RELAY):
                connection.execute(sa.text(f"CREATE ROLE {RELAY} NOLOGIN"))
    except sa.exc.DBAPIError as error:  # roles belong to the whole server: another migration may just have made it
        if not _role_exists(connection, RELAY):
            log.warning(
                "The role %s could not be made (%s). For a relay, let a superuser run: CREATE ROLE %s NOLOGIN; %s",
                RELAY,
                error.orig,
                RELAY,
                _line(RELAY_GRANTS),
            )
            return
    _run(connection, RELAY_GRANTS)


def _run(connection: sa.Connection, statements: str) -> None:
    for statement in statements.strip().removesuffix(";").split(";\n"):
        connection.exec_driver_sql(statement)


def _line(statements: str) -> str:
    return " ".join(statements.split())


def _role_exists(connection: sa.Connection, name: str) -> bool:
    exists = sa.text("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = :name)")
    return bool(connection.scalar(exists, {"name": name}))
