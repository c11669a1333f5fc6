"""The daemon process's signals, and the setting of its C library for returning memory."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import signal
from collections.abc import Callable, Iterator


def _existing(*names: str) -> frozenset[int]:
    """Return the signals of these names that this system has."""
    return frozenset(getattr(signal, name) for name in names if hasattr(signal, name))


ALWAYS_STOP = _existing("SIGTERM", "SIGINT", "SIGQUIT")
"""Signals that stop the process even if it was started with them ignored, as a script's background jobs are."""

STOP = ALWAYS_STOP | _existing("SIGHUP", "SIGXCPU", "SIGPWR")
"""Signals that stop the process. One that was ignored at its start, as SIGHUP by `nohup`, stays ignored."""

_FAULTS = _existing("SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGSYS", "SIGTRAP")
_HARMLESS = _existing("SIGCHLD", "SIGCONT", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGURG", "SIGWINCH", "SIGINFO")
_UNCATCHABLE = _existing("SIGKILL", "SIGSTOP")

MEANINGLESS = signal.valid_signals() - STOP - _FAULTS - _HARMLESS - _UNCATCHABLE
"""Signals that mean nothing to the daemon but end a process by default: SIGUSR1, SIGALRM, real-time signals, others."""

_M_MMAP_THRESHOLD = -3
_LARGE = 2**20


class StopRequest:
    """Two events: `stop`, and `hurry` for an immediate stop. `signal` is the name of the first signal."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self.signal: str | None = None

    def __call__(self, name: str | None = None) -> None:
        """Request a stop; the second request asks for an immediate one. `name` is the signal's, if a signal asks."""
        if self.stop.is_set():
            self.hurry.set()
        else:
            self.signal = name
            self.stop.set()

    async def pause(self, seconds: float) -> None:
        """Wait `seconds`, or until a stop is requested."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.stop.wait()


@contextlib.contextmanager
def stop_on_signals(ignored: Callable[[str], None]) -> Iterator[StopRequest]:
    """Turn signals into a `StopRequest` while the block runs.

    The first signal of `STOP` requests an orderly stop, the second an immediate one. `ignored` is called with the name
    of each signal in `MEANINGLESS`.
    """
    request = StopRequest()
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in STOP | MEANINGLESS}
    taken = [number for number, handler in before.items() if number in ALWAYS_STOP or handler is signal.SIG_DFL]
    for number in taken:
        loop.add_signal_handler(number, request if number in STOP else ignored, _name(number))
    try:
        yield request
    finally:
        for number in taken:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number] or signal.SIG_DFL)  # None: the handler is not Python's


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"


def return_large_blocks() -> None:
    """Make the C library return freed blocks of 1 MiB or more to the system.

    Python reallocates the counter of occurrences, a table of some 20 MB, from time to time. By default glibc keeps the
    freed table, small blocks settle in it, and the next table needs new memory (mallopt(3): the first freed block of
    that size raises the threshold, unless it is set). Other C libraries lack this setting and don't need it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
