"""The first schema: ticks, sessions, rejections, calendar, settings.

Revision 0001, after nothing.
"""

from __future__ import annotations

import logging
from pathlib import Path

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

log = logging.getLogger("ingestor.migrations")

WRITER = "market_write"

TABLES = (
    "market.ticks",
    "market.instruments",
    "market.bars",
    "ingest.stream_sessions",
    "ingest.rejected_messages",
    "ingest.trading_sessions",
    "ingest.backfills",
    "ingest.settings",
)

# The writer owns nothing, so it can't make partitions: this function does it for it, as its owner. The table is
# made beside the others and then attached, which keeps no reader or writer of the other partitions waiting.
ENSURE_PARTITION = """
CREATE FUNCTION ingest.ensure_partition(month date) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    first date := date_trunc('month', month)::date;
    following date := (date_trunc('month', month) + interval '1 month')::date;
    name text := 'ticks_' || to_char(month, 'YYYY_MM');
BEGIN
    IF NOT EXISTS (SELECT FROM pg_partitioned_table WHERE partrelid = 'market.ticks'::regclass) THEN
        RETURN false;
    END IF;
    IF first < '1990-01-01' OR first > now() + interval '13 months' THEN
        RAISE EXCEPTION 'no partition is made for %: months from 1990 to 13 months ahead are', first
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF EXISTS (SELECT FROM pg_class WHERE relnamespace = 'market'::regnamespace AND relname = name) THEN
        RETURN false;
    END IF;
    -- Two may need it at once. The second look must be a query: to_regclass answers from a cache that is not
    -- brought up to date by this kind of lock.
    PERFORM pg_advisory_xact_lock(hashtext('ingest.ensure_partition'));
    IF EXISTS (SELECT FROM pg_class WHERE relnamespace = 'market'::regnamespace AND relname = name) THEN
        RETURN false;
    END IF;
    EXECUTE format('CREATE TABLE market.%I (LIKE market.ticks INCLUDING DEFAULTS INCLUDING CONSTRAINTS '
        'INCLUDING COMMENTS)', name);
    EXECUTE format('ALTER TABLE market.ticks ATTACH PARTITION market.%I FOR VALUES FROM (%L) TO (%L)',
                   name, first || ' 00:00:00+00', following || ' 00:00:00+00');
    RETURN true;
END
$$
"""

GRANTS = f"""
GRANT USAGE ON SCHEMA market, ingest TO {WRITER};
GRANT SELECT, INSERT ON market.ticks, ingest.rejected_messages TO {WRITER};
GRANT SELECT, INSERT, UPDATE ON ingest.stream_sessions TO {WRITER};
GRANT SELECT ON ingest.settings, ingest.trading_sessions, ingest.alembic_version TO {WRITER};
GRANT EXECUTE ON FUNCTION ingest.ensure_partition(date) TO {WRITER};
"""


def upgrade() -> None:
    """Make both schemas and all tables, for the edition of database that is found."""
    op.execute("CREATE SCHEMA IF NOT EXISTS market")
    op.execute("COMMENT ON SCHEMA market IS 'What analysts see.'")
    op.execute("COMMENT ON SCHEMA ingest IS 'The daemon''s own records.'")
    connection = op.get_bind()
    hypertable = has_timescaledb(connection)
    tables = Path(__file__).with_suffix(".sql").read_text(encoding="utf-8")
    tables = tables.replace("{partitioning}", "" if hypertable else " PARTITION BY RANGE (time)")
    for statement in tables.split(";\n"):
        connection.exec_driver_sql(statement)
    if hypertable:
        # No default index: the unique key serves queries by symbol and time, and chunks bound the rest.
        op.execute(
            "SELECT create_hypertable('market.ticks', by_range('time', INTERVAL '7 days'), "
            "create_default_indexes => false)"
        )
    op.execute(ENSURE_PARTITION)
    op.execute(
        "COMMENT ON FUNCTION ingest.ensure_partition IS "
        "'Makes a monthly partition of market.ticks where there is none. Does nothing on a hypertable.'"
    )
    op.execute("REVOKE EXECUTE ON FUNCTION ingest.ensure_partition(date) FROM PUBLIC")
    grant_writer(connection)


def downgrade() -> None:
    """Drop everything that is ours. The extension and the role may be used by others, so they stay."""
    op.execute("DROP FUNCTION ingest.ensure_partition(date)")
    for table in TABLES:
        op.execute(f"DROP TABLE {table}")
    op.execute("DROP SCHEMA market")


def has_timescaledb(connection: sa.Connection) -> bool:
    """Whether the extension is there, after creating it where it can be created."""
    installed = "SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb')"
    # CREATE EXTENSION ends the connection where the library is not loaded, so its settings are looked for first.
    loaded = (
        "SELECT EXISTS (SELECT FROM pg_available_extensions WHERE name = 'timescaledb') "
        "AND EXISTS (SELECT FROM pg_settings WHERE name LIKE 'timescaledb.%')"
    )
    if connection.scalar(sa.text(installed)):
        return True
    if not connection.scalar(sa.text(loaded)):
        return False
    try:
        with connection.begin_nested():
            connection.execute(sa.text("CREATE EXTENSION timescaledb"))
    except sa.exc.DBAPIError as error:
        log.warning(
            "TimescaleDB is on this server, but this role may not create it (%s): market.ticks gets monthly "
            "partitions. For a hypertable, let a superuser run CREATE EXTENSION timescaledb first.",
            error.orig,
        )
        return False
    return True


def grant_writer(connection: sa.Connection) -> None:
    """Make the role that the daemon's login is a member of; where that is not allowed, say what to run."""
    exists = sa.text("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = :name)")
    try:
        with connection.begin_nested():
            if not connection.scalar(exists, {"name": WRITER}):
                connection.execute(sa.text(f"CREATE ROLE {WRITER} NOLOGIN"))
    except sa.exc.DBAPIError as error:  # roles belong to the whole cluster: another migration may just have made it
        if not connection.scalar(exists, {"name": WRITER}):
            log.warning(
                "The role %s could not be made (%s). The tables' owner can write; for a daemon that owns nothing, "
                "let a superuser run: CREATE ROLE %s NOLOGIN; %s",
                WRITER,
                error.orig,
                WRITER,
                " ".join(GRANTS.split()),
            )
            return
    for statement in GRANTS.strip().splitlines():
        connection.execute(sa.text(statement))
    # Everybody may make temporary tables, unless that was taken away; giving it back needs the database's owner.
    may = sa.text("SELECT has_database_privilege(:name, current_database(), 'TEMPORARY')")
    if not connection.scalar(may, {"name": WRITER}):
        database = connection.scalar(sa.text("SELECT format('%I', current_database())"))
        connection.execute(sa.text(f"GRANT TEMPORARY ON DATABASE {database} TO {WRITER}"))
