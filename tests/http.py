"""A daemon's answers over HTTP, for the tests."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.clocks import HANG_SECONDS

Sample = tuple[str, frozenset[tuple[str, str]]]


def samples(text: str) -> dict[Sample, float]:
    """Return the value of each series of Prometheus' text format, by its name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Window:
    """A client of one daemon. `url` is that of its page."""

    def __init__(self, url: str) -> None:
        self.client = httpx.AsyncClient(base_url=url, trust_env=False, timeout=HANG_SECONDS)

    async def get(self, path: str) -> tuple[int, Any]:
        """Return an answer's status and its JSON."""
        response = await self.client.get(path)
        return response.status_code, response.json()

    async def metric(self, name: str, **labels: str) -> float | None:
        """Return the current value of a series; None if it is absent."""
        response = await self.client.get("/metrics")
        return samples(response.text).get((name, frozenset(labels.items())))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.aclose()


@contextlib.asynccontextmanager
async def mute(url: str, *requests: bytes) -> AsyncIterator[list[socket.socket]]:
    """Open connections that send this and never read."""
    address = urlsplit(url)
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        sockets = []
        for request in requests:
            peer = stack.enter_context(socket.socket())
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            peer.setblocking(False)
            await loop.sock_connect(peer, (address.hostname, address.port))
            with contextlib.suppress(BlockingIOError, ConnectionError):
                peer.send(request)
            sockets.append(peer)
        yield sockets
