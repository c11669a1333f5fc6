"""The login of the stream: the client's first message is its token, or the server answers an error and closes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from ingestor.protocol.messages import error_message

AUTHENTICATION_TIMEOUT = 10.0
"""Seconds for a client to authenticate."""

SEND_TIMEOUT = 5.0
"""Seconds for a client to accept its last message."""


async def receive_login(connection: ServerConnection, timeout: float) -> str | bytes | None:
    """Return a client's first message; None if none arrives within `timeout` seconds, or the client disconnects."""
    try:
        async with asyncio.timeout(timeout):
            return await connection.recv()
    except (TimeoutError, ConnectionClosed):
        return None


def token_of(message: str | bytes) -> str | None:
    """Return the token of the documented authentication in a text frame; None for any other message."""
    try:
        content: Any = json.loads(message) if isinstance(message, str) else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("type") != "authenticate":
        return None
    data = content.get("data")
    token = data.get("token") if isinstance(data, dict) else None
    return token if isinstance(token, str) else None


async def refuse(connection: ServerConnection, text: str) -> None:
    """Send an error to a client that may be gone, or not read. The connection closes when its handler returns."""
    with contextlib.suppress(ConnectionClosed, TimeoutError):
        async with asyncio.timeout(SEND_TIMEOUT):
            await connection.send(error_message(text), text=True)
