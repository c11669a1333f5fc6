"""The programs of the units, under the system calls and capabilities of their sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ingestor.settings import variable
from ingestor.simulator.server import TOKEN, Simulator
from tests.clocks import HANG_SECONDS
from tests.deploy.confine import LIBRARY
from tests.deploy.test_systemd import PROGRAM, RELAY, SERVICES, UNITS, WRITER, directives
from tests.http import Window
from tests.nats_servers import running_cluster
from tests.recording import COUNT
from tests.relays import Client, new_token
from tests.servers import TestServer, query, with_parts
from tests.sessions import at, record_session
from tests.tools import ALL_TOOLS, LONG, need

pytestmark = pytest.mark.skipif(not ALL_TOOLS, reason=LONG)

SANDBOX = UNITS / "ingestor-.service.d/sandbox.conf"
CONFINED = [sys.executable, "-m", "tests.deploy.confine", str(SANDBOX)]
ROOT = Path(__file__).parents[2]
NOWHERE = "postgresql://user:none@127.0.0.1:1/none"
JOBS = [name for name in SERVICES if name not in {"ingestor.service", RELAY, WRITER}]
UNATTENDED = ["ingestor-backfill.service", "ingestor-gaps.service"]
"""Their exit status 1 has two meanings."""
TRICKS = {
    "write and execute": "import mmap; mmap.mmap(-1, 4096, prot=7)",
    "priority": "import os; os.nice(1)",
    "owner": "import os; os.chown('.', os.getuid(), os.getgid())",
    "set-user-ID": "import os; os.chmod('.', 0o4700)",
    "family": "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "namespace": "import ctypes\nif ctypes.CDLL(None).unshare(0): raise PermissionError",
}


@pytest.fixture(autouse=True)
def _tools() -> None:
    need("systemd-analyze", package="systemd")
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        if ALL_TOOLS:
            raise
        pytest.skip(f"there is no {LIBRARY}: install the package libseccomp2")


@pytest.fixture
async def migrated(plain: TestServer) -> AsyncIterator[str]:
    """A migrated database; the URL is its owner's."""
    name = plain.new_name()
    yield await plain.create(name, plain.template)
    await plain.drop(name)


def environment(place: Path, **settings: object) -> dict[str, str]:
    given = {
        "token": TOKEN,
        "exchange_calendar": "always",
        "spool_dir": place / "state",
        "http_port": 0,
        **settings,
    }
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        **{variable(name): str(value) for name, value in given.items()},
    }


def lines(unit: str, directive: str, place: Path) -> list[tuple[bool, list[str]]]:
    """The commands of a unit, and whether they may fail: with the program and a state directory of this test."""
    program = f"{sys.executable} -m ingestor"
    return [
        (text.startswith("-"), text.removeprefix("-").replace(PROGRAM, program).replace("%S", str(place)).split())
        for name, text in directives(unit)
        if name == directive
    ]


def run_unit(unit: str, place: Path, given: dict[str, str]) -> bool:
    """Do what the service manager does with a job; return whether it calls that a success.

    SuccessExitStatus= holds for each command of a unit, not only for the main one.
    """
    accepted = {0, *(int(text) for name, text in directives(unit) if name == "SuccessExitStatus")}
    return all(
        subprocess.run([*CONFINED, *command], env=given, cwd=place, check=False).returncode in accepted or may_fail
        for directive in ("ExecStartPre", "ExecStart", "ExecStartPost")
        for may_fail, command in lines(unit, directive, place)
    )


@pytest.mark.parametrize("trick", TRICKS)
def test_the_confinement_holds(trick: str, tmp_path: Path) -> None:
    """Or the tests below would show nothing: what anybody may do is refused in the sandbox."""
    command = [sys.executable, "-c", TRICKS[trick]]
    given = environment(tmp_path)
    free, confined = (
        subprocess.run([*start, *command], env=given, cwd=tmp_path, capture_output=True, text=True, check=False)
        for start in ([], CONFINED)
    )
    assert (free.returncode, confined.returncode) == (0, 1), free.stderr
    assert re.search(r"PermissionError|not supported by protocol", confined.stderr)


async def test_the_daemon_lives_in_its_sandbox(plain: TestServer, migrated: str, tmp_path: Path) -> None:
    """It notifies the manager, records, spools without a database, writes the spool, and stops in order."""
    manager = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(manager))
        async with Simulator(port=0, rate=500) as simulator:
            given = environment(tmp_path, stream_url=simulator.stream_url, spool_after="10ms")
            given["NOTIFY_SOCKET"] = str(manager)
            for number, url in enumerate((NOWHERE, plain.writer_url(migrated))):
                async with daemon(tmp_path / f"{number}.log", {**given, variable("database_url"): url}) as window:
                    if number == 0:
                        await rises(window, "ingestor_spool_bytes")
                    else:
                        await rises(window, "ingestor_ticks_recovered_total")
                        await rises(window, "ingestor_ticks_written_total")
                    for name in ("process_resident_memory_bytes", "process_cpu_seconds_total", "process_max_fds"):
                        assert await window.metric(name), "the process sees too little of /proc or of its limits"
        assert "READY=1" in notifications(notified)
    assert (await query(migrated, COUNT))[0][0] > 0


async def test_the_relay_lives_in_its_sandbox(plain: TestServer, migrated: str, tmp_path: Path) -> None:
    """With a login that is a member of market_relay only, it notifies the manager, serves a client, and stops."""
    login, manager = plain.new_name(), tmp_path / "notify"
    await plain.run(f"CREATE ROLE {login} LOGIN PASSWORD 'follower' IN ROLE market_relay")
    url = with_parts(migrated, database=migrated.rsplit("/", 1)[1], user=login, password="follower")
    token = await new_token(migrated)
    given = environment(tmp_path, database_url=url, relay_port=0, relay_http_port=0)
    given["NOTIFY_SOCKET"] = str(manager)
    log = tmp_path / "relay.log"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
            notified.bind(str(manager))
            async with daemon(log, given, unit=RELAY) as window:
                (address,) = re.findall(r'"(ws://[^"]+)"', log.read_text())
                async with Client(address, token) as client:
                    await client.authenticated()
                    assert await window.metric("ingestor_relay_clients") == 1
            assert {"READY=1", "STOPPING=1"} <= set(notifications(notified))
    finally:
        await plain.run(f"DROP ROLE {login}")


async def test_the_writer_lives_in_its_sandbox(plain: TestServer, migrated: str, tmp_path: Path) -> None:
    """It notifies the manager, becomes active, and stops in order."""
    manager = tmp_path / "notify"
    async with running_cluster(tmp_path / "nats") as cluster:
        database = plain.writer_url(migrated)
        given = environment(
            tmp_path, database_url=database, buffer_url=cluster.url, buffer_replicas=1, write_http_port=0
        )
        given["NOTIFY_SOCKET"] = str(manager)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
            notified.bind(str(manager))
            async with daemon(tmp_path / "writer.log", given, unit=WRITER) as window:
                await rises(window, "ingestor_writer_active")
            assert {"READY=1", "STOPPING=1"} <= set(notifications(notified))


def begin(log: Path, given: dict[str, str], unit: str) -> subprocess.Popen[bytes]:
    ((_, start),) = lines(unit, "ExecStart", log.parent)
    with log.open("wb") as file:
        return subprocess.Popen([*CONFINED, *start], env=given, cwd=log.parent, stdout=file, stderr=file)


@contextlib.asynccontextmanager
async def daemon(log: Path, given: dict[str, str], unit: str = "ingestor.service") -> AsyncIterator[Window]:
    """A confined daemon, relay or writer, which ends with 0 on a request."""
    process = begin(log, given, unit)
    try:
        async with asyncio.timeout(HANG_SECONDS):
            while not (found := re.search(r'"(?:url|health_url)": "(http://[^"]+)"', log.read_text())):
                assert process.poll() is None, log.read_text()
                await asyncio.sleep(0.02)
        async with Window(found[1]) as window:
            yield window
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 60) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def notifications(manager: socket.socket) -> list[str]:
    """Return all notifications that the manager got."""
    manager.setblocking(False)
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(manager.recv(4096).decode())
    return found


async def rises(window: Window, name: str) -> None:
    async with asyncio.timeout(HANG_SECONDS):
        while not await window.metric(name):
            await asyncio.sleep(0.02)


async def test_a_report_of_gaps_is_a_success(migrated: str, tmp_path: Path) -> None:
    """They are what it is for: the page of the day before gives way to a new one."""
    place = tmp_path / "ingestor-gaps"
    place.mkdir()
    (place / "gaps.html").write_text("yesterday's")
    await record_session(migrated, at(0), at(60))
    await record_session(migrated, at(120), at(180))
    given = environment(tmp_path, database_url=migrated)
    assert await asyncio.to_thread(run_unit, "ingestor-gaps.service", tmp_path, given)
    (page,) = place.iterdir()
    assert page.name == "gaps.html"
    assert "</html>" in page.read_text()


@pytest.mark.skipif(not ALL_TOOLS, reason=LONG)
@pytest.mark.parametrize("unit", JOBS)
async def test_jobs_live_in_their_sandbox(unit: str, migrated: str, tmp_path: Path) -> None:
    """Each does what it is for, on a database with nothing in it yet."""
    (tmp_path / unit.removesuffix(".service")).mkdir()
    async with Simulator(port=0, rate=0) as simulator:
        given = environment(tmp_path, database_url=migrated, rest_url=simulator.rest_url)
        assert await asyncio.to_thread(run_unit, unit, tmp_path, given)


@pytest.mark.parametrize("unit", UNATTENDED)
def test_a_job_that_could_do_nothing_has_failed(unit: str, tmp_path: Path) -> None:
    """Without its database none is a success, whatever its exit status means otherwise; an older report stays."""
    place = tmp_path / unit.removesuffix(".service")
    place.mkdir()
    (place / "gaps.html").write_text("yesterday's")
    (place / "new.html").write_text("of a run that was cut off</html>")
    assert not run_unit(unit, tmp_path, environment(tmp_path, database_url=NOWHERE))
    assert (place / "gaps.html").read_text() == "yesterday's"


def test_half_a_report_is_none(tmp_path: Path) -> None:
    """The disk is full in the middle of it: what stands in for the program writes half a page, and ends with 1."""
    place = tmp_path / "ingestor-gaps"
    place.mkdir()
    (place / "gaps.html").write_text("yesterday's")
    package = tmp_path / "stand-in/ingestor"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import sys\nopen(sys.argv[-1], 'w').write('<!doctype html><p>ha')\nsys.exit(1)\n"
    )
    given = environment(tmp_path)
    given["PYTHONPATH"] = f"{package.parent}{os.pathsep}{ROOT}"
    assert not run_unit("ingestor-gaps.service", tmp_path, given)
    assert (place / "gaps.html").read_text() == "yesterday's"
