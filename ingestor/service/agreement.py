"""Compares the environment with what the views in the database were told."""

from __future__ import annotations

from datetime import timedelta

from ingestor.settings import SHARED, Settings, variable
from ingestor.store.inspect import SchemaFacts


def differences(settings: Settings, facts: SchemaFacts) -> list[str]:
    """Return a sentence for each setting that the database has otherwise. Durations are in seconds."""
    found: list[str] = []
    for column, name in SHARED.items():
        ours, theirs = getattr(settings, name), getattr(facts, column)
        if isinstance(theirs, timedelta):
            theirs = theirs.total_seconds()
        if ours != theirs:
            found.append(f"{variable(name)} is {ours} here and {theirs} in the database")
    return found
