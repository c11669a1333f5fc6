from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ingestor.store.version import SCHEMA_REVISION
from tests.servers import query

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the wheel outside of the checkout."""
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory / "content")
    return directory / "content"


def test_contents_of_the_wheel(unpacked: Path) -> None:
    """The package contains the migrations, the SQL and the calendar, and no tests."""
    names = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    expected = {
        "ingestor/migrations/env.py",
        "ingestor/migrations/versions/0001_first_schema.py",
        "ingestor/migrations/versions/0001_first_schema.sql",
        "ingestor/migrations/versions/0002_coverage.sql",
        "ingestor/migrations/versions/0002_coverage_views.sql",
        "ingestor/store/queries.sql",
        "ingestor/store/gaps.sql",
        "ingestor/chart/palette.css",
        "ingestor/chart/svg.css",
        "ingestor/coverage/page.css",
        "ingestor/coverage/xnze.csv",
        "ingestor/py.typed",
    }
    assert expected <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith("tests") or "__pycache__" in name for name in names)


async def test_the_wheel_can_migrate(unpacked: Path, empty_database: str, tmp_path: Path) -> None:
    """An installed package needs no checkout to prepare a database."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(unpacked), "INGESTOR_DATABASE_URL": empty_database}
    where = "import ingestor; print(ingestor.__file__)"
    expected = {
        ("-c", where): f"{unpacked}/ingestor/__init__.py\n",
        ("-m", "ingestor", "migrate"): f"The schema went from nothing to revision {SCHEMA_REVISION}.\n",
    }
    for arguments, words in expected.items():
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", *arguments),
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        assert process.returncode == 0, output
        assert words in output.decode()
    assert await query(empty_database, "SELECT count(*) FROM ingest.settings") == [(1,)]
