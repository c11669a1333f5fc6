"""Reports start, stop, status and liveness to systemd by sd_notify(3)."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping

from ingestor.redaction import outside_text, redact

MAX_STATUS = 2000
"""Characters of the status line at most; a datagram has room for more."""


class SystemdNotifier:
    """Sends sd_notify messages to the socket that `environment` names; does nothing if it names none.

    A message that can't be sent at once is dropped, so that a busy manager never holds up the daemon.
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
        """The manager's watchdog timeout; None if it has none. Call `alive` at least twice as often."""
        if not self._watchdog.isdecimal() or self._watched != str(os.getpid()):
            return None
        return int(self._watchdog) / 1_000_000

    def ready(self) -> None:
        """Report the end of the start, once. Call it repeatedly, since the manager's queue may be full."""
        if not self._is_ready and not self._is_stopping:
            self._is_ready = self._send("READY=1")

    def starting(self, seconds: float) -> None:
        """Ask for `seconds` more to start."""
        if not self._is_stopping:
            self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1_000_000)}")

    def status(self, text: str) -> None:
        """Report a changed status, in one redacted line."""
        shown = outside_text(redact(text).replace("\n", " "), limit=MAX_STATUS)
        if shown != self._status and self._send(f"STATUS={shown}"):
            self._status = shown

    def alive(self) -> None:
        """Reset the watchdog."""
        self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """Report the beginning of the stop; `ready` and `starting` do nothing afterwards."""
        self._is_stopping = True
        self._send("STOPPING=1")

    def close(self) -> None:
        """Close the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, message: str) -> bool:
        """Send a message; return whether it was sent."""
        if self._socket is not None and self._address is not None:
            with contextlib.suppress(OSError):
                # Text from outside may contain a lone surrogate, which UTF-8 can't encode.
                self._socket.sendto(message.encode(errors="backslashreplace"), self._address)
                return True
        return False


def _address(name: str) -> str | None:
    """Return the socket's address from a path or a name of the abstract namespace, written with an @."""
    if name.startswith("@"):
        return f"\0{name[1:]}"
    return name if name.startswith("/") else None
