"""Ticks as they were known at a moment.

Revision 0005, after 0004. Adds only, so a daemon of before goes on.
"""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# The planner puts its query in the place of a call, so conditions on symbol and time use the indexes. Without a result
# type of the table, so that the conversion to a hypertable can replace the table.
TICKS_AS_OF = """
CREATE FUNCTION market.ticks_as_of(moment timestamptz) RETURNS TABLE (
    "time" timestamptz, received_at timestamptz, price double precision, volume bigint, occurrence integer, symbol text
) LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT t.time, t.received_at, t.price, t.volume, t.occurrence, t.symbol
    FROM market.ticks AS t WHERE t.received_at <= moment
$$
"""
COMMENT = """
COMMENT ON FUNCTION market.ticks_as_of IS
'The ticks of market.ticks that had arrived by that moment. Ticks that retention has dropped are not among them.'
"""


def upgrade() -> None:
    """Add the function."""
    op.execute(TICKS_AS_OF)
    op.execute(COMMENT)


def downgrade() -> None:
    """Drop the function."""
    op.execute("DROP FUNCTION market.ticks_as_of(timestamptz)")
