"""Compares the environment with what the views in the database were told."""

from __future__ import annotations

from ingestor.settings import Settings, variable
from ingestor.store.inspect import SchemaFacts


def differences(settings: Settings, facts: SchemaFacts) -> list[str]:
    """Return a sentence for each setting that the database has otherwise. Durations are in seconds."""
    theirs = {
        "exchange_calendar": facts.calendar,
        "exchange_timezone": facts.exchange_timezone,
        "coverage_lead": facts.coverage_lead.total_seconds(),
        "coverage_tail": facts.coverage_tail.total_seconds(),
        "coverage_margin": facts.coverage_margin.total_seconds(),
        "stall_timeout": facts.stall_timeout.total_seconds(),
    }
    return [
        f"{variable(name)} is {getattr(settings, name)} here and {value} in the database"
        for name, value in theirs.items()
        if getattr(settings, name) != value
    ]
