"""Processes of the cluster, each with a name and a log, run by an unprivileged user if this process is root."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.processes import children, is_alive, send

UNPRIVILEGED = pwd.getpwnam("nobody")
STOP_SECONDS = 30.0


def credentials() -> dict[str, Any]:
    """Return the arguments of `Popen` that drop root's rights."""
    if os.geteuid() != 0:
        return {}
    return {"user": UNPRIVILEGED.pw_uid, "group": UNPRIVILEGED.pw_gid, "extra_groups": []}


def python() -> tuple[list[str], dict[str, str]]:
    """Return an interpreter that the unprivileged user can run with this environment's packages, and its variables.

    Without `site` (`-S`), so that it sees no other packages.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    environment = {"PYTHONPATH": sysconfig.get_path("purelib")}
    for program in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            probe = [program, "-S", "-c", "import patroni.dcs.etcd3, psycopg"]
            subprocess.run(probe, check=True, capture_output=True, env=environment, cwd="/", **credentials())
            return [program, "-S"], environment
    raise AssertionError(
        f"no {version} here can be run by {UNPRIVILEGED.pw_name}; install it for all users, or run as another user"
    )


def own_directory(path: Path) -> Path:
    """Create a directory that the unprivileged user owns."""
    path.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(path, UNPRIVILEGED.pw_uid, UNPRIVILEGED.pw_gid)
    return path


def descendants(pid: int) -> list[int]:
    """Return a process and everything below it, the oldest first."""
    found = [pid]
    for each in found:
        found += children(each)
    return found


@dataclass
class Part:
    """A process. In a session of its own: the terminal's Ctrl-C must reach only the harness, which ends all parts."""

    name: str
    command: list[str]
    directory: Path
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def log(self) -> Path:
        return self.directory.parent / f"{self.name}.log"

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "HOME": str(self.directory), **self.environment},
                start_new_session=True,
                **credentials(),
            )

    def kill(self) -> None:
        """Send SIGKILL and wait for the end."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(STOP_SECONDS)

    def freeze(self) -> None:
        if self.is_running:
            send(signal.SIGSTOP, self.pid)

    def thaw(self) -> None:
        if self.is_running:
            send(signal.SIGCONT, self.pid)

    def end(self) -> None:
        """End it, in whatever state it is."""
        self.thaw()
        self.kill()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def tail(self) -> str:
        """Return the end of the log."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-2000:]


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if is_alive(pid)]
