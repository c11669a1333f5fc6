"""`ingestor check`: tells whether everything is in place."""

from __future__ import annotations

import asyncio

import typer

from ingestor import settings as configuration
from ingestor.errors import EXIT_CONFIGURATION
from ingestor.redaction import redact


def check() -> None:
    """Look at settings, token, endpoint, REST API, disk and database: each is ok, or it says what to do.

    The token is sent to the REST API only, and nothing is changed but that the directory of
    **INGESTOR_SPOOL_DIR** is made. Ends with 0 when `ingestor run` can do its work, else with 78.
    """
    settings = configuration.load()
    if not asyncio.run(_check(settings)):
        raise typer.Exit(EXIT_CONFIGURATION)


async def _check(settings: configuration.Settings) -> bool:
    from rich.text import Text

    from ingestor.cli._output import Console
    from ingestor.service.check import Verdict, check

    styles = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.PROBLEM: "bold red"}
    console = Console(soft_wrap=True, highlight=False)
    fine = True
    async for finding in check(settings):
        fine = fine and finding.verdict is not Verdict.PROBLEM
        console.print(
            Text(f"{finding.verdict.value:8}", styles[finding.verdict]),
            Text(f"{finding.check:10} {redact(finding.text)}"),
        )
    return fine
