"""Reads the named blocks of `queries.sql`."""

from __future__ import annotations

import re
from importlib.resources import files


def _load() -> dict[str, str]:
    text = files(__package__).joinpath("queries.sql").read_text(encoding="utf-8")
    blocks = re.split(r"^-- name: (\w+)$", text, flags=re.MULTILINE)[1:]
    return {name: _without_comments(body) for name, body in zip(blocks[::2], blocks[1::2], strict=True)}


def _without_comments(body: str) -> str:
    return "\n".join(line for line in body.splitlines() if line and not line.startswith("--"))


QUERIES = _load()
"""The SQL by name."""
