"""Runs the command line in processes of its own."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import subprocess
import sys
from unittest.mock import patch

from ingestor import cli


async def ingestor(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Run a command in a process of its own; return its status, output and error output."""
    process = await start(*arguments, **environment)
    output, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


async def start(*arguments: str, **environment: str) -> asyncio.subprocess.Process:
    variables = environment_with(**{f"INGESTOR_{name}": value for name, value in environment.items()})
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "ingestor",
        *arguments,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def environment_with(**variables: str) -> dict[str, str]:
    """Return this process's environment and `variables`, without those of the tests: the daemon warns of them."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("INGESTOR_TEST_")}
    return inherited | variables


def ingestor_in_process(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Run a command within this process, for tests of many; return the same. `environment` is added unchanged."""
    output, errors = io.StringIO(), io.StringIO()
    with (
        patch.dict(os.environ, environment),
        patch.object(sys, "argv", ["ingestor", *arguments]),
        patch.object(cli, "redact_tracebacks"),
        # Until the command sets up its log: library messages belong to an earlier test, whose output is closed.
        patch.object(logging.root, "handlers", [logging.NullHandler()]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            cli.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0
        else:
            status = 0
        finally:
            logging.captureWarnings(capture=False)  # restores what `configure` has changed in this process
    return status, output.getvalue(), errors.getvalue()
