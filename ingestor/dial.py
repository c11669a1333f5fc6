"""Connections to a name with several addresses, some of which may be dead.

Each connection resolves the name again, because addresses change. An attempt includes the handshakes: a dead member
of a pool may accept connections and then send nothing.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

STAGGER = 1.0
"""Seconds until the next address is tried in parallel: time for a handshake round the world."""

MAX_ADDRESSES = 10
"""Maximum of addresses tried, so that a name whose addresses are all dead fails in bounded time."""

_T = TypeVar("_T")


async def addresses_of(name: str, port: int) -> list[str]:
    """Resolve a name; return its addresses, alternating between families. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    families: dict[int, list[str]] = {}
    for family, _, _, _, address in found:
        of_family, text = families.setdefault(family, []), str(address[0])
        if text not in of_family:
            of_family.append(text)
    longest = max(map(len, families.values()), default=0)
    return [each[place] for place in range(longest) for each in families.values() if place < len(each)][:MAX_ADDRESSES]


async def first_that_works(
    addresses: Sequence[str],
    attempt: Callable[[str], Awaitable[_T]],
    *,
    discard: Callable[[_T], Awaitable[None]],
    stagger: float = STAGGER,
) -> _T:
    """Return the result of the first successful attempt; start the next one after a failure or `stagger` seconds.

    `discard` receives the results of other successful attempts. Raises ExceptionGroup with the failures, in the order
    of the addresses, if all fail.
    """
    tasks: list[asyncio.Task[_T]] = []
    winner: asyncio.Task[_T] | None = None
    try:
        while winner is None:
            running = [task for task in tasks if not task.done()]
            has_more = len(tasks) < len(addresses)
            if has_more:
                tasks.append(asyncio.ensure_future(_run(attempt, addresses[len(tasks)])))
                running.append(tasks[-1])
            elif not running:
                raise ExceptionGroup("no address works", [_failure(task) for task in tasks])
            timeout = stagger if len(tasks) < len(addresses) else None
            done, _ = await asyncio.wait(running, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            winner = next((task for task in tasks if task in done and task.exception() is None), None)
        return winner.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in tasks:
            if task is not winner and not task.cancelled() and task.exception() is None:
                await discard(task.result())


async def _run(attempt: Callable[[str], Awaitable[_T]], address: str) -> _T:
    return await attempt(address)


def _failure(task: asyncio.Task[_T]) -> Exception:
    error = task.exception()
    if isinstance(error, Exception):
        return error
    raise error or RuntimeError("an attempt without an end")
