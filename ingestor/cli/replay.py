"""`ingestor replay`: store recorded messages."""

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
            help="File with one message (a JSON object) a line, as the stream sends it; plain or .gz.",
            exists=True,
            dir_okay=False,
            readable=True,
        ),
    ],
) -> None:
    """Process recorded messages like those of the stream, at full speed.

    A replay can be repeated: ticks that the database already has are not added again. Messages that are no valid tick
    are kept with their reason in `ingest.rejected_messages`. A replay never counts as coverage.
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
