"""Completion works in the shells themselves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ingestor_in_process
from tests.tools import need

LINES = {
    "re": {"reconcile", "relay", "relay-token", "replay"},
    "--ver": {"--version"},
    "gaps --": {"--since", "--until", "--format", "--output", "--exclude", "--help"},
    "chart --width ": {"1m", "5m", "15m", "1h", "1d"},
    "run --wrong": set(),
}

SCRIPTS = {
    "bash": """
        eval "$(ingestor --completion bash)"
        [[ $(complete -p ingestor) == *-F\\ _ingestor_completion\\ ingestor ]] || exit 9
        ask() {
            read -ra COMP_WORDS <<<"ingestor $1"
            [[ $1 == *' ' ]] && COMP_WORDS+=("")
            COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
            _ingestor_completion ingestor
            echo "$1:${COMPREPLY[*]}"
        }
    """,
    "fish": """
        ingestor --completion fish | source
        function ask
            set found (complete --do-complete "ingestor $argv[1]" | string split --fields 1 \\t)
            echo "$argv[1]:$found"
        end
    """,
}


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_a_shell_completes(shell: str, tmp_path: Path) -> None:
    """The shell completes commands, options and their values after the documented set-up."""
    program = need(shell, package=shell)
    script = SCRIPTS[shell] + "".join(f"\nask '{line}'" for line in LINES)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [program, "-c", script],
        env={"PATH": path, "HOME": str(tmp_path), "TERM": "dumb"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = dict(line.split(":") for line in done.stdout.splitlines())
    assert {line: set(words.split()) for line, words in found.items()} == LINES


def test_only_shells_that_have_a_script() -> None:
    """An unsupported shell is a wrong option; the output is the script alone."""
    status, output, errors = ingestor_in_process("--completion", "sh")
    assert (status, output) == (2, "")
    assert "'bash', 'zsh', 'fish'" in errors
    for shell in ("bash", "zsh", "fish"):
        status, output, errors = ingestor_in_process("--completion", shell)
        assert (status, errors) == (0, "")
        assert "_ingestor_completion" in output or shell == "fish"


def test_zsh_completion(tmp_path: Path) -> None:
    """The completion script for zsh holds one line of code for each word with its help, and nothing else."""
    script = """
        compdef() { completer=$1 }
        _arguments() { print -r -- "$1" }
        eval "$(ingestor --completion zsh)"
        words=(ingestor gaps --s) CURRENT=3
        $completer
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [need("zsh", package="zsh"), "-f", "-c", script],
        env={"PATH": path, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r'\*: :\(\("--since":"First trading day [^"]*Inclusive\."\)\)\n', done.stdout), done.stdout
