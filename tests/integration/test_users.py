"""Commands run as any user: without a name or a home, and with unreadable files."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import ssl
import subprocess
import sys
from pathlib import Path

import asyncpg
import pytest
import trustme

from ingestor.buffer.lock import DirectoryLock
from ingestor.errors import ConfigurationError
from ingestor.simulator.server import TOKEN, Simulator
from ingestor.store.refusal import translated
from tests.clocks import HANG_SECONDS
from tests.commands import environment_with
from tests.integration.test_addresses import LIVE, named, relay
from tests.sessions import BEGINS, ENDS, MINUTE, at, execute, record_session

NAMELESS = 54321
BAR = """
INSERT INTO market.bars (symbol, time, resolution, open, high, low, close, volume, source)
VALUES ('AIR.NZ', $1, '1 minute', 6.5, 6.6, 6.4, 6.45, 70, 'financefeast')
"""
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root may run as another user")


def run_as(user: int, *arguments: str, cwd: Path, home: Path | None = None, **settings: str) -> tuple[int, list[str]]:
    """Run a command as a user; return its status and the lines of its error output.

    With a `home` the user reads only public files; the test is skipped if the interpreter is not public.
    """
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("INGESTOR_", "PG"))}
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        variables.pop(name, None)
    variables |= {f"INGESTOR_{name}": value for name, value in settings.items()}
    # The user may read the interpreter's files, wherever they are installed.
    capabilities = [f"--{kind}-caps=+dac_read_search" for kind in ("inh", "ambient")]
    if home is not None:
        variables["HOME"], capabilities = str(home), []
    become = ["setpriv", f"--reuid={user}", "--clear-groups", *capabilities]
    if home is not None and subprocess.run([*become, sys.executable, "-c", "import ingestor"], check=False).returncode:
        pytest.skip("only its owner may read the interpreter")
    command = [*become, sys.executable, "-m", "ingestor", *arguments]
    done = subprocess.run(command, env=variables, cwd=cwd, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr.splitlines()


@as_root
def test_a_user_without_a_name(tmp_path: Path) -> None:
    """A missing user name is requested in one line, if it is needed."""
    status, lines = run_as(NAMELESS, "gaps", cwd=tmp_path, DATABASE_URL="postgresql://127.0.0.1:1/d")
    assert status == 78
    (line,) = lines
    assert line.startswith(
        f"ingestor: The database URL postgresql://127.0.0.1:1/d names no user, and the user id {NAMELESS} "
    )
    assert line.endswith("Write postgresql://USER@HOST:PORT/DATABASE.")


def test_a_deleted_directory(tmp_path: Path) -> None:
    """A deleted working directory counts as one without a `.env`."""
    gone = tmp_path / "gone"
    gone.mkdir()
    code = "import os; os.rmdir(os.getcwd()); from ingestor.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "gaps"],
        env=environment_with(INGESTOR_DATABASE_URL="postgresql://u@127.0.0.1:1/d"),
        cwd=gone,
        capture_output=True,
        text=True,
        check=False,
    )
    (line,) = done.stderr.splitlines()
    assert (done.returncode, "Connection refused" in line) == (69, True)


@as_root
def test_a_user_without_a_home(tmp_path: Path) -> None:
    """Without a home there is no default place for the spool; a command without a spool works."""
    status, lines = run_as(NAMELESS, "run", cwd=tmp_path, DATABASE_URL="postgresql://u@127.0.0.1:1/d", TOKEN="pk_x")
    assert (status, len(lines)) == (78, 1), lines
    assert "INGESTOR_SPOOL_DIR: ~ stands for no directory" in lines[0]
    status, lines = run_as(NAMELESS, "gaps", cwd=tmp_path, DATABASE_URL="postgresql://u@127.0.0.1:1/d")
    assert (status, len(lines)) == (69, 1)
    assert "Connection refused" in lines[0]


@as_root
@pytest.mark.parametrize(
    ("mode", "unreadable", "named"),
    [
        ("disable", "postgresql.crt", False),
        ("prefer", "root.crt", False),
        ("prefer", "postgresql.crt", False),
        ("require", "postgresql.crt", True),
        ("require", "postgresql.key", True),
        ("require", "root.crl", True),
        ("verify-full", "root.crt", True),
    ],
)
def test_certificates_that_it_may_not_read(mode: str, unreadable: str, named: bool, tmp_path: Path) -> None:
    """An unreadable file that the TLS mode uses is named, with 78; one that it does not use is ignored."""
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_uid == os.getuid() and not directory.stat().st_mode & 0o005:  # the test's own file
            directory.chmod(0o755)
    home = tmp_path / "home"
    (home / ".postgresql").mkdir(parents=True)
    if unreadable == "postgresql.key":
        (home / ".postgresql/postgresql.crt").write_text("", encoding="ascii")
    file = home / ".postgresql" / unreadable
    file.touch(mode=0)
    url = f"postgresql://u@127.0.0.1:1/d?sslmode={mode}"
    status, lines = run_as(NAMELESS, "gaps", cwd=tmp_path, home=home, DATABASE_URL=url)
    assert (status, len(lines)) == ((78 if named else 69), 1), lines
    assert (str(file) if named else "Connection refused") in lines[0]


@as_root
async def test_a_home_of_another_user(database: str, tmp_path: Path) -> None:
    """With optional TLS, unreadable files do not matter, whether or not the server has TLS."""
    home = tmp_path / "home"
    (home / ".postgresql").mkdir(parents=True)
    home.chmod(0)
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("db.test").configure_cert(context)
    assert run_as(NAMELESS, "gaps", cwd=tmp_path, home=home, DATABASE_URL=database) == (0, [])
    async with relay(database, context) as port:
        url = named(database, LIVE, port)
        found = await asyncio.to_thread(run_as, NAMELESS, "gaps", cwd=tmp_path, home=home, DATABASE_URL=url)
        assert found == (0, [])


@as_root
@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["gaps"], 69, "Connection refused"),
        (["demo", "--duration=1s"], 78, f"the user id {NAMELESS}, which has no name"),
    ],
)
def test_an_unreadable_home(arguments: list[str], status: int, words: str, tmp_path: Path) -> None:
    """A user without name and home encrypts without certificates of its own; PostgreSQL itself needs a name."""
    url = "postgresql://u@127.0.0.1:1/d?sslmode=require"
    ended, lines = run_as(NAMELESS, *arguments, cwd=tmp_path, DATABASE_URL=url)
    assert (ended, len(lines)) == (status, 1), lines
    assert words in lines[0]


READ_ONLY = """
while read -r _ place _; do
    case $place in /proc*|/sys*|/dev|/dev/pts) ;; *) mount -o remount,bind,ro "$place" 2>/dev/null ;; esac
done </proc/self/mounts
exec "$@"
"""
"""Runs a command while every file system is read-only, in a namespace of its own: nothing else sees the change."""


@pytest.fixture
def read_only(tmp_path: Path) -> list[str]:
    """Return the beginning of such a command line; skip the test if it has no effect here."""
    shell = ["unshare", "--mount", "sh", "-c", READ_ONLY, "sh"]
    try:
        writes = (
            subprocess.run([*shell, "touch", str(tmp_path / "x")], check=False, capture_output=True).returncode == 0
        )
    except OSError:
        writes = True
    if writes:
        pytest.skip("no file system can be made read-only here")
    return shell


@as_root
@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["run"], 78, "INGESTOR_SPOOL_DIR: {} is not a directory that can be written to: Read-only file system."),
        (["check"], 78, ""),  # its report has the line
        (["migrate"], 0, ""),
        (["gaps", "--until=2026-11-21"], 1, ""),
        (["gaps", "--format=html", "--output={}"], 69, "{} cannot be written: Read-only file system."),
        (["chart", "AIR.NZ"], 0, ""),
        (["chart", "AIR.NZ", "--format=svg", "--output={}"], 69, "{} cannot be written: Read-only file system."),
        (["demo", "--duration=1s"], 78, "PostgreSQL needs a directory in "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
async def test_a_read_only_file_system(
    arguments: list[str], status: int, words: str, database: str, tmp_path: Path, read_only: list[str]
) -> None:
    """A command that must write there ends with one line; every other works, and none shows a traceback."""
    await record_session(database, BEGINS - MINUTE, at(180), "closed")
    await execute(database, BAR, at(190))
    place = tmp_path / "place"
    if arguments == ["run"]:  # `check` finds none
        place.mkdir()
    async with Simulator(port=0, rate=0) as simulator:
        variables = {
            "INGESTOR_DATABASE_URL": database,
            "INGESTOR_TOKEN": TOKEN,
            "INGESTOR_STREAM_URL": simulator.stream_url,
            "INGESTOR_REST_URL": simulator.rest_url,
            "INGESTOR_SPOOL_DIR": str(place),
        }
        command = [sys.executable, "-m", "ingestor", *(each.format(place) for each in arguments)]
        done = await asyncio.to_thread(
            subprocess.run,
            [*read_only, *command],
            env=environment_with(**variables),
            capture_output=True,
            text=True,
            check=False,
            timeout=HANG_SECONDS,
        )
    assert done.returncode == status, done
    assert "Traceback" not in done.stdout + done.stderr
    if arguments[0] == "check":
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("problem")]
        assert line.startswith("problem  disk")
        assert line.endswith("Read-only file system.")
    if words:
        assert done.stderr.count("\n") == 1, done.stderr
        line = done.stderr.rstrip()
        assert line.startswith(f"ingestor: {words.format(place)}")
        assert line.endswith("Read-only file system.")
    else:
        assert done.stderr == ""


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOLCK, "cannot lock files"),
        (errno.EOPNOTSUPP, "cannot lock files"),
        (errno.EWOULDBLOCK, "in use by another"),
    ],
)
def test_locks(number: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks is not reported as a second process."""

    def refuses(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuses)  # every file system here has locks
    with pytest.raises(ConfigurationError, match=words):
        DirectoryLock(tmp_path).claim()


@pytest.mark.parametrize(
    "error",
    [
        asyncpg.InternalClientError("cannot switch to state 15; another operation (2) is in progress"),
        asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"),
    ],
)
def test_a_server_that_closes(error: Exception) -> None:
    """The cause is reported in words, not as a state of the driver."""
    assert str(translated(error)).startswith("The connection to the database broke: the server closed it ")


async def test_an_ascii_locale(database: str) -> None:
    """Text for people escapes characters that the locale lacks; a document is UTF-8, as it declares."""
    await record_session(database, BEGINS - MINUTE, at(180), "closed")
    await record_session(database, at(210), ENDS + MINUTE, "stopped")
    await execute(database, BAR, at(190))
    variables = environment_with(INGESTOR_DATABASE_URL=database, PYTHONIOENCODING="ascii")

    async def output(*arguments: str) -> bytes:
        command = [sys.executable, "-m", "ingestor", *arguments]
        done = await asyncio.to_thread(subprocess.run, command, env=variables, capture_output=True, check=False)
        assert done.stderr == b""
        return done.stdout

    chart, page = await asyncio.gather(output("chart", "AIR.NZ"), output("gaps", "--format=html"))
    assert b"\\u2502" in chart
    assert "≥" in page.decode()
