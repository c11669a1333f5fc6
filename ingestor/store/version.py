"""Whether the schema of a database and this version of the program go together."""

from __future__ import annotations

import asyncpg

from ingestor import __version__
from ingestor.errors import SchemaError
from ingestor.store.queries import QUERIES
from ingestor.store.retry import MIGRATE

SCHEMA_REVISION = "0006"
"""The newest migration that this code was written for. Revisions are numbers, so they compare as text."""


async def check_schema(connection: asyncpg.Connection) -> None:
    """Raise SchemaError where this version can't work with what `ingestor migrate` has left in the database."""
    try:
        revision = await connection.fetchval(QUERIES["schema_revision"])
        minimum = await connection.fetchval(QUERIES["minimum_version"]) if revision else None
    except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError) as exc:
        raise no_schema() from exc
    check_revision(revision, minimum)


def no_schema() -> SchemaError:
    """Return the error that says so."""
    return SchemaError("The database has no schema of ingestor yet.", hint=MIGRATE)


def check_revision(revision: str | None, minimum_version: str | None) -> None:
    """Raise SchemaError where this version of the daemon can't write to that revision of the schema.

    A newer schema is accepted, unless it names a higher minimum version of the daemon.
    """
    if revision is None:
        raise no_schema()
    if revision < SCHEMA_REVISION:
        raise SchemaError(
            f"The database's schema is at {revision}, and this version needs {SCHEMA_REVISION}.", hint=MIGRATE
        )
    if minimum_version is not None and _version(minimum_version) > _version(__version__):
        raise SchemaError(
            f"The database's schema needs ingestor {minimum_version} or newer; this is {__version__}.",
            hint="Upgrade ingestor.",
        )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())
