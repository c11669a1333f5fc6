"""Tells systemd how it is with us: datagrams to the socket that it names (sd_notify(3)); without one, nothing."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping

from ingestor.redaction import outside_text, redact

MOST_STATUS = 2000
"""Characters of the line that is sent: a datagram has room for more."""


class SystemdNotifier:
    """The service manager's ear. `environment` is the process's, as the manager has set it.

    A manager that does not listen must not hold up the recorder: what can't be sent at once is not sent.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self._watchdog = environment.get("WATCHDOG_USEC", "")
        self._watched = environment.get("WATCHDOG_PID", str(os.getpid()))
        self._status = ""
        self._is_ready = self._is_stopping = False
        self._socket: socket.socket | None = None
        if self._address is not None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)

    @property
    def watchdog_seconds(self) -> float | None:
        """How often the manager wants a sign of life; None where it does not. Half of that is the habit."""
        if not self._watchdog.isdecimal() or self._watched != str(os.getpid()):
            return None
        return int(self._watchdog) / 1_000_000

    def ready(self) -> None:
        """Say that the start is over, unless that was said. To be repeated, since a manager's queue may be full."""
        if not self._is_ready and not self._is_stopping:
            self._is_ready = self._send("READY=1")

    def starting(self, seconds: float) -> None:
        """Ask for so much more time to start."""
        if not self._is_stopping:
            self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1_000_000)}")

    def status(self, text: str) -> None:
        """Say in one line how it is, where that has changed."""
        shown = outside_text(redact(text).replace("\n", " "), limit=MOST_STATUS)
        if shown != self._status and self._send(f"STATUS={shown}"):
            self._status = shown

    def alive(self) -> None:
        """Feed the watchdog."""
        self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """Say that the stop has begun; nothing is said of the start any more."""
        self._is_stopping = True
        self._send("STOPPING=1")

    def close(self) -> None:
        """Say nothing more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, message: str) -> bool:
        """Return whether it was sent."""
        if self._socket is not None and self._address is not None:
            with contextlib.suppress(OSError):
                # Text from outside may hold half of a surrogate pair, which UTF-8 lacks.
                self._socket.sendto(message.encode(errors="backslashreplace"), self._address)
                return True
        return False


def _address(name: str) -> str | None:
    """Return the socket's address: a path, or a name of the abstract namespace, written with an @."""
    if name.startswith("@"):
        return f"\0{name[1:]}"
    return name if name.startswith("/") else None
