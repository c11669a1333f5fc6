"""The command line, as processes of their own."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys


async def ingestor(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Run a command as a process of its own; return its status, output and error output."""
    process = await start(*arguments, **environment)
    output, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


async def start(*arguments: str, **environment: str) -> asyncio.subprocess.Process:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("INGESTOR_TEST_")}
    variables.update({f"INGESTOR_{name}": value for name, value in environment.items()})
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "ingestor",
        *arguments,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
