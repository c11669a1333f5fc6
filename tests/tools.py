"""External programs that some tests need, and the packages that have them."""

from __future__ import annotations

import os
import shutil

import pytest

ALL_TOOLS = bool(os.environ.get("INGESTOR_TEST_ALL_TOOLS"))
"""Whether a missing program fails its tests, as in CI."""

LONG = "slow, needs a package registry or many tools: set INGESTOR_TEST_ALL_TOOLS"


def need(command: str, *, package: str) -> str:
    """Return the path of a program. If it is missing, skip the test, or fail if `ALL_TOOLS`."""
    path = shutil.which(command)
    if path is not None:
        return path
    reason = f"{command} is missing: install the package {package}"
    if ALL_TOOLS:
        pytest.fail(reason)
    pytest.skip(reason)
