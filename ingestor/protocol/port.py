"""The port of a stream's server."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve

PATH = "/ws"
PORT = 5005
"""The port of the official client's environment `local`."""


async def listen(
    handler: Callable[[ServerConnection], Awaitable[None]], host: str, port: int, *, name: str, **options: Any
) -> Server:
    """Listen for WebSocket connections. Raises OSError.

    The library logs under `ingestor.<name>`, which is muted: clients that disconnect without a closing handshake are
    expected.
    """
    logger = logging.getLogger(f"ingestor.{name}")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
    return await serve(handler, host, port, logger=logger, **options)


def port_of(server: Server) -> int:
    """Return the port that a server listens on."""
    return int(next(iter(server.sockets)).getsockname()[1])
