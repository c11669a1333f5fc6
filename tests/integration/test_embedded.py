from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import mkdtemp

import pytest

from ingestor.embedded import EmbeddedServer, wheel_binaries
from ingestor.errors import EmbeddedServerError
from ingestor.store.connect import connect


async def answer(url: str) -> int:
    connection = await connect(url)
    try:
        return int(await connection.fetchval("SELECT 6 * 7"))
    finally:
        await connection.close()


async def test_starts_stops_and_starts_again() -> None:
    """The wheel's server answers, and leaves nothing behind after the block."""
    with EmbeddedServer() as server:
        assert await answer(server.url()) == 42
        server.stop()
        server.start()
        assert await answer(server.url()) == 42
        pid, directory = server.pid, server.directory
    assert not Path(f"/proc/{pid}").exists()
    assert not directory.exists()


async def test_asks_for_a_password() -> None:
    """Other users of the machine need the password."""
    with EmbeddedServer() as server:
        url = server.url().replace(":" + server.url().split(":")[2].split("@")[0] + "@", ":wrong@")
        with pytest.raises(Exception, match="password authentication failed"):
            await answer(url)


@pytest.mark.parametrize("private", [False, True])
def test_the_server_stops_with_its_parent(private: bool) -> None:
    """If its parent is killed, the server stops and removes its directory."""
    with private_copy() if private else nullcontext(wheel_binaries()) as binaries:
        _kill_and_look(binaries)


def _kill_and_look(binaries: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from ingestor.embedded import EmbeddedServer\n"
        "with EmbeddedServer(Path(sys.argv[1])) as server:\n"
        "    print(server.pid, server.directory, flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(binaries)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, directory = parent.stdout.readline().split()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() or Path(directory).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def private_copy() -> Iterator[Path]:
    """Copy the wheel's programs into a directory that only this user may enter."""
    package, place = wheel_binaries().parents[1], Path(mkdtemp(prefix="private-"))
    try:
        for name in (package.name, f"{package.name}.libs"):
            if (package.parent / name).exists():
                shutil.copytree(package.parent / name, place / name, symlinks=True)
        place.chmod(0o700)
        yield place / wheel_binaries().relative_to(package.parent)
    finally:
        shutil.rmtree(place)


async def test_works_in_a_private_directory() -> None:
    """An environment that the server's user can't enter (a clone in /root) works as well."""
    with private_copy() as binaries, EmbeddedServer(binaries) as server:
        assert await answer(server.url()) == 42
        if os.geteuid() == 0:
            assert server.directory.stat().st_uid != 0


def test_a_failed_start_says_why() -> None:
    """A server that ends during its start is reported at once, with the end of its log."""
    with pytest.raises(EmbeddedServerError, match="shared_buffers"), EmbeddedServer(settings={"shared_buffers": "x"}):
        pass
