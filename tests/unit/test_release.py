"""The checks of `make release` that need no build: each refuses the mistake that it is for."""

from __future__ import annotations

import tomllib
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from ingestor import __version__
from scripts import release
from scripts.release import ReleaseError, changelog_date, check_classifiers, check_contents, released_version

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_version() -> None:
    """The version that is released is the package's."""
    assert released_version() == __version__


def test_the_date_of_a_version() -> None:
    """The newest heading of the change log is the version's, with its date."""
    assert changelog_date("# Changelog\n\n## 1.2.0 - 2026-03-01\n\n## 1.1.0 - 2025-01-01\n", "1.2.0") == date(
        2026, 3, 1
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("## 1.1.0 - 2026-03-01\n", "newest heading"),
        ("## 1.2.0\n", "newest heading"),
        ("## 1.2.0 - 2026-02-30\n", "is no date"),
        ("# Changelog\n\n## Unreleased\n\n## 1.2.0 - 2026-03-01\n", "Unreleased"),
    ],
)
def test_a_changelog_that_is_not_ready(text: str, complaint: str) -> None:
    """A version without a valid date, or beside unreleased entries, is refused."""
    with pytest.raises(ReleaseError, match=complaint):
        changelog_date(text, "1.2.0")


def test_the_promised_versions_are_tested() -> None:
    """The classifiers, requires-python and the sessions of nox name the same versions of Python."""
    check_classifiers(PROJECT)
    fewer = [name for name in PROJECT["classifiers"] if not name.endswith("3.14")]
    for changed in ({"requires-python": ">=3.12"}, {"classifiers": fewer}):
        with pytest.raises(ReleaseError, match="promises"):
            check_classifiers({**PROJECT, **changed})


def test_an_incomplete_sdist(tmp_path: Path) -> None:
    """A tracked file that the sdist lacks, and a file that git does not track, are named."""
    for name in ("PKG-INFO", "kept", "stray"):
        (tmp_path / name).touch()
    with pytest.raises(ReleaseError, match=r"lost, stray\."):
        check_contents(tmp_path, ["kept", "lost", ".ci/run"])
    (tmp_path / "stray").rename(tmp_path / "lost")
    check_contents(tmp_path, ["kept", "lost", ".ci/run"])


def test_a_failed_command() -> None:
    """The message of a failed command has its end status and its output."""
    with pytest.raises(ReleaseError, match=r"(?s)ended with 3:\nso it goes"):
        release.run("sh", "-c", "echo so it goes; exit 3")
