"""`ingestor check`: tells whether everything is in place."""

from __future__ import annotations

import asyncio

import typer

from ingestor.errors import EXIT_CONFIGURATION
from ingestor.redaction import redact
from ingestor.settings import Settings, load_settings


def check() -> None:
    """Look at settings, token, endpoint, REST API, disk and database: each is ok, or it says what to do.

    The token is sent to the REST API only, and nothing is changed but that the directory of
    **INGESTOR_SPOOL_DIR** is made. Ends with 0 when `ingestor run` can do its work, else with 78.
    """
    settings = load_settings()
    if not asyncio.run(_check(settings)):
        raise typer.Exit(EXIT_CONFIGURATION)


async def _check(settings: Settings) -> bool:
    from rich.text import Text

    from ingestor.cli._output import Console
    from ingestor.service.checks import Severity, check

    styles = {Severity.OK: "green", Severity.WARNING: "yellow", Severity.PROBLEM: "bold red"}
    console = Console(soft_wrap=True, highlight=False)
    fine = True
    async for finding in check(settings):
        fine = fine and finding.severity is not Severity.PROBLEM
        console.print(
            Text(f"{finding.severity.value:8}", styles[finding.severity]),
            Text(f"{finding.check:10} {redact(finding.text)}"),
        )
    return fine
