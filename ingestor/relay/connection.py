"""A client's connection: it waits in the lobby for its authentication, and may send little."""

from __future__ import annotations

import asyncio
import socket
from typing import Any, cast

from websockets.asyncio.server import ServerConnection
from websockets.protocol import State

from ingestor.protocol.messages import error_message
from ingestor.relay.admission import Lobby, Welcome
from ingestor.relay.encoder import text_frame

BURST_BYTES, BYTES_PER_SECOND = 65_536, 4096.0
"""Bytes that a client may send at once, and in the long run: it has nothing to send but its login, pings and pongs."""

TCP_USER_TIMEOUT_MS = 90_000
"""The kernel ends a connection whose client acknowledges nothing for so long. Pings see to it that it has to."""

TOO_MUCH = "You send too much: this stream expects your authentication and an occasional ping"


class RelayConnection(ServerConnection):
    """One connection. It waits in the lobby until `admit`, or its end."""

    def __init__(self, lobby: Lobby, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._lobby = lobby
        self._waits_at: str | None = None
        self._allowance = float(BURST_BYTES)
        self._allowed_at = self.loop.time()
        self.is_welcome = True
        """Whether the lobby has room; otherwise the handshake is refused."""

    @property
    def address(self) -> str:
        """The client's address, without its port."""
        return str((self.remote_address or ("unknown",))[0])

    def admit(self) -> None:
        """Leave the lobby."""
        if self._waits_at is not None:
            self._lobby.leave(self._waits_at)
            self._waits_at = None

    # Called by asyncio.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Enter the lobby, or close at once if there is a flood."""
        super().connection_made(transport)
        self._waits_at = self.address
        welcome = self._lobby.enter(self._waits_at)
        self.is_welcome = welcome is Welcome.ADMITTED
        if welcome is Welcome.DROPPED:
            self.transport.abort()
        elif (raw := transport.get_extra_info("socket")) is not None:
            _set_timeout(raw)

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave the lobby."""
        self.admit()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read what is within the client's allowance, and end the connection of a client that sends more.

        Each ping is answered, so this also limits the answers that wait for a client that does not read.
        """
        now = self.loop.time()
        refilled = self._allowance + (now - self._allowed_at) * BYTES_PER_SECOND
        self._allowance, self._allowed_at = min(refilled, BURST_BYTES) - len(data), now
        if self._allowance < 0:
            self._end_flood()
            return
        super().data_received(data)

    def _end_flood(self) -> None:
        """Close, after an error if the client can read one."""
        if self.protocol.state is not State.OPEN or self.paused:
            self.transport.abort()
            return
        self.transport.pause_reading()
        self.transport.write(text_frame(error_message(TOO_MUCH)))
        self.protocol.fail(1008)
        self.send_data()
        self.transport.close()


def relay_connection(connection: ServerConnection) -> RelayConnection:
    """Return a connection of the relay's port as what it is."""
    return cast("RelayConnection", connection)


def _set_timeout(raw: socket.socket) -> None:
    if raw.family in {socket.AF_INET, socket.AF_INET6} and hasattr(socket, "TCP_USER_TIMEOUT"):
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TCP_USER_TIMEOUT_MS)
