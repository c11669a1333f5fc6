"""Starts a program as a unit's sandbox would, as far as a process can confine itself: system calls and capabilities.

`python -m tests.deploy.confine DROP-IN COMMAND …`. There is no service manager in a test, but the kernel's filter is
the same: an allow list of systemd's own groups, and beside it what the other options of the drop-in forbid. Which calls
an option forbids is said in systemd.exec(5). Mounts (ProtectSystem= and similar) are not tried.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import socket
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

LIBRARY = "libseccomp.so.2"
ALLOW, FAIL = 0x7FFF0000, 0x00050000
EQUAL, AT_LEAST, MASKED = 4, 5, 7
CTL_NNP = 3
UNKNOWN_CALL = -1
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
WRITE, EXEC, SHM_EXEC = 2, 4, 0o100000
NAMESPACES = (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)
FAMILIES = 64
MODES = {"chmod": 1, "fchmod": 1, "fchmodat": 2, "mkdir": 1, "mkdirat": 2, "mknod": 1, "mknodat": 2, "creat": 1}
SET_IDS = (0o4000, 0o2000)


class Comparison(ctypes.Structure):
    """One argument of a call: its number, how it is compared, and with what."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


def masked(argument: int, bits: int) -> Comparison:
    """All of these bits are set."""
    return Comparison(argument, MASKED, bits, bits)


class Filter:
    """The action for each system call: the rules', else the default."""

    def __init__(self, default: int) -> None:
        self._library = ctypes.CDLL(LIBRARY)
        self._library.seccomp_init.restype = ctypes.c_void_p
        self._context = ctypes.c_void_p(self._library.seccomp_init(ctypes.c_uint32(default)))
        self._done(self._library.seccomp_attr_set(self._context, CTL_NNP, ctypes.c_uint32(0)))

    def add(self, action: int, call: str, *comparisons: Comparison) -> None:
        """Calls that this machine does not have are left out."""
        number = self._library.seccomp_syscall_resolve_name(call.encode())
        if number == UNKNOWN_CALL:
            return
        array = (Comparison * len(comparisons))(*comparisons)
        self._done(
            self._library.seccomp_rule_add_array(
                self._context, ctypes.c_uint32(action), number, len(comparisons), array
            )
        )

    def load(self) -> None:
        self._done(self._library.seccomp_load(self._context))

    @staticmethod
    def _done(result: int) -> None:
        if result < 0:
            raise OSError(-result, os.strerror(-result))


def options(drop_in: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name, value in re.findall(r"^(\w+)=(.*)$", drop_in.read_text(), re.MULTILINE):
        found[name].append(value)
    return found


def groups() -> dict[str, list[str]]:
    """The members of each of systemd's groups: calls, and other groups."""
    shown = subprocess.run(["systemd-analyze", "syscall-filter"], capture_output=True, text=True, check=True).stdout
    found: dict[str, list[str]] = defaultdict(list)
    name = ""
    for line in shown.splitlines():
        if line.startswith(("@", "#")):
            name = line.strip() if line.startswith("@") else ""
        elif line.startswith("    ") and not line.strip().startswith("#"):
            found[name].append(line.strip())
    return found


def allowed(rules: list[str]) -> set[str]:
    """Return the calls that lines of SystemCallFilter= let through: each adds to those before it, or takes away."""
    known = groups()

    def calls(word: str) -> set[str]:
        return set().union(*map(calls, known[word])) if word.startswith("@") else {word}

    found = calls("@default") | {"execve"}
    for rule in rules:
        named = set().union(*map(calls, rule.lstrip("~").split()))
        found = found - named if rule.startswith("~") else found | named
    return found


def forbid(given: dict[str, list[str]], denied: int) -> Filter:
    """The calls that single options forbid."""
    rules = Filter(ALLOW)
    if given["MemoryDenyWriteExecute"] == ["yes"]:
        rules.add(denied, "mmap", masked(2, WRITE | EXEC))
        rules.add(denied, "mprotect", masked(2, EXEC))
        rules.add(denied, "pkey_mprotect", masked(2, EXEC))
        rules.add(denied, "shmat", masked(2, SHM_EXEC))
    if given["RestrictNamespaces"] == ["yes"]:
        for flag in NAMESPACES:
            rules.add(denied, "clone", masked(0, flag))
        rules.add(denied, "unshare")
        rules.add(denied, "setns")
        rules.add(FAIL | errno.ENOSYS, "clone3")
    if given["RestrictSUIDSGID"] == ["yes"]:
        for call, mode in MODES.items():
            for bit in SET_IDS:
                rules.add(denied, call, masked(mode, bit))
    if given["RestrictAddressFamilies"]:
        no_family = FAIL | errno.EAFNOSUPPORT
        ours = {int(getattr(socket, name)) for name in given["RestrictAddressFamilies"][0].split()}
        for family in set(range(FAMILIES)) - ours:
            rules.add(no_family, "socket", Comparison(0, EQUAL, family))
        rules.add(no_family, "socket", Comparison(0, AT_LEAST, FAMILIES))
    return rules


def confine(drop_in: Path) -> None:
    """Take from this process, for good, what the drop-in takes from a service."""
    given = options(drop_in)
    denied = FAIL | getattr(errno, given["SystemCallErrorNumber"][0])
    rules = Filter(denied)
    for call in allowed(given["SystemCallFilter"]):
        rules.add(ALLOW, call)
    prctl = ctypes.CDLL(None).prctl
    if os.geteuid() == 0:
        for capability in range(int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1):
            prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    forbid(given, denied).load()
    rules.load()


if __name__ == "__main__":
    confine(Path(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
