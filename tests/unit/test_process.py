from __future__ import annotations

import asyncio
import os
import signal

import pytest

from ingestor.service.process import MEANINGLESS, STOP, stop_on_signals
from tests.clocks import HANG_SECONDS


async def arrived(*signals: int) -> None:
    """Send signals to this process, and let the loop handle them."""
    for number in signals:
        os.kill(os.getpid(), number)
    for _ in range(3):
        await asyncio.sleep(0)


def untouched(_: str) -> None:
    raise AssertionError


@pytest.mark.parametrize("number", sorted(STOP), ids=lambda number: signal.Signals(number).name)
async def test_the_second_signal_makes_the_stop_immediate(number: int) -> None:
    """The second signal makes the stop immediate; SIGHUP and SIGQUIT stop the daemon, too."""
    before = signal.getsignal(number)
    with stop_on_signals(untouched) as request:
        await arrived(number)
        async with asyncio.timeout(HANG_SECONDS):
            await request.stop.wait()
        assert request.signal == signal.Signals(number).name
        assert not request.hurry.is_set()
        await arrived(number)
        async with asyncio.timeout(HANG_SECONDS):
            await request.hurry.wait()
    assert signal.getsignal(number) is before


async def test_other_signals_do_not_end_the_process() -> None:
    """Signals of users, of timers and of real time are reported by name."""
    names: list[str] = []
    taken = {number for number in MEANINGLESS if signal.getsignal(number) is signal.SIG_DFL}
    with stop_on_signals(names.append) as request:
        await arrived(*taken)
        async with asyncio.timeout(HANG_SECONDS):
            while len(names) < len(taken):
                await asyncio.sleep(0.01)
        assert not request.stop.is_set()
    assert {"SIGUSR1", "SIGUSR2", "SIGPROF", "SIGRTMIN", "SIGRTMIN+1"} <= set(names)


async def test_nohup_stays_in_effect() -> None:
    """SIGHUP stays ignored, also after the block."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals(untouched) as request:
            await arrived(signal.SIGHUP)
            assert not request.stop.is_set()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_every_fatal_signal_is_handled_or_listed() -> None:
    """A signal with a fatal default is a stop, meaningless, a fault of the program, or can't be caught."""
    users = {signal.SIGUSR1, signal.SIGUSR2, signal.SIGIO, signal.SIGSTKFLT, signal.SIGRTMIN, signal.SIGRTMAX}
    timers = {signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF}
    assert users | timers <= MEANINGLESS
    assert {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGPWR, signal.SIGXCPU} == STOP
    assert not {signal.SIGCHLD, signal.SIGWINCH, signal.SIGTSTP, signal.SIGABRT} & (STOP | MEANINGLESS)
