"""Times and durations on the command line."""

from __future__ import annotations

from datetime import date, datetime
from typing import Annotated

import typer

from ingestor.redaction import outside_text
from ingestor.settings import parse_duration
from ingestor.store.gaps import Bounds

Since = Annotated[
    str | None,
    typer.Option(
        metavar="<day|instant>",
        help="First trading day (2026-11-20), or an instant with its offset. Inclusive.",
    ),
]
Until = Annotated[
    str | None, typer.Option(metavar="<day|instant>", help="End: a trading day or an instant. Exclusive.")
]


def bounds(since: str | None, until: str | None) -> Bounds:
    """Parse `--since` and `--until`. Raises BadParameter."""
    first = None if since is None else moment(since, "--since")
    last = None if until is None else moment(until, "--until")
    if first is not None and last is not None and _comes_after(first, last):
        raise typer.BadParameter("--since must be before --until", param_hint="--since")
    return Bounds(first, last)


def moment(text: str, option: str) -> date | datetime:
    """Parse a trading day, or an instant with its offset. Raises BadParameter."""
    try:
        is_day = len(text) == len("2026-11-20")
        found = date.fromisoformat(text) if is_day else datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither a day (2026-11-20) nor an instant (2026-11-20T10:00:00+13:00)", param_hint=option
        ) from None
    if not 1990 <= found.year <= 2200:
        raise typer.BadParameter(f"{text!r} is out of range: 1990 to 2200", param_hint=option)
    if isinstance(found, datetime) and found.tzinfo is None:
        raise typer.BadParameter(f"{text!r} has no offset, such as +13:00 or Z", param_hint=option)
    return found


def in_seconds(text: str, option: str, *, least: float = 0.0) -> float:
    """Parse a duration and return seconds. Raises BadParameter."""
    try:
        found = parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(outside_text(error), param_hint=option) from None
    if found < least:
        raise typer.BadParameter(f"must be at least {least:g}s", param_hint=option)
    return found


def _comes_after(first: date | datetime, last: date | datetime) -> bool:
    """Return whether two bounds of the same kind are in the wrong order. A day and an instant are not compared."""
    if isinstance(first, datetime) and isinstance(last, datetime):
        return first >= last
    return not isinstance(first, datetime) and not isinstance(last, datetime) and first >= last
