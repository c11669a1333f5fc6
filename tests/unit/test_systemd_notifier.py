from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from ingestor.service.systemd import SystemdNotifier


def listening(address: str) -> socket.socket:
    """A socket such as the service manager has."""
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
    """By a path or by a name of the abstract namespace; a status only where it is a new one, and in one line."""
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
    """A server's text may be in it, and must not end what watches the daemon."""
    name = str(tmp_path / "notify")
    with listening(name) as manager:
        notifier = SystemdNotifier({"NOTIFY_SOCKET": name})
        notifier.status("stream: \ud800")
        assert said(manager) == ["STATUS=stream: \\ud800"]
        notifier.close()


def test_messages_that_a_full_queue_refused_are_sent_again(tmp_path: Path) -> None:
    """Or a manager that was busy for a moment would wait for a start that is over, and end it."""
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
    """Who stops asks for no more time to start, and is not ready any more."""
    name = str(tmp_path / "notify")
    with listening(name) as manager:
        notifier = SystemdNotifier({"NOTIFY_SOCKET": name})
        notifier.stopping()
        notifier.starting(60)
        notifier.ready()
        assert said(manager) == ["STOPPING=1"]
        notifier.close()


def test_a_manager_that_is_gone_or_stuck_does_not_block(tmp_path: Path) -> None:
    """Neither a socket that nobody reads nor one that nobody holds can stop the recorder."""
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
