"""How people write spans of time on the command line."""

from __future__ import annotations

from datetime import date, datetime
from typing import Annotated

import typer

from ingestor.store.ledger import Bounds

Since = Annotated[
    str | None,
    typer.Option(help="From this trading day on (2026-11-20), or this instant with its offset. Inclusive."),
]
Until = Annotated[str | None, typer.Option(help="Until this trading day, or this instant. Exclusive.")]


def bounds(since: str | None, until: str | None) -> Bounds:
    """Return what `--since` and `--until` say."""
    return Bounds(
        None if since is None else moment(since, "--since"), None if until is None else moment(until, "--until")
    )


def moment(text: str, option: str) -> date | datetime:
    """Read a trading day, or an instant with its offset."""
    try:
        if len(text) == len("2026-11-20"):
            return date.fromisoformat(text)
        instant = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither a day (2026-11-20) nor an instant (2026-11-20T10:00:00+13:00)", param_hint=option
        ) from None
    if instant.tzinfo is None:
        raise typer.BadParameter(f"{text!r} has no offset, such as +13:00 or Z", param_hint=option)
    return instant
