"""Programs that some tests drive, and the packages that have them."""

from __future__ import annotations

import os
import shutil

import pytest

ALL_TOOLS = bool(os.environ.get("INGESTOR_TEST_ALL_TOOLS"))
"""Whether nothing may be left out, as in CI."""

LONG = "it takes long, and asks a package registry or many tools: set INGESTOR_TEST_ALL_TOOLS"


def need(command: str, *, package: str) -> str:
    """Return the path of a program. Where it is missing the test is skipped, or fails where all tools must be there."""
    path = shutil.which(command)
    if path is not None:
        return path
    reason = f"there is no {command}: install the package {package}"
    if ALL_TOOLS:
        pytest.fail(reason)
    pytest.skip(reason)
