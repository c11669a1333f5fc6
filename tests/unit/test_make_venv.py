"""The script that makes the environment says what it does: people wait for it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/make-venv"
LOCK = "one==1.0 \\\n    --hash=sha256:00\ntwo==2.0 ; python_version < '3.12' \\\n    --hash=sha256:00\n"


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Return a directory with what the script needs of the system, and no Python."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name in ("sh", "grep", "date", "mkdir", "awk", "ln", "cat"):
        (directory / name).symlink_to(shutil.which(name) or "/missing")
    (tmp_path / "some.lock").write_text(LOCK, encoding="ascii")
    return directory


def stub(programs: Path, name: str, *, status: int = 0) -> None:
    """Add a program that records its arguments."""
    file = programs / name
    file.write_text(f'#!/bin/sh\necho "$@" >>{programs.parent}/asked\nexit {status}\n', encoding="ascii")
    file.chmod(0o755)


def stub_python(programs: Path, *, said: str, status: int = 0) -> None:
    """Add a Python whose environments have a pip that prints `said` for the lock and ends with `status`."""
    pip = programs.parent / "pip"
    pip.write_text(
        f'#!/bin/sh\necho "$@" >>{programs.parent}/asked\n'
        f'case "$*" in *--require-hashes*) cat {programs.parent}/said; exit {status};; esac\n',
        encoding="ascii",
    )
    pip.chmod(0o755)
    (programs.parent / "said").write_text(said, encoding="ascii")
    python = programs / "python3"
    python.write_text(
        '#!/bin/sh\ncase "$1" in\n--version) echo Python 3.99 ;;\n'
        f"-m) mkdir -p env/bin && ln -s {pip} env/bin/python ;;\nesac\n",
        encoding="ascii",
    )
    python.chmod(0o755)


def make(programs: Path, *arguments: str, **environment: str) -> tuple[int, list[str]]:
    """Run the script; return its status and the lines of its error output."""
    done = subprocess.run(
        [programs / "sh", SCRIPT, "env", "some.lock", *arguments],
        env={"PATH": str(programs), **environment},
        cwd=programs.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()


def test_what_it_says_with_uv(programs: Path) -> None:
    """It names the directory, the number of packages, the lock, the installer, and how long it took."""
    stub(programs, "uv")
    status, (first, second, last) = make(programs)
    assert status == 0
    assert first == "Preparing env (first use, or the locked versions changed): 2 packages of some.lock, by uv."
    assert second == "That takes a minute or two without a cache …"
    assert re.fullmatch(r"env is ready after \d+ s\.", last)
    asked = (programs.parent / "asked").read_text(encoding="ascii").splitlines()
    assert [line.split()[0] for line in asked] == ["venv", "pip", "pip"]
    assert "--require-hashes -r some.lock" in asked[1]


def test_a_failed_installation(programs: Path) -> None:
    """A failure of the installer is the script's, and nothing is called ready."""
    stub(programs, "uv", status=2)
    status, lines = make(programs)
    assert status == 2
    assert not any("is ready" in line for line in lines)


def test_packages_only_with_uv(programs: Path) -> None:
    """The demo's environment holds packages only, since its command runs from the checkout."""
    stub(programs, "uv")
    status, lines = make(programs, "packages-only")
    assert status == 0
    assert len(lines) == 2
    asked = (programs.parent / "asked").read_text(encoding="ascii").splitlines()
    assert [line.split()[0] for line in asked] == ["venv", "pip"]


def test_progress_with_pip(programs: Path) -> None:
    """Pip's output becomes a count of packages: people wait for it. Its warnings are left out."""
    said = "".join(f"Collecting some{number}==1.0 (from -r some.lock)\nWARNING: slow\n" for number in range(1, 12))
    stub_python(programs, said=f"{said}Installing collected packages: some1, some2\n")
    status, lines = make(programs)
    assert status == 0
    assert [" ".join(line.split()) for line in lines[2:4]] == [
        "10 of up to 2 packages: some10==1.0",
        "Installing 11 packages …",
    ]
    assert lines[0].endswith("by pip of Python 3.99.")
    assert lines[4].startswith("env is ready")
    asked = (programs.parent / "asked").read_text(encoding="ascii").splitlines()
    assert "--require-hashes -r some.lock" in asked[0]
    assert asked[1].endswith("--no-deps --no-build-isolation -e .")


def test_a_failure_of_pip(programs: Path) -> None:
    """Pip's errors are shown, and its status is the script's."""
    stub_python(programs, said="Collecting one==1.0\nERROR: no such hash\n    Expected sha256\n", status=3)
    status, lines = make(programs)
    assert status == 3
    assert lines[2:] == ["ERROR: no such hash", "    Expected sha256"]


def test_no_python(programs: Path) -> None:
    """Without uv and a suitable Python the script says which it needs, and how to name one."""
    stub(programs, "python3", status=1)  # an old one: the question for its version fails
    status, (line,) = make(programs)
    assert status == 1
    assert line == "No Python 3.11 or newer was found. Install one, or name it: make PYTHON=/path/to/python3.12"
