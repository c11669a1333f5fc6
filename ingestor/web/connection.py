"""One connection to the HTTP server: it may not keep the server waiting, and makes room where there are too many.

uvicorn alone waits without end for a client that asks and does not read, and for one that sends half of a request. A
few of these would hold all connections that the server allows, and a probe of `/healthz` would find none.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

MAX_HEAD_BYTES = 16_384
"""Bytes that the parser is given at once. It checks its limit, which is the same, only when a head is not complete."""

_RESET = struct.pack("ii", 1, 0)


class ClientConnection(H11Protocol):
    """A connection that is aborted when it keeps us waiting longer than `timeout` seconds.

    We wait for its request: after its begin, and after each answer, whatever it sends meanwhile. And we wait for its
    reading, from when the kernel takes no more of an answer until it has taken all of it. When there are more than
    `most` connections, the one that has kept us waiting longest is aborted, or else the one whose answer began first: a
    probe, which asks at once, is the last to go.
    """

    def __init__(self, *, most: int, timeout: float, **options: Any) -> None:
        super().__init__(**options)
        self._most = most
        self._timeout = timeout
        self._timer: asyncio.TimerHandle | None = None
        self._since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request. Any byte that the kernel does not take of an answer pauses the writing."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)
        self._wait()
        if len(self.connections) > self._most:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        """Take a part of a request, which alone ends no waiting."""
        for start in range(0, len(data), MAX_HEAD_BYTES):
            if not self.transport.is_closing():
                super().data_received(data[start : start + MAX_HEAD_BYTES])
        self._note_request()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._wait()
        super().on_response_complete()  # which may begin with the next request
        self._note_request()

    def pause_writing(self) -> None:
        """Wait for the client to read."""
        super().pause_writing()
        self._wait()

    def resume_writing(self) -> None:
        """Go on with the answer, or wait for the next request."""
        super().resume_writing()
        if self._is_answering:
            self._note_request()
        else:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        self._stop_waiting()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """End at the server's stop: after the answer, unless that is not being read."""
        if self.flow.write_paused:
            self._abort()
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Refuse a malformed request; there is no way to do so in the middle of an answer."""
        if self._is_answering:
            self._abort()
        else:
            super().send_400_response(msg)

    @property
    def _is_answering(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is not None and not cycle.response_complete

    def _note_request(self) -> None:
        """Stop waiting if it is our turn now: there is a request, and its answer is being read."""
        if self._timer is not None and self._is_answering and not self.flow.write_paused:
            self._stop_waiting()

    def _wait(self) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(self._timeout, self._abort)

    def _stop_waiting(self) -> None:
        self._since = self.loop.time()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _abort(self) -> None:
        """Close at once, and let the kernel forget what it has not sent: it would wait for the client, too."""
        with contextlib.suppress(OSError):
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.transport.abort()

    def _make_room(self) -> None:
        others = (each for each in self.connections if isinstance(each, ClientConnection) and each is not self)
        oldest = min(others, key=lambda each: (each._timer is None, each._since))  # noqa: SLF001 - of the same class
        self.connections.discard(oldest)  # now, and not when its end is noticed: another one may come before
        oldest._abort()  # noqa: SLF001
