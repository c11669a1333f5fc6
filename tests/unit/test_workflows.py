"""The files that others' CI reads agree with the project's own: actionlint knows their form, not their meaning."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yaml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
CI_SCRIPT = ROOT / ".ci/run"


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def jobs() -> dict[str, Any]:
    """Return the jobs of all workflows."""
    return {name: job for path in WORKFLOWS for name, job in load(path)["jobs"].items()}


def commands(job: dict[str, Any]) -> str:
    """Return what a job runs, its matrix included."""
    ran = [step.get("run", "") for step in job["steps"]]
    ran += [each.get("run", "") for each in job.get("strategy", {}).get("matrix", {}).get("include", [])]
    return "\n".join(ran)


def targets(text: str) -> set[str]:
    """Return the targets of `make` that a script names."""
    return set(re.findall(r"\bmake ([a-z-]+)", re.sub(r"^\s*#.*", "", text, flags=re.MULTILINE)))


@pytest.mark.parametrize("name", sorted(jobs()))
def test_each_job_runs_commands_that_exist(name: str) -> None:
    """A job runs targets of the Makefile, has a time limit, and sets up the Python that it names."""
    job = jobs()[name]
    named = targets(commands(job))
    assert named
    for target in named:
        assert re.search(rf"^{target}: ", MAKEFILE, re.MULTILINE), target
    assert job["timeout-minutes"] <= 45
    assert any("setup-python" in step.get("uses", "") for step in job["steps"])


def test_each_promised_python_is_tested() -> None:
    """The matrix has the versions of noxfile.py; the oldest one runs all other jobs."""
    promised = re.findall(r'"(3\.\d+)"', re.findall(r"PYTHONS = .*", (ROOT / "noxfile.py").read_text())[0])
    assert jobs()["test"]["strategy"]["matrix"]["python"] == promised
    for name in jobs().keys() - {"test"}:
        (setup,) = (step for step in jobs()[name]["steps"] if "setup-python" in step.get("uses", ""))
        assert setup["with"]["python-version"] == promised[0]


@pytest.mark.skipif(not CI_SCRIPT.exists(), reason="an sdist has no CI of its own")
def test_others_run_the_same() -> None:
    """The workflows run every target that our own CI runs."""
    assert targets(CI_SCRIPT.read_text(encoding="utf-8")) <= targets("\n".join(map(commands, jobs().values())))


def test_the_hook_is_make_lint() -> None:
    """A commit is checked by the command that CI uses."""
    (repository,) = load(ROOT / ".pre-commit-config.yaml")["repos"]
    assert [hook["entry"] for hook in repository["hooks"]] == ["make lint"]


def test_dependabot_looks_at_folders_that_exist() -> None:
    """Each folder that Dependabot reads is there."""
    for update in load(ROOT / ".github/dependabot.yml")["updates"]:
        assert (ROOT / update["directory"].lstrip("/")).is_dir()


def test_no_command_has_an_unfinished_quote() -> None:
    """Each command of the trials is a shell's: they are words in a matrix, which actionlint does not read."""
    for each in jobs()["trials"]["strategy"]["matrix"]["include"]:
        assert shlex.split(each["run"])
