"""A name with several addresses on this machine, some of which swallow packets."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator
from typing import Any

import pytest


def free_port(*hosts: str) -> int:
    """A port that no socket of these addresses uses, below the range that systems give to connections."""
    for port in random.sample(range(10_000, 30_000), 100):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for host in hosts:
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                stack.enter_context(socket.socket(family)).bind((host, port))
            return port
    raise AssertionError(f"a hundred ports were taken on {', '.join(hosts)}")


@contextlib.contextmanager
def swallowing(host: str, port: int) -> Iterator[None]:
    """Let an address swallow packets: its queue of connections is full, so the system never answers."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(socket.socket(family))
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reader.bind((host, port))
        reader.listen(0)
        for _ in range(4):
            client = stack.enter_context(socket.socket(family))
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.connect((host, port))
        yield


def resolve(monkeypatch: pytest.MonkeyPatch, names: dict[str, list[str]]) -> None:
    """Resolve names to these addresses in order; the lists may be changed later."""
    usual: Any = socket.getaddrinfo

    def lookup(host: Any, port: Any, *args: Any, **kwargs: Any) -> list[Any]:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in names:
            found: list[Any] = usual(host, port, *args, **kwargs)
            return found
        return [each for address in names[name] for each in usual(address, port, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)


def prefer(address: str) -> None:
    """Put an address before the others of `localhost`, for the rest of this process."""
    usual: Any = socket.getaddrinfo

    def lookup(host: Any, port: Any, *args: Any, **kwargs: Any) -> list[Any]:
        names = [address, host] if host in {"localhost", b"localhost"} else [host]
        return [each for name in names for each in usual(name, port, *args, **kwargs)]

    socket.getaddrinfo = lookup
