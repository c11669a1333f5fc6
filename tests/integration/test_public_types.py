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

GRAFANA_TYPES = {
    "bigint",
    "boolean",
    "date",
    "double precision",
    "integer",
    "json",
    "jsonb",
    "numeric",
    "real",
    "smallint",
    "timestamp with time zone",
    "timestamp without time zone",
}
"""Types for which Grafana's PostgreSQL data source has a field of its own: `getFieldTypesFromDescriptions` in
pkg/tsdb/grafana-postgresql-datasource/sqleng/sql_engine_pgx.go of github.com/grafana/grafana (commit 0f630cbe). It
shows every other type that pgx knows, `text` included, as a string, and fails on types that pgx does not know."""

GRAFANA_STRINGS = {"text"}
"""The types whose values are to be strings there."""

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


async def test_grafana_converts_the_public_columns(database: str) -> None:
    """Grafana converts each public column to a field of its type, and the exceptions to strings."""
    for relation, column, kind in await query(database, COLUMNS):
        assert kind in GRAFANA_TYPES | GRAFANA_STRINGS or EXCEPTIONS[relation, column] in {"interval", "uuid"}
