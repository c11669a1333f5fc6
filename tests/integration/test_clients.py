"""pandas, Polars by both of its engines, and DuckDB over Arrow read every public column with its values and type."""

from __future__ import annotations

import asyncio
import datetime as dt
import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest

from ingestor.admin.maintenance import maintain
from ingestor.settings import load_settings
from ingestor.store.connect import connect, driver_url
from tests.bars import insert
from tests.examples import FRIDAY, MINUTE, SECOND, seed
from tests.integration.test_public_types import EXCEPTIONS
from tests.servers import query
from tests.sessions import execute
from tests.tools import ALL_TOOLS

pytestmark = pytest.mark.usefixtures("bundled_calendar")

MOST_ROWS = 300
"""Rows that are compared of each relation."""

RELATIONS = """
SELECT relname FROM pg_class WHERE relnamespace = 'market'::regnamespace AND relkind IN ('r', 'v', 'm', 'p', 'f')
  AND NOT relispartition
"""
FUNCTIONS = """
SELECT proname FROM pg_proc WHERE pronamespace = 'market'::regnamespace AND (proretset OR prokind = 'a')
"""
_BY_SYMBOL = "(SELECT symbol, market.{}(price, time, received_at, occurrence) FROM market.ticks GROUP BY symbol)"
CALLS = {
    "ticks_as_of": f"market.ticks_as_of('{FRIDAY + 60 * MINUTE}')",
    "bars_1m_as_of": f"market.bars_1m_as_of('{FRIDAY + 60 * MINUTE}')",
    "open_price": _BY_SYMBOL.format("open_price"),
    "close_price": _BY_SYMBOL.format("close_price"),
}
"""How to call each public function that returns rows or is an aggregate."""

INSTEAD = {"uuid": '"{}"::text AS "{}"', "interval": 'extract(epoch FROM "{}")::float8 AS "{}"'}
"""The expressions of docs/analysts.md for the columns that some clients cannot read."""

Column = tuple[str, list[Any]]
"""A column's type in the client's words, and its values as Python's."""


def library(name: str) -> Any:
    """Import a library. If it is missing, skip the test, or fail if `ALL_TOOLS`."""
    return importlib.import_module(name) if ALL_TOOLS else pytest.importorskip(name)


def pandas(url: str, sql: str) -> dict[str, Column]:
    """Read with pandas, through SQLAlchemy and psycopg."""
    sqlalchemy = library("sqlalchemy")
    engine = sqlalchemy.create_engine(url.replace("postgresql://", "postgresql+psycopg://", 1))
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("SET TIME ZONE 'UTC'"))
        frame = library("pandas").read_sql_query(sqlalchemy.text(sql), connection)
    engine.dispose()
    return {name: (str(frame[name].dtype), [_plain(each) for each in frame[name].tolist()]) for name in frame}


def _plain(value: Any) -> Any:
    """Return a value of pandas as Python's: its missing values are None, and its times have no nanoseconds."""
    if value is None or (isinstance(value, float) and math.isnan(value)) or type(value).__name__ == "NaTType":
        return None
    return value.to_pydatetime() if hasattr(value, "to_pydatetime") else value


def polars_adbc(url: str, sql: str) -> dict[str, Column]:
    library("adbc_driver_postgresql")
    return _polars(url, sql, "adbc")


def polars_connectorx(url: str, sql: str) -> dict[str, Column]:
    library("connectorx")
    return _polars(url, sql, "connectorx")


def _polars(url: str, sql: str, engine: Any) -> dict[str, Column]:
    frame = library("polars").read_database_uri(sql, url, engine=engine)
    return {column.name: (str(column.dtype), column.to_list()) for column in frame.iter_columns()}


def duckdb(url: str, sql: str) -> dict[str, Column]:
    """Read the Arrow table of ADBC, and query it with DuckDB."""
    dbapi, duckdb = library("adbc_driver_postgresql.dbapi"), library("duckdb")
    with dbapi.connect(url) as connection, connection.cursor() as cursor:
        cursor.execute(sql)
        rows = cursor.fetch_arrow_table()
    with duckdb.connect() as memory:
        memory.execute("SET TimeZone = 'UTC'")
        memory.register("rows", rows)
        memory.execute("SELECT * FROM rows")
        names = [(each[0], str(each[1])) for each in memory.description]
        values = list(zip(*memory.fetchall(), strict=True))
    return {name: (kind, list(column)) for (name, kind), column in zip(names, values, strict=True)}


Client = Callable[[str, str], dict[str, Column]]

TYPES: dict[Client, dict[str, set[str]]] = {
    pandas: {
        "timestamptz": {"datetime64[us, UTC]", "datetime64[ns, UTC]"},
        "float8": {"float64"},
        "int8": {"int64"},
        "int4": {"int64"},
        "text": {"str", "object"},
        "bool": {"bool", "object"},  # an object if one is missing
        "date": {"object"},
    },
    polars_adbc: {
        "timestamptz": {"Datetime(time_unit='us', time_zone='UTC')"},
        "float8": {"Float64"},
        "int8": {"Int64"},
        "int4": {"Int32"},
        "text": {"String"},
        "bool": {"Boolean"},
        "date": {"Date"},
    },
    duckdb: {
        "timestamptz": {"TIMESTAMP WITH TIME ZONE"},
        "float8": {"DOUBLE"},
        "int8": {"BIGINT"},
        "int4": {"INTEGER"},
        "text": {"VARCHAR"},
        "bool": {"BOOLEAN"},
        "date": {"DATE"},
    },
}
TYPES[polars_connectorx] = {**TYPES[polars_adbc], "int4": {"Int32", "Int64"}}


async def fill(database: str) -> None:
    """Store rows in every public relation: the market of the examples, with a missing value in each nullable column."""
    await seed(database)
    await insert(database, [(FRIDAY + n * SECOND, FRIDAY + n * SECOND, 1.25, 0, 1, "ZERO.NZ") for n in (1, 2)])
    await execute(database, "INSERT INTO market.instruments (symbol, exchange) VALUES ('ZERO.NZ', 'nzx')")
    await execute(
        database,
        "UPDATE market.instruments SET uuid = gen_random_uuid(), first_seen = $1, last_seen = $2 WHERE symbol < 'M'",
        *(FRIDAY, FRIDAY + 1234567 * SECOND / 1e6),
    )
    await maintain(load_settings(database_url=database), lambda _: None)


async def expected(url: str, source: str) -> tuple[str, dict[str, Column]]:
    """Return a query on a source, and its columns by the daemon's driver: type and values."""
    connection = await connect(url)
    described = (await connection.prepare(f"SELECT * FROM {source} AS source")).get_attributes()
    columns = [INSTEAD.get(each.type.name, '"{}"').format(each.name, each.name) for each in described]
    # The rows with missing values come first.
    order = ", ".join(f"{place} NULLS FIRST" for place in range(1, len(columns) + 1))
    missing = " + ".join(f'("{each.name}" IS NULL)::int' for each in described)
    sql = f"SELECT {', '.join(columns)} FROM {source} AS source ORDER BY {missing} DESC, {order} LIMIT {MOST_ROWS}"
    statement = await connection.prepare(sql)
    rows = await statement.fetch()
    kinds = [each.type.name for each in statement.get_attributes()]
    names = [each.name for each in statement.get_attributes()]
    await connection.close()
    assert rows, source
    return sql, {
        name: (kind, [row[place] for row in rows]) for place, (name, kind) in enumerate(zip(names, kinds, strict=True))
    }


async def test_every_client_reads_every_public_column(database: str) -> None:
    """Each client returns the values and types of every public relation and function, missing values included."""
    await fill(database)
    relations = [name for (name,) in await query(database, RELATIONS)]
    assert {name for (name,) in await query(database, FUNCTIONS)} == set(CALLS)
    missing = set()
    for name, source in {**{each: f"market.{each}" for each in relations}, **CALLS}.items():
        sql, columns = await expected(database, source)
        missing |= {(name, column) for column, (_, values) in columns.items() if None in values}
        for client, types in TYPES.items():
            found = await asyncio.to_thread(client, driver_url(database), sql)
            where = f"{client.__name__} of {name}"
            assert list(found) == list(columns), where
            for column, (kind, values) in columns.items():
                assert_column(found[column], kind, values, types, f"{where}.{column}")
    assert {("ohlcv_1m", "vwap"), *(("instruments", each) for each in ("active", "first_seen", "industry"))} <= missing
    assert {(name, column) for name, column in EXCEPTIONS} <= {
        (name, column) for name in relations for column in (await expected(database, f"market.{name}"))[1]
    }


def assert_column(found: Column, kind: str, values: list[Any], types: dict[str, set[str]], where: str) -> None:
    """Compare a client's column with the values of the daemon's driver."""
    found_kind, found_values = found
    if any(value is not None for value in values):  # a client cannot know the type of nothing
        allowed = types[kind] | ({"float64"} if kind in {"int4", "int8"} and None in values else set())
        assert found_kind in allowed, where
    assert found_values == values, where
    for value in found_values:
        assert not isinstance(value, float) or math.isfinite(value), where
        if isinstance(value, dt.datetime):
            assert value.utcoffset() == dt.timedelta(0), where
