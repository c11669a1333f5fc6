"""Checks that a version can be released, builds it into `dist/`, and lists the steps of a person: `make release`.

With `--unreleased` (`make package`) it only builds and tries the packages, of any commit. Each check prints a line.
Nothing is tagged, uploaded or changed outside of `dist/`. The version is the package's; the date of its heading in
CHANGELOG.md is the time of all files in the archives, so that equal sources give equal bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator
from datetime import UTC, date, datetime, time
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
TOOLS = Path(sys.executable).parent
BUILDER = (str(ROOT / ".venv/bin/python"), "-m", "hatchling", "build")
HEADING = re.compile(r"^## (\S+) - (\d{4}-\d\d-\d\d)$", re.MULTILINE)
LEFT_OUT = ".ci/"
"""The only files that git tracks and the sdist leaves out: they know one machine."""

STEPS = """
{archives} are ready in dist/. The steps that are left for a person:
  1. Read the entries of {version} in CHANGELOG.md once more; set their date to today, and commit.
  2. Run `make audit`, and `make release` again: it ends here without a complaint.
  3. git tag --sign v{version} --message 'ingestor {version}', and push the branch and the tag.
  4. {twine} upload dist/ingestor-{version}*{{.whl,.tar.gz}}
  5. Attach both, dist/SHA256SUMS and dist/ingestor-{version}.cdx.json to the release, with its part of CHANGELOG.md.
  6. Raise `__version__` and open a heading `## Unreleased` in CHANGELOG.md.
"""


class ReleaseError(Exception):
    """A check that failed, in words for the person who releases."""


def run(*command: str, cwd: Path = ROOT, **environment: str) -> str:
    """Run a command; return its output. Raises ReleaseError with the end of it."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-3000:]
        raise ReleaseError(f"{' '.join(command)} ended with {done.returncode}:\n{said}")
    return done.stdout


@contextlib.contextmanager
def check(text: str) -> Iterator[None]:
    """Print what is checked, then `ok`."""
    print(f"{text} … ", end="", flush=True)
    try:
        yield
    except ReleaseError:
        print("FAILED")
        raise
    print("ok")


def released_version() -> str:
    """Return the package's version."""
    found = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "ingestor/__init__.py").read_text(), re.MULTILINE)
    if found is None:
        raise ReleaseError("ingestor/__init__.py has no __version__.")
    return found[1]


def changelog_date(text: str, version: str) -> date:
    """Return the date of a version, which must be the change log's newest. Raises ReleaseError."""
    found = HEADING.search(text)
    if found is None or found[1] != version:
        raise ReleaseError(f"The newest heading of CHANGELOG.md must be `## {version} - YEAR-MONTH-DAY`.")
    if "\n## Unreleased" in text:
        raise ReleaseError("CHANGELOG.md has a heading `## Unreleased`: move its entries to the version.")
    try:
        return date.fromisoformat(found[2])
    except ValueError:
        raise ReleaseError(f"CHANGELOG.md: {found[2]} is no date.") from None


def check_tree(version: str) -> None:
    """Raise ReleaseError unless the work tree is clean, and the version's tag, if it exists, is this commit."""
    if changed := run("git", "status", "--porcelain"):
        raise ReleaseError(f"The work tree is not clean:\n{changed}")
    if run("git", "tag", "--list", f"v{version}"):
        tagged, head = (run("git", "rev-list", "-n", "1", name) for name in (f"v{version}", "HEAD"))
        if tagged != head:
            raise ReleaseError(f"The tag v{version} is another commit: raise the version.")


def check_classifiers(project: dict[str, object]) -> None:
    """Compare the promised versions of Python with the tested ones. Raises ReleaseError."""
    classifiers = " ".join(project["classifiers"])  # type: ignore[arg-type]
    promised = re.findall(r"Python :: (3\.\d+)", classifiers)
    tested = re.findall(r'"(3\.\d+)"', (ROOT / "noxfile.py").read_text().partition("PYTHONS = ")[2].partition("\n")[0])
    if promised != tested or project["requires-python"] != f">={promised[0]}":
        raise ReleaseError(f"pyproject.toml promises Python {promised}, noxfile.py tests {tested}.")


def digest(path: Path) -> str:
    """Return a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def build(target: str, source: Path, out: Path, epoch: str, umask: int = 0o022) -> Path:
    """Build the sdist or the wheel of a folder, and return it."""
    before = os.umask(umask)
    try:
        run(*BUILDER, "-t", target, "-d", str(out), cwd=source, SOURCE_DATE_EPOCH=epoch)
    finally:
        os.umask(before)
    (built,) = out.glob("*.whl" if target == "wheel" else "*.tar.gz")
    return built


def unpack(sdist: Path, out: Path) -> Path:
    """Unpack an sdist; return its folder."""
    with tarfile.open(sdist) as archive:
        archive.extractall(out, filter="data")
    (folder,) = out.iterdir()
    return folder


def check_contents(folder: Path, tracked: list[str]) -> None:
    """Compare the sdist's files with git's. Raises ReleaseError."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    expected = {name for name in tracked if not name.startswith(LEFT_OUT)} | {"PKG-INFO"}
    if differing := found ^ expected:
        raise ReleaseError(f"The sdist and git differ: {', '.join(sorted(differing))}.")


def check_reproducible(wheel: Path, folder: Path, work: Path, epoch: str) -> None:
    """Build the wheel again: under another umask, and from the sdist. Raises ReleaseError for other bytes."""
    again = build("wheel", ROOT, work / "again", epoch, umask=0o077)
    unpacked = build("wheel", folder, work / "unpacked", epoch)
    for name, other in (("built again", again), ("built from the sdist", unpacked)):
        if digest(other) != digest(wheel):
            raise ReleaseError(f"The wheel {name} has other bytes.")


def install(work: Path, wheel: Path, lock: str) -> Path:
    """Install the locked packages and the wheel in the environment `work/empty`; return its Python."""
    python = work / "empty/bin/python"
    uv = (str(TOOLS / "uv"), "--quiet")
    if not python.exists():
        run(*uv, "venv", "--python", str(ROOT / ".venv/bin/python"), str(work / "empty"))
    run(*uv, "pip", "install", "--python", str(python), "--require-hashes", "-r", lock)
    run(*uv, "pip", "install", "--python", str(python), "--no-deps", "--reinstall-package", "ingestor", str(wheel))
    return python


def write_bill_of_materials(python: Path, out: Path) -> None:
    """Write the SBOM of an environment. Raises ReleaseError if it does not name each of its packages."""
    options = ("--pyproject", str(ROOT / "pyproject.toml"), "--output-reproducible", "--of", "JSON", "--sv", "1.6")
    run(str(TOOLS / "cyclonedx-py"), "environment", *options, "--output-file", str(out), str(python))
    bill = json.loads(out.read_text(encoding="utf-8"))
    named = {component["name"].lower().replace("_", "-") for component in bill["components"]}
    listed = json.loads(run(str(TOOLS / "uv"), "pip", "list", "--format", "json", "--python", str(python)))
    if missing := {each["name"] for each in listed} - named - {"ingestor"}:
        raise ReleaseError(f"The SBOM lacks {', '.join(sorted(missing))}.")


def check_demo(python: Path, work: Path, version: str) -> None:
    """Run the installed demo outside of the checkout. Raises ReleaseError unless every tick has its row."""
    program = str(python.parent / "ingestor")
    if run(program, "--version", cwd=work) != f"ingestor {version}\n":
        raise ReleaseError("The installed program has another version.")
    said = run(program, "demo", "--duration", "10s", cwd=work)
    if "every tick once" not in said:
        raise ReleaseError(f"The demo did not end well:\n{said}")


def check_release(version: str) -> date:
    """Check what the version's author must have done; return its date. Raises ReleaseError."""
    with check(f"CHANGELOG.md has ingestor {version} with a date"):
        day = changelog_date((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version)
    with check(f"the work tree is clean, and no other commit is v{version}"):
        check_tree(version)
    return day


def build_packages(work: Path, epoch: str) -> tuple[Path, Path, Path]:
    """Build sdist and wheel into `dist/`, and check both; return them and the unpacked sdist. Raises ReleaseError."""
    with check("sdist and wheel are built"):
        for old in DIST.glob("*"):
            old.unlink()
        sdist, wheel = (build(target, ROOT, DIST, epoch) for target in ("sdist", "wheel"))
    with check("the sdist has every file that git tracks"):
        folder = unpack(sdist, work / "sdist")
        check_contents(folder, run("git", "ls-files").splitlines())
    with check("the wheel has the same bytes when it is built again, and from the sdist"):
        check_reproducible(wheel, folder, work, epoch)
    with check("twine accepts the metadata"):
        run(str(TOOLS / "twine"), "check", "--strict", str(sdist), str(wheel))
    return sdist, wheel, folder


def try_packages(work: Path, wheel: Path, folder: Path, version: str) -> None:
    """Run the wheel and the tests of the sdist; write the SBOM and the checksums. Raises ReleaseError."""
    with check("the wheel is installed in an empty environment; its SBOM is written"):
        python = install(work, wheel, "requirements.lock")
        write_bill_of_materials(python, DIST / f"ingestor-{version}.cdx.json")
    with check("the demo runs from the wheel"):
        check_demo(install(work, wheel, "requirements-demo.lock"), work, version)
    with check("the unit tests pass in the unpacked sdist (make test)"):
        run("make", "test", "ARGS=tests/unit -q -n 2", cwd=folder)
    sums = "".join(f"{digest(path)}  {path.name}\n" for path in sorted(DIST.iterdir()))
    (DIST / "SHA256SUMS").write_text(sums, encoding="ascii")


def release(work: Path, *, unreleased: bool) -> None:
    """Check and build, step by step. Raises ReleaseError at the first failure."""
    version = released_version()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    day = datetime.now(UTC).date() if unreleased else check_release(version)
    with check("each promised version of Python is tested"):
        check_classifiers(project)
    sdist, wheel, folder = build_packages(work, str(int(datetime.combine(day, time(), UTC).timestamp())))
    try_packages(work, wheel, folder, version)
    if unreleased:
        return
    print(STEPS.format(archives=f"{sdist.name} and {wheel.name}", version=version, twine=TOOLS / "twine"))
    if "urls" not in project:
        print("pyproject.toml has no [project.urls]: add the public addresses of source, documentation and issues.")
    if day > datetime.now(UTC).date():
        print(f"CHANGELOG.md dates {version} in the future.")


def main(options: list[str]) -> int:
    """Check, build, and return the exit status: 1 if a check failed."""
    with tempfile.TemporaryDirectory(prefix="ingestor-release-") as work:
        try:
            release(Path(work), unreleased="--unreleased" in options)
        except ReleaseError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
