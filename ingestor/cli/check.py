"""`ingestor check`: check that `ingestor run` can work."""

from __future__ import annotations

import asyncio

import typer

from ingestor.errors import EXIT_CONFIGURATION
from ingestor.redaction import redact
from ingestor.settings import Settings, load_settings


def check() -> None:
    """Check settings, token, endpoint, REST API, disk, buffer and database, and print what to do about each problem.

    The command sends the token to the REST API only. It changes nothing, except that it makes the directory of
    **INGESTOR_SPOOL_DIR**. Exit status: 0 `ingestor run` can work, 78 it cannot.
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
