"""A server of raw bytes for behaviour that no library allows: it answers the handshake, and then follows a script."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import zlib
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

from websockets.utils import accept_key

from ingestor.protocol.messages import AUTHENTICATED

TEXT, BINARY, MORE, LAST, CLOSE, PING, PONG = 0x81, 0x82, 0x00, 0x80, 0x88, 0x89, 0x8A
FIRST, DEFLATED, FIRST_DEFLATED = 0x01, 0xC1, 0x41


def frame(head: int, payload: bytes = b"", size: int | None = None) -> bytes:
    """Return a server's frame; `size` replaces the length in its header."""
    size = len(payload) if size is None else size
    if size < 126:
        return bytes([head, size]) + payload
    if size < 65536:
        return bytes([head, 126]) + size.to_bytes(2, "big") + payload
    return bytes([head, 127]) + size.to_bytes(8, "big") + payload


def deflated(payload: bytes) -> bytes:
    """Return a payload as permessage-deflate encodes it."""
    compressor = zlib.compressobj(wbits=-15)
    return (compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


class Talk:
    """One client, which is read only by the script."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, *frames: bytes) -> None:
        """Send bytes, and wait until there is room for more."""
        self.writer.write(b"".join(frames))
        await self.writer.drain()

    async def receive(self) -> tuple[int, bytes]:
        """Return the first byte of the client's next frame, and its payload."""
        head, size = await self.reader.readexactly(2)
        size &= 0x7F
        if size >= 126:
            size = int.from_bytes(await self.reader.readexactly(2 if size == 126 else 8), "big")
        mask = await self.reader.readexactly(4)
        payload = await self.reader.readexactly(size)
        return head, bytes(byte ^ mask[place % 4] for place, byte in enumerate(payload))

    async def answer_pings(self, count: int) -> None:
        """Answer so many pings and ignore other frames."""
        while count:
            head, payload = await self.receive()
            if head == PING:
                await self.send(frame(PONG, payload))
                count -= 1

    async def shake_hands(self, extra: str = "") -> None:
        """Upgrade the connection, with additional headers if given."""
        request = await self.reader.readuntil(b"\r\n\r\n")
        key = next(line for line in request.decode().split("\r\n") if line.lower().startswith("sec-websocket-key"))
        answer = accept_key(key.partition(":")[2].strip())
        lines = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        await self.send(f"{lines}{extra}Sec-WebSocket-Accept: {answer}\r\n\r\n".encode())

    async def welcome(self, *, deflate: bool = False) -> None:
        """Answer the handshake, and accept any token."""
        await self.shake_hands("Sec-WebSocket-Extensions: permessage-deflate\r\n" if deflate else "")
        await self.receive()
        await self.send(frame(TEXT, AUTHENTICATED))


class Hostile:
    """Listens on a port of its own while entered; each client meets the script, then a cut connection.

    Its socket buffers are small, so that a client soon notices if it is not read.
    """

    def __init__(self, script: Callable[[Talk], Awaitable[None]]) -> None:
        self._script = script
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.clients = 0
        self.url = ""

    async def __aenter__(self) -> Self:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        self.url = f"ws://127.0.0.1:{listener.getsockname()[1]}/ws"
        self._server = await asyncio.start_server(self._serve, sock=listener, limit=1024)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.clients += 1
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await self._script(Talk(reader, writer))
        writer.transport.abort()
