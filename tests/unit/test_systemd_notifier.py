from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from ingestor.service.systemd import SystemdNotifier


def listening(address: str) -> socket.socket:
    """Return a socket like the service manager's."""
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(address)
    manager.setblocking(False)
    return manager


def said(manager: socket.socket) -> list[str]:
    found = []
    while True:
        try:
            found.append(manager.recv(4096).decode())
        except BlockingIOError:
            return found


@pytest.mark.parametrize("is_abstract", [False, True])
def test_messages_to_the_manager(tmp_path: Path, is_abstract: bool) -> None:
    """The socket may be a path or an abstract name; a status is sent only if it changed, in one line."""
    name = f"@ingestor-test-{os.getpid()}" if is_abstract else str(tmp_path / "notify")
    with listening(name.replace("@", "\0")) as manager:
        notifier = SystemdNotifier({"NOTIFY_SOCKET": name})
        notifier.starting(60)
        notifier.ready()
        notifier.status("all\nwell")
        notifier.status("all\nwell")
        notifier.alive()
        notifier.stopping()
        notifier.close()
        notifier.ready()
        assert said(manager) == [
            "EXTEND_TIMEOUT_USEC=60000000",
            "READY=1",
            "STATUS=all well",
            "WATCHDOG=1",
            "STOPPING=1",
        ]


@pytest.mark.parametrize("environment", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1234"}])
def test_nothing_is_sent_without_a_manager(environment: dict[str, str]) -> None:
    notifier = SystemdNotifier(environment)
    notifier.ready()
    notifier.close()


def test_a_status_that_utf8_lacks_is_escaped(tmp_path: Path) -> None:
    """A server's text in the status is escaped, and does not end the task that feeds the watchdog."""
    name = str(tmp_path / "notify")
    with listening(name) as manager:
        notifier = SystemdNotifier({"NOTIFY_SOCKET": name})
        notifier.status("stream: \ud800")
        assert said(manager) == ["STATUS=stream: \\ud800"]
        notifier.close()


def test_messages_that_a_full_queue_refused_are_sent_again(tmp_path: Path) -> None:
    """A message that a full queue refused is sent again, so that a busy manager learns that the start is over."""
    name = str(tmp_path / "notify")
    with listening(name) as manager:
        notifier = SystemdNotifier({"NOTIFY_SOCKET": name})
        for _ in range(10_000):
            notifier.alive()
        notifier.ready()
        notifier.status("well")
        assert {*said(manager)} == {"WATCHDOG=1"}
        for _ in range(2):
            notifier.ready()
            notifier.status("well")
        assert said(manager) == ["READY=1", "STATUS=well"]
        notifier.close()


def test_a_stop_while_starting(tmp_path: Path) -> None:
    """After a stop the notifier neither asks for more time to start nor reports readiness."""
    name = str(tmp_path / "notify")
    with listening(name) as manager:
        notifier = SystemdNotifier({"NOTIFY_SOCKET": name})
        notifier.stopping()
        notifier.starting(60)
        notifier.ready()
        assert said(manager) == ["STOPPING=1"]
        notifier.close()


def test_a_closed_or_stuck_manager_does_not_block(tmp_path: Path) -> None:
    """Neither an unread socket nor a closed one can stop the recorder."""
    name = str(tmp_path / "notify")
    with listening(name):
        notifier = SystemdNotifier({"NOTIFY_SOCKET": name})
        for _ in range(10_000):
            notifier.alive()
    notifier.alive()
    notifier.close()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_needs_our_process_id(environment: dict[str, str], expected: float | None) -> None:
    assert SystemdNotifier(environment).watchdog_seconds == expected
