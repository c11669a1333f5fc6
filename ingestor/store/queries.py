"""Reads the named blocks of the `.sql` files beside it."""

from __future__ import annotations

import re
from importlib.resources import files


def _load() -> dict[str, str]:
    queries: dict[str, str] = {}
    for name in ("queries.sql", "gaps.sql", "relay.sql"):
        text = files(__package__).joinpath(name).read_text(encoding="utf-8")
        blocks = re.split(r"^-- name: (\w+)$", text, flags=re.MULTILINE)[1:]
        queries |= {name: _without_comments(body) for name, body in zip(blocks[::2], blocks[1::2], strict=True)}
    return queries


def _without_comments(body: str) -> str:
    return "\n".join(line for line in body.splitlines() if line and not line.startswith("--"))


QUERIES = _load()
"""The SQL by name."""
