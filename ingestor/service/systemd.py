"""Reports start, stop, status and liveness to systemd by sd_notify(3); without its socket, does nothing."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping

from ingestor.redaction import outside_text, redact

MOST_STATUS = 2000
"""Characters of the line that is sent: a datagram has room for more."""


class SystemdNotifier:
    """Sends sd_notify messages. `environment` is the process's, as the manager has set it.

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
        """Report that the start is over, once. Call it again, since the manager's queue may be full."""
        if not self._is_ready and not self._is_stopping:
            self._is_ready = self._send("READY=1")

    def starting(self, seconds: float) -> None:
        """Ask for so much more time to start."""
        if not self._is_stopping:
            self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1_000_000)}")

    def status(self, text: str) -> None:
        """Report the status in one line, if it has changed."""
        shown = outside_text(redact(text).replace("\n", " "), limit=MOST_STATUS)
        if shown != self._status and self._send(f"STATUS={shown}"):
            self._status = shown

    def alive(self) -> None:
        """Feed the watchdog."""
        self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """Report that the stop has begun; the start is no longer reported."""
        self._is_stopping = True
        self._send("STOPPING=1")

    def close(self) -> None:
        """Close the socket."""
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
