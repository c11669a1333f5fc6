"""The signals of the daemon's process, and how its C library returns memory."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import signal
from collections.abc import Callable, Iterator


def _existing(*names: str) -> frozenset[int]:
    """Return the signals of these names, as far as this system has them."""
    return frozenset(getattr(signal, name) for name in names if hasattr(signal, name))


ALWAYS_STOP = _existing("SIGTERM", "SIGINT", "SIGQUIT")
"""Signals that ask for a stop even if the process was started with them ignored, as a script's background jobs are."""

STOP = ALWAYS_STOP | _existing("SIGHUP", "SIGXCPU", "SIGPWR")
"""Signals that ask for a stop. One that was ignored when the process started, as SIGHUP by `nohup`, stays ignored."""

_FAULTS = _existing("SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGSYS", "SIGTRAP")
_HARMLESS = _existing("SIGCHLD", "SIGCONT", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGURG", "SIGWINCH", "SIGINFO")
_UNCATCHABLE = _existing("SIGKILL", "SIGSTOP")

MEANINGLESS = signal.valid_signals() - STOP - _FAULTS - _HARMLESS - _UNCATCHABLE
"""Signals that ask for nothing, and would end the process by default: SIGUSR1, SIGALRM, those of real time, others."""

_M_MMAP_THRESHOLD = -3
_LARGE = 2**20


class StopRequest:
    """Two events: `stop`, and `hurry` for a person who does not want to wait. `signal` names the first signal."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self.signal: str | None = None

    def __call__(self, name: str | None = None) -> None:
        """Take note of one request, maybe made by the signal of this name."""
        if self.stop.is_set():
            self.hurry.set()
        else:
            self.signal = name
            self.stop.set()

    async def pause(self, seconds: float) -> None:
        """Wait so long, or until a stop is asked for."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.stop.wait()


@contextlib.contextmanager
def stop_on_signals(ignored: Callable[[str], None]) -> Iterator[StopRequest]:
    """Turn signals into a `StopRequest` while the block runs.

    The first one of `STOP` asks for an orderly stop, the second for an immediate one. `ignored` is called with the name
    of each signal that means nothing.
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
            signal.signal(number, before[number] or signal.SIG_DFL)  # None: a handler that is not Python's


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"


def return_large_blocks() -> None:
    """Let the C library give blocks of 1 MiB or more back to the system when they are freed.

    The counter of occurrences is a table of some 20 MB that Python makes anew now and then. By default glibc keeps the
    freed one, small blocks settle in it, and the next table needs new memory (mallopt(3): the threshold is moved by the
    first such block that is freed, unless it is set). Other C libraries have no such setting, and need none.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
