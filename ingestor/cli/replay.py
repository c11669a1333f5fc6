"""`ingestor replay`: recorded messages into the database."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from ingestor.service.replay import replay as replay_file
from ingestor.settings import load_settings
from ingestor.telemetry.log import configure


def replay(
    file: Annotated[
        Path,
        typer.Argument(
            help="Messages as the stream sends them, one JSON object a line; plain, or compressed as .gz.",
            exists=True,
            dir_okay=False,
            readable=True,
        ),
    ],
) -> None:
    """Feed recorded messages through the same way as the stream's, as fast as they go.

    Ticks that are in the database already are not added again, so a replay can be repeated. What can't be read as
    a tick is kept with its reason in `ingest.rejected_messages`. A replay never counts as coverage.
    Needs **INGESTOR_DATABASE_URL**.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from ingestor.cli._output import Console

    settings = load_settings()
    settings.require("database_url")
    configure(settings.log_level, settings.log_format)
    console = Console(stderr=True)
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(file.name, total=file.stat().st_size)
        counts = asyncio.run(replay_file(file, settings, progress=lambda done: bar.update(task, completed=done)))
    new = counts.ticks_written - counts.duplicates
    rejected = sum(counts.rejected.values())
    print(f"{counts.messages:,} messages: {new:,} ticks new, {counts.duplicates:,} were there already, ", end="")
    print(f"{rejected:,} rejected.")
    for reason, count in counts.rejected.most_common():
        print(f"  {reason}: {count:,}")
