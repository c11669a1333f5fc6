"""Coverage: gaps and coverage in SQL, exclusions, reconciliations.

Revision 0002, after 0001. Adds only, so a daemon of before goes on.
"""

from __future__ import annotations

import logging
from pathlib import Path

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

log = logging.getLogger("ingestor.migrations")

WRITER = "market_write"

VIEWS = (
    "ingest.fully_covered",
    "ingest.uncertain_spans",
    "market.coverage",
    "market.gaps",
    "ingest.gap_parts",
    "ingest.covered",
    "ingest.trading_time",
)
"""The views, each before those that it reads."""

GRANTS = f"""
GRANT SELECT ON {", ".join(VIEWS)} TO {WRITER};
GRANT SELECT, INSERT, UPDATE, DELETE ON market.bars, market.instruments, ingest.backfills, ingest.exclusions,
    ingest.reconciliations TO {WRITER};
GRANT UPDATE (bar_label) ON ingest.settings TO {WRITER};
"""


def upgrade() -> None:
    """Add the tables and views, and let the writer use them where that role exists."""
    connection = op.get_bind()
    here = Path(__file__)
    for name in (here.with_suffix(".sql"), here.with_name("0002_coverage_views.sql")):
        for statement in name.read_text(encoding="utf-8").split(";\n"):
            if statement.strip():
                connection.exec_driver_sql(statement)
    if connection.scalar(sa.text("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = :name)"), {"name": WRITER}):
        for statement in GRANTS.strip().split(";\n"):
            connection.exec_driver_sql(statement.rstrip(";"))
    else:
        log.warning("There is no role %s. When it is made, it needs in addition: %s", WRITER, " ".join(GRANTS.split()))


def downgrade() -> None:
    """Take away what was added."""
    for view in VIEWS:
        op.execute(f"DROP VIEW {view}")
    op.execute("DROP FUNCTION ingest.cause(text), ingest.is_alive(timestamptz, timestamptz)")
    op.execute("ALTER TABLE ingest.backfills DROP CONSTRAINT backfills_status_check")
    op.execute("DROP INDEX ingest.backfills_pending_idx, ingest.backfills_whole_idx")
    op.execute("ALTER TABLE ingest.backfills DROP COLUMN next_attempt_at")
    op.execute("ALTER TABLE ingest.settings DROP COLUMN bar_label")
    op.execute("DROP TABLE ingest.reconciliations, ingest.exclusions")
