"""Exit status 1 is an answer of the command; a failure of the command has another status."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from ingestor.errors import EXIT_SOFTWARE, ConfigurationError, IngestorError, MessagesLostError, StoreError
from tests.commands import environment_with, ingestor, ingestor_in_process
from tests.sessions import BEGINS, ENDS, MINUTE, at, record_session

UNTIL = ("--until", "2026-11-21")
NOWHERE = "postgresql://ingestor@127.0.0.1:1/market"


@contextmanager
def broken_pipe() -> Iterator[int]:
    """Yield the writing end of a pipe whose reader is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@contextmanager
def full_disk() -> Iterator[int]:
    """Yield a file that accepts nothing."""
    descriptor = os.open("/dev/full", os.O_WRONLY)
    yield descriptor
    os.close(descriptor)


async def test_gaps(writer_url: str, database: str) -> None:
    """0 and 1 tell whether a gap is open; an unavailable database or an unwritable report is 69."""
    await record_session(database, BEGINS - MINUTE, ENDS + MINUTE, "stopped")
    assert (await ingestor("gaps", *UNTIL, DATABASE_URL=writer_url))[0] == 0
    await record_session(database, ENDS + 2 * MINUTE, ENDS + 3 * MINUTE, "stopped")
    assert (await ingestor("gaps", "--until", "2026-11-24", DATABASE_URL=writer_url))[0] == 1
    assert (await ingestor("gaps", *UNTIL, DATABASE_URL=NOWHERE))[0] == 69
    assert (await ingestor("gaps", "--output=/proc/x", *UNTIL, DATABASE_URL=writer_url))[0] == 69


@pytest.mark.parametrize("output", [broken_pipe, full_disk])
@pytest.mark.parametrize("form", ["table", "json"])
async def test_an_output_that_accepts_nothing(
    form: str, output: Callable[[], AbstractContextManager[int]], writer_url: str, database: str
) -> None:
    """A report that cannot be written ends with 69 and one line, not with 1, which means open gaps."""
    await record_session(database, BEGINS - MINUTE, at(100), "closed")
    with output() as stdout:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "ingestor", "gaps", f"--format={form}", *UNTIL),
            env=environment_with(INGESTOR_DATABASE_URL=writer_url),
            stdout=stdout,
            stderr=subprocess.PIPE,
        )
        _, errors = await process.communicate()
    assert process.returncode == 69
    (line,) = errors.decode().splitlines()
    assert line.startswith("ingestor: Standard output cannot be written: ")


def test_the_daemon_documents_every_status() -> None:
    """The runbook and `ingestor run --help` list the same statuses, and each that the tree of errors has."""
    page = (Path(__file__).parents[2] / "docs/how-to/operate.md").read_text(encoding="utf-8")
    section = page.partition("\n## Exit statuses\n")[2].partition("\n## ")[0]
    rows = set(re.findall(r"^\| (\d+)", section, re.MULTILINE))
    status, output, _ = ingestor_in_process("run", "--help", COLUMNS="400", TERM="dumb")
    assert status == 0
    assert set(re.findall(r"(?<![\w.])\d+(?= )", output.partition("Exit status:")[2])) == rows
    kinds: list[type[IngestorError]] = [IngestorError, *subclasses(IngestorError)]
    assert {str(kind.exit_code) for kind in kinds} | {str(EXIT_SOFTWARE)} <= rows


def subclasses(kind: type[IngestorError]) -> Iterator[type[IngestorError]]:
    for each in kind.__subclasses__():
        yield each
        yield from subclasses(each)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (IngestorError("x"), 69),
        (StoreError("x"), 69),
        (ConfigurationError("x"), 78),
        (MessagesLostError("x"), 1),
        (ZeroDivisionError("a bug"), 70),
        (FileNotFoundError(2, "a bug", "name"), 70),
        (KeyboardInterrupt(), 130),
    ],
    ids=repr,
)
def test_errors(error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of failure has its own status, and an unexpected error is never taken for an answer."""

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(sys.modules["ingestor.cli.gaps"], "bounds", fails)
    assert ingestor_in_process("gaps")[0] == status
