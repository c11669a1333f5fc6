"""A WebSocket server of raw bytes: it answers the handshake, and returns its client's frames one by one."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from websockets.utils import accept_key

from tests.fuzz.frames import CLOSE, FIN, PING, PONG, Deflater, cut, frame
from tests.proxy import reset

_EXTENSIONS = {
    None: "",
    True: "Sec-WebSocket-Extensions: permessage-deflate\r\n",
    False: "Sec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover\r\n",
}
"""The extension's parameters, by whether the server's compressor keeps its window between messages."""


class Client:
    """One client of the server. `on_pong` is called with the payload of each pong when it is read."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, chance: random.Random) -> None:
        self._reader, self._writer, self._chance = reader, writer, chance
        self._listening: asyncio.Task[None] | None = None
        self._is_finished = self._is_sending = False
        self._owed = b""
        self.deflate: Deflater | None = None
        self.on_pong: Callable[[bytes], None] = lambda _: None
        self.on_message: Callable[[bytes], None] = lambda _: None
        self.pieces = 0

    async def accept(self) -> bytes:
        """Read the handshake's request, and return the answer, still unsent, with or without compression."""
        request = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in request[1:] if line)
        key = next(line.split(": ", 1)[1] for line in request[1:] if line.lower().startswith("sec-websocket-key"))
        takes_over = self._chance.choice((None, None, True, False))
        if takes_over is not None and "permessage-deflate" in headers.get("sec-websocket-extensions", ""):
            self.deflate = Deflater(takes_over=takes_over)
        else:
            takes_over = None
        return (
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"{_EXTENSIONS[takes_over]}Sec-WebSocket-Accept: {accept_key(key)}\r\n\r\n"
        ).encode()

    async def send(self, data: bytes, *, is_last: bool = False) -> None:
        """Send bytes in pieces, most of which are read separately; nothing follows a close.

        After the last bytes, which may end within a frame, no ping is answered either.
        """
        self._is_sending = True
        for piece in cut(data, self._chance):
            if self._is_finished:
                return
            self._writer.write(piece)
            self.pieces += 1
            await asyncio.sleep(0)
        self._is_sending = is_last
        self._answer()
        await self._writer.drain()

    def listen(self) -> None:
        """Read the client's frames from now on: answer its pings and its close, and pass on its pongs and messages."""
        self._listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head, payload = await self._frame()
                if head == FIN | PING:
                    self._owed += frame(FIN | PONG, payload)
                    self._answer()
                elif head == FIN | PONG:
                    self.on_pong(payload)
                elif head == FIN | CLOSE:
                    self.finish()  # closing is the server's part
                else:
                    self.on_message(payload)

    def _answer(self) -> None:
        """Send the answers to the client's pings, once no frame of ours is half sent."""
        if not self._is_sending and not self._is_finished:
            owed, self._owed = self._owed, b""
            self._writer.write(owed)

    async def _frame(self) -> tuple[int, bytes]:
        head, size = await self._reader.readexactly(2)
        size &= 0x7F
        if size >= 126:
            size = int.from_bytes(await self._reader.readexactly(2 if size == 126 else 8), "big")
        mask = await self._reader.readexactly(4)
        payload = await self._reader.readexactly(size)
        return head, bytes(byte ^ mask[place % 4] for place, byte in enumerate(payload))

    async def gone(self) -> None:
        """Wait until the client has closed its side."""
        assert self._listening is not None
        await self._listening

    def finish(self) -> None:
        """End our side of the connection in order."""
        self._is_finished = True
        with contextlib.suppress(OSError):
            self._writer.write_eof()

    def reset(self) -> None:
        """Reset the connection."""
        reset(self._writer)

    async def close(self) -> None:
        """Close everything."""
        self._writer.transport.abort()
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


@asynccontextmanager
async def serving(talk: Callable[[Client], Awaitable[None]], chance: random.Random) -> AsyncIterator[str]:
    """Run a server, and yield its URL; each client meets `talk`, whose errors are raised at the end."""
    talks: list[asyncio.Task[None]] = []

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = Client(reader, writer, random.Random(chance.getrandbits(64)))
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await talk(client)
        finally:
            await client.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talks.append(asyncio.create_task(meet(reader, writer)))

    listener = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"ws://127.0.0.1:{listener.sockets[0].getsockname()[1]}/ws"
    finally:
        listener.close()
        for task in talks:
            task.cancel()
        for outcome in await asyncio.gather(*talks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
