"""Every client can read the types of the public columns."""

from __future__ import annotations

from tests.servers import query

COLUMNS = """
SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod)
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
WHERE c.relnamespace = 'market'::regnamespace AND c.relkind IN ('r', 'v', 'm', 'p') AND NOT c.relispartition
  AND a.attnum > 0 AND NOT a.attisdropped
"""

UNIVERSAL_TYPES = {
    "bigint",
    "boolean",
    "date",
    "double precision",
    "integer",
    "text",
    "timestamp with time zone",
}
"""Types that pandas, Polars (ADBC, connectorx), DuckDB over Arrow and Grafana read without loss."""

EXCEPTIONS = {
    ("gaps", "duration"): "interval",  # the column of seconds stands beside it
    ("bars", "resolution"): "interval",  # part of the key; market.bars_1m has none
    ("instruments", "uuid"): "uuid",  # no client fails on it; Polars over ADBC shows its bytes
}
"""Columns that docs/analysts.md warns of."""


async def test_every_client_reads_the_public_columns(database: str) -> None:
    """Each public column has a type that every client reads, except for the documented ones."""
    columns = {(relation, column): kind for relation, column, kind in await query(database, COLUMNS)}
    assert {column: kind for column, kind in columns.items() if kind not in UNIVERSAL_TYPES} == EXCEPTIONS
    assert columns["gaps", "seconds"] == "double precision"
