"""The colours of all charts and pages, so that a gap looks the same everywhere."""

from __future__ import annotations

import re
from importlib.resources import files

_COLOUR = re.compile(r"--(\w+): (#[0-9a-f]{3,6})\b")
_VARIABLE = re.compile(r"var\(--(\w+)\)")
_USE = re.compile(r"([\w-]+: ?)([^;{}]*var\(--[^;{}]*)")
_DARK = "@media (prefers-color-scheme: dark)"


def palette() -> str:
    """Return a style sheet of variables, light and dark: `--open` and the other statuses, `--ink`, `--paper`, …."""
    return files(__package__).joinpath("palette.css").read_text(encoding="utf-8")


def colours(*, dark: bool = False) -> dict[str, str]:
    """Return the colours by name, such as `#d92d20`, for a light or a dark screen."""
    light, _, other = palette().partition(_DARK)
    return dict(_COLOUR.findall(light)) | (dict(_COLOUR.findall(other)) if dark else {})


def with_fallbacks(style: str) -> str:
    """Return a style sheet with the light colour before each use of a variable, for renderers without variables."""
    light = colours()

    def both(use: re.Match[str]) -> str:
        return f"{use[1]}{_VARIABLE.sub(lambda name: light[name[1]], use[2])}; {use[0]}"

    return _USE.sub(both, style)
