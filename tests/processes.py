"""Real processes for the tests: any local PostgreSQL server, and the daemon. They are killed with real signals."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM, Signals
from typing import Any, ClassVar

from ingestor.errors import StoreError
from ingestor.store.connect import connect
from tests.clocks import HANG_SECONDS

ROOT = Path(__file__).parents[1]


def state(pid: int) -> tuple[str, int]:
    """Return a process's state (`R`, `T`, `Z` …; empty if it is gone) and its parent."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "", 0
    return fields[0], int(fields[1])


def is_alive(pid: int) -> bool:
    return state(pid)[0] not in {"", "Z", "X"}


def children(pid: int) -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if state(int(path.name))[1] == pid]


def send(number: Signals, *pids: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@dataclass
class ServerProcess:
    """A PostgreSQL server on this machine, of any installation, described by its process."""

    url: str
    pid: int
    command: list[str]
    environment: dict[str, str]
    root: str
    directory: str
    user: int
    group: int
    log: Path

    @classmethod
    async def of(cls, url: str) -> ServerProcess:
        """Find the server behind a URL."""
        connection = await connect(url)
        pid = state(await connection.fetchval("SELECT pg_backend_pid()"))[1]
        await connection.close()
        proc = Path(f"/proc/{pid}")
        root = str((proc / "root").readlink())
        log = (proc / "fd/2").readlink()
        return cls(
            url,
            pid,
            [part.decode() for part in (proc / "cmdline").read_bytes().split(b"\0") if part],
            dict(entry.split("=", 1) for entry in (proc / "environ").read_bytes().decode().split("\0") if "=" in entry),
            root,
            str((proc / "cwd").readlink()).removeprefix(root.rstrip("/")),
            proc.stat().st_uid,
            proc.stat().st_gid,
            log if log.exists() else Path(os.devnull),
        )

    @property
    def data(self) -> Path:
        """The data directory, which is the server's working directory."""
        return self.host_path(self.directory)

    def host_path(self, path: str) -> Path:
        """Translate a path of the server's root into ours."""
        return Path(self.root) / path.lstrip("/")

    def processes(self) -> list[int]:
        return [self.pid, *children(self.pid)]

    @property
    def is_running(self) -> bool:
        return is_alive(self.pid)

    def chown(self, path: Path) -> None:
        """Give a file or directory to the server's user."""
        os.chown(path, self.user, self.group)

    async def ensure_running(self) -> None:
        """Let the server run, in whatever state it is."""
        self.resume()
        if not self.is_running:
            await self.start()

    def kill(self) -> None:
        """Send SIGKILL to the server and to its children."""
        victims = self.processes()
        send(signal.SIGKILL, *victims)
        self._wait_for(victims)

    def stop(self) -> None:
        """Stop it in order (`fast`)."""
        victims = self.processes()
        send(signal.SIGINT, self.pid)
        self._wait_for(victims)

    def pause(self) -> None:
        """Send SIGSTOP to the server and to its children."""
        send(signal.SIGSTOP, *self.processes())

    def resume(self) -> None:
        """Send SIGCONT to the server and to its children."""
        send(signal.SIGCONT, *self.processes())

    async def start(self) -> None:
        """Start it again with the same command, and wait until it accepts connections."""
        self._launch()
        async with asyncio.timeout(60):
            while True:
                assert self.is_running, self.log.read_text(encoding="utf-8", errors="replace")[-2000:]
                with contextlib.suppress(StoreError):
                    await (await connect(self.url)).close()
                    return
                await asyncio.sleep(0.05)

    def _launch(self) -> None:
        self._remove_locks()
        command, directory = self.command, self.data
        if os.geteuid() == 0:
            command = ["chroot", f"--userspec={self.user}:{self.group}", "--groups=", self.root, *command]
            directory = Path("/")
        # A shell that ends at once starts it, so that it has no parent here, like the process before it.
        shell = ["sh", "-c", '"$@" >>"$0" 2>&1 </dev/null & echo $!', str(self.log), *command]
        result = subprocess.run(
            shell, check=True, capture_output=True, env=self.environment, cwd=directory, start_new_session=True
        )
        self.pid = int(result.stdout)

    def _remove_locks(self) -> None:
        """Remove the lock files of a killed server: while its process is a zombie, they would count."""
        status = self.data / "postmaster.pid"
        with contextlib.suppress(FileNotFoundError):
            _, _, _, port, sockets, *_ = status.read_text(encoding="utf-8").splitlines()
            self.host_path(f"{sockets}/.s.PGSQL.{port}.lock").unlink(missing_ok=True)
            status.unlink()

    def _wait_for(self, victims: list[int]) -> None:
        deadline = time.monotonic() + 60
        while any(is_alive(pid) for pid in victims):
            assert time.monotonic() < deadline, "the server does not stop"
            time.sleep(0.01)


class DaemonProcess:
    """`ingestor run` in a process of its own, with a file for its log."""

    COMMAND: ClassVar = "run"

    def __init__(self, log: Path, **settings: Any) -> None:
        self.log = log
        self.popen: dict[str, Any] = {}
        """More options of `subprocess.Popen`."""
        self.module = "ingestor"
        """The module that is run; another one may change the program first."""
        self.skew = 0.0
        """Seconds by which its clock is ahead of this machine's from its next start on; negative: behind."""
        self.first_address: str | None = None
        """An address that it finds for `localhost` before the others."""
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._log_begin = 0

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("INGESTOR_")}
        environment |= {"INGESTOR_HTTP_PORT": "0", "INGESTOR_WRITE_HTTP_PORT": "0"}
        environment |= {f"INGESTOR_{name.upper()}": str(value) for name, value in self._settings.items()}
        with self.log.open("ab") as log:
            self._log_begin = log.tell()
            module = "tests.skewed" if self.skew or self.first_address else self.module
            if self.first_address:
                environment["FIRST_ADDRESS"] = self.first_address
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, self.COMMAND],
                env=environment | {"SKEW_SECONDS": str(self.skew), "PYTHONPATH": str(ROOT)},
                **{"stdout": log, "stderr": log, **self.popen},
            )

    def kill(self) -> None:
        """Send SIGKILL."""
        self.signal(signal.SIGKILL)
        self.wait()

    def signal(self, number: Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self, number: Signals = SIGTERM) -> int:
        """Send SIGTERM, or another signal; return the exit status."""
        self.signal(number)
        return self.wait(90)

    def handles(self, number: Signals) -> bool:
        """Return whether it has a handler for a signal."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii", errors="replace")
        caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
        return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)

    async def page(self) -> str:
        """Wait until this process has logged the address of its page, and return that."""
        async with asyncio.timeout(HANG_SECONDS):
            while True:
                said = self.log.read_bytes()[self._log_begin :].decode(errors="replace")
                if found := re.search(r'"url": ?"(http://[^"]+)"', said):
                    return found[1]
                await asyncio.sleep(0.05)

    def tail(self) -> str:
        """Return the end of the log."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-2000:]

    def wait(self, timeout: float = 30) -> int:
        assert self._process is not None
        return self._process.wait(timeout)

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def end(self) -> None:
        """End the process, in whatever state it is."""
        if self.is_running:
            self.signal(signal.SIGCONT)
            self.kill()

    def resident_bytes(self) -> int:
        """Return the memory of the process, without pages that it only shares."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))


class RelayProcess(DaemonProcess):
    """`ingestor relay`, the same way."""

    COMMAND = "relay"


class WriteProcess(DaemonProcess):
    """`ingestor write`, the same way."""

    COMMAND = "write"
