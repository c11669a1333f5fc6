"""`--completion`: a script by which a shell completes commands, options and their values.

The library has options of its own for this. They guess the shell, edit its start-up files and, of zsh, settings that
are not ours; so this prints the script, and the user decides where it goes.
"""

from __future__ import annotations

import os
from enum import StrEnum

import typer

from ingestor.cli._output import flush_output

PROGRAM = "ingestor"
VARIABLE = "_INGESTOR_COMPLETE"
"""By which the script asks for words. The library reads it."""


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
    """Let the library know the shells, if a script asks: it does so by itself with its own options only.

    A word and its help are one line of the answer, so nothing may be wrapped.
    """
    if VARIABLE in os.environ:
        os.environ["COLUMNS"] = "10000"
        from typer.completion import completion_init  # type: ignore[attr-defined]

        completion_init()
