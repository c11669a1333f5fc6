"""One connection to the HTTP server, with a timeout; the oldest is closed if there are too many.

uvicorn alone waits without end for a client that does not read its answer or sends half a request. A few such clients
would hold all connections that the server allows, and a probe of `/healthz` would get none.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

MAX_HEAD_BYTES = 16_384
"""Bytes given to the parser at once. Its own limit, which is the same, applies only to incomplete heads."""

_RESET = struct.pack("ii", 1, 0)


class ClientConnection(H11Protocol):
    """A connection that is aborted if the server waits for it longer than `timeout` seconds.

    The server waits for a complete request, after the start and after each answer, whatever the client sends meanwhile.
    It also waits for a client to read, from when the kernel accepts no more of an answer until it has accepted all.
    With more than `most` connections, the one that has been waited for longest is aborted, or else the one whose answer
    began first. A probe sends its request at once, so it is the last to be aborted.
    """

    def __init__(self, *, most: int, timeout: float, **options: Any) -> None:
        super().__init__(**options)
        self._most = most
        self._timeout = timeout
        self._timer: asyncio.TimerHandle | None = None
        self._since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request. Writing pauses as soon as the kernel refuses a byte."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)
        self._wait()
        if len(self.connections) > self._most:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        """Read a part of a request. Only a complete request ends the wait."""
        for start in range(0, len(data), MAX_HEAD_BYTES):
            if not self.transport.is_closing():
                super().data_received(data[start : start + MAX_HEAD_BYTES])
        self._note_request()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._wait()
        super().on_response_complete()  # which may start the next request
        self._note_request()

    def pause_writing(self) -> None:
        """Wait for the client to read."""
        super().pause_writing()
        self._wait()

    def resume_writing(self) -> None:
        """Continue the answer, or wait for the next request."""
        super().resume_writing()
        if self._is_answering:
            self._note_request()
        else:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._stop_waiting()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Close at the server's stop: after the answer, or at once if the client does not read it."""
        if self.flow.write_paused:
            self._abort()
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Refuse a malformed request; in the middle of an answer only an abort can."""
        if self._is_answering:
            self._abort()
        else:
            super().send_400_response(msg)

    @property
    def _is_answering(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is not None and not cycle.response_complete

    def _note_request(self) -> None:
        """Stop the timer if there is a request and the client reads its answer."""
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
        """Close at once and discard unsent data: otherwise the kernel would wait for the client."""
        with contextlib.suppress(OSError):
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.transport.abort()

    def _make_room(self) -> None:
        others = (each for each in self.connections if isinstance(each, ClientConnection) and each is not self)
        oldest = min(others, key=lambda each: (each._timer is None, each._since))  # noqa: SLF001 - of the same class
        self.connections.discard(oldest)  # now: another connection may come before its end is noticed
        oldest._abort()  # noqa: SLF001
