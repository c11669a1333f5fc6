"""The colours of everything that is drawn for a browser, so that a gap looks the same wherever it is shown."""

from __future__ import annotations

from importlib.resources import files


def palette() -> str:
    """Return a style sheet of variables, for light and dark: `--open` and the other statuses, `--ink`, `--paper`, …."""
    return files(__package__).joinpath("palette.css").read_text(encoding="utf-8")
