"""Runs PgBouncer in a process of its own before a server."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from ingestor.store.connect import driver_url
from tests.tools import need

PROGRAM = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin") or ""
"""Its path; empty if it is missing. Debian keeps it where only administrators look."""

EXAMPLE = Path(__file__).parents[1] / "docs/how-to/operate.md"
"""The configuration for operators, which is tested here with other addresses."""

UNPRIVILEGED = 65534
"""The user and the group of a process without rights."""


@dataclass
class Pooler:
    """A pooler that listens on `port` while it runs and offers each database of the server by its name."""

    upstream: str
    mode: str = "transaction"
    size: int = 4
    users: dict[str, str] = field(default_factory=dict)
    """Passwords by name, besides the upstream's own user."""
    port: int = 0
    directory: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="ingestor-pooler-")))
    """A directory that another user may write to: pytest's own is closed to others."""
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it listens."""
        if not self.port:
            with socket.create_server(("127.0.0.1", 0)) as free:
                self.port = free.getsockname()[1]
        parts = urlsplit(driver_url(self.upstream))
        server = f"host={parts.hostname or '127.0.0.1'} port={parts.port or 5432}"
        logins = {parts.username or "postgres": parts.password or "", **self.users}
        users = self.directory / "users.txt"
        users.write_text("".join(f'"{name}" "{password}"\n' for name, password in logins.items()), encoding="ascii")
        file = self.directory / "pgbouncer.ini"
        text = EXAMPLE.read_text(encoding="utf-8").partition("```ini\n[databases]")[2].partition("```")[0]
        for ours, pattern in {
            f"* = {server}": "^market = .*$",
            f"listen_port = {self.port}\nunix_socket_dir =\nserver_login_retry = 1": "^listen_port = .*$",
            f"auth_type = {'scram-sha-256' if parts.password else 'trust'}": "^auth_type = .*$",
            f"auth_file = {users}\nlogfile = {self.directory}/pgbouncer.log": "^auth_file = .*$",
            f"pool_mode = {self.mode}": "^pool_mode = .*$",
            f"default_pool_size = {self.size}": "^default_pool_size = .*$",
        }.items():
            text, count = re.subn(pattern, ours, text, flags=re.MULTILINE)
            assert count == 1, pattern
        file.write_text(f"[databases]{text}", encoding="ascii")
        command = [PROGRAM or need("pgbouncer", package="pgbouncer"), "-q", str(file)]
        if os.getuid() == 0:  # PgBouncer refuses to run as root
            self.directory.chmod(0o777)
            self.process = subprocess.Popen(command, user=UNPRIVILEGED, group=UNPRIVILEGED, extra_groups=[])
        else:
            self.process = subprocess.Popen(command)
        for _ in range(600):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError((self.directory / "pgbouncer.log").read_text())

    def url(self, url: str, database: str | None = None) -> str:
        """Return the address of a database through the pooler."""
        parts = urlsplit(driver_url(url))
        login = parts.netloc.rpartition("@")[0] or "postgres"
        path = parts.path if database is None else f"/{database}"
        return urlunsplit((parts.scheme, f"{login}@127.0.0.1:{self.port}", path, "", ""))

    def kill(self) -> None:
        """Send SIGKILL."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def ensure_running(self) -> None:
        """Start it unless it runs."""
        if self.process is None:
            self.start()

    def close(self) -> None:
        """Stop it and remove its files."""
        self.kill()
        shutil.rmtree(self.directory)
