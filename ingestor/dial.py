"""Connections to a name that has several addresses, of which some may be dead.

The addresses are looked up for each connection, since they change. An attempt is the whole of a connection, with its
handshakes: a dead member of a pool may accept connections and say nothing.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

STAGGER = 1.0
"""Seconds after which the next address is tried beside those that have not answered: a handshake round the world."""

MAX_ADDRESSES = 10
"""Addresses that are tried: a name with more has them for balance, and all of them dead must end in bounded time."""

_T = TypeVar("_T")


async def addresses_of(name: str, port: int) -> list[str]:
    """Return the addresses of a name, one of each family in turn. Raises OSError."""
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
    """Return what the first attempt brings that succeeds; start the next when one fails, or is late by `stagger`.

    `discard` gets what another one has brought as well. Raises ExceptionGroup with the failures, in the order of the
    addresses, when all have failed.
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
