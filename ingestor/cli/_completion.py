"""`--completion`: print a script that completes commands, options and their values in a shell.

The library's own options guess the shell and edit its start-up files, and in zsh also unrelated settings. This option
prints the script, and the user installs it.
"""

from __future__ import annotations

import os
from enum import StrEnum

import typer

from ingestor.cli._output import flush_output

PROGRAM = "ingestor"
VARIABLE = "_INGESTOR_COMPLETE"
"""The variable through which the script requests completions. The library reads it."""


class Shell(StrEnum):
    """The shells that have a script."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def show_completion(shell: Shell | None) -> None:
    """Print the script, and end."""
    if shell is None:
        return
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    print(get_completion_script(prog_name=PROGRAM, complete_var=VARIABLE, shell=shell))
    flush_output()
    raise typer.Exit


def prepare_completion() -> None:
    """Register the shells with the library if a completion script asks; the library does so for its own options only.

    A word and its help are one line of the answer, so lines must not be wrapped.
    """
    if VARIABLE in os.environ:
        os.environ["COLUMNS"] = "10000"
        from typer.completion import completion_init  # type: ignore[attr-defined]

        completion_init()
