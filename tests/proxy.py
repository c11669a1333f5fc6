"""A TCP proxy that disturbs connections on request."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
import struct
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit, urlunsplit

CHUNK = 65536


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Forward everything, including the end."""
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()
    writer.close()


def reset(writer: asyncio.StreamWriter) -> None:
    """Reset a connection instead of closing it in order."""
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Proxy:
    """Listens on a port of its own before a server while entered. With `context` it speaks TLS.

    Each attribute affects the following bytes, in both directions unless stated otherwise.
    """

    def __init__(self, url: str, *, context: ssl.SSLContext | None = None, seed: int = 0) -> None:
        self._parts = urlsplit(url)
        self._context = context
        self._random = random.Random(seed)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self._cut_next = False
        self.port = 0
        self.delay = 0.0
        """Seconds by which each piece is delayed."""
        self.refuses = False
        """Whether new connections are ended at once."""
        self.mutes_server = False
        """Whether the server's bytes are lost while the connection stays."""
        self.hold_after: int | None = None
        """After how many more bytes from clients `hold` begins by itself."""
        self.most_unanswered: int | None = None
        """How many bytes a client may send between two answers; later bytes are lost, and nothing answers."""
        self.cuts_unanswered = False
        """Whether such a connection is ended instead."""
        self.bytes_per_second: float | None = None
        """The rate at which bytes from clients are forwarded."""
        self.upstream_ports: list[int] = []
        """Our ports towards the server, in the order of their opening."""

    @property
    def url(self) -> str:
        """Return the server's URL through this proxy."""
        userinfo, at, _ = self._parts.netloc.rpartition("@")
        return urlunsplit(self._parts._replace(netloc=f"{userinfo}{at}localhost:{self.port}"))

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "localhost", 0, ssl=self._context, family=socket.AF_INET)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Reset every connection."""
        for writer in tuple(self._writers):
            reset(writer)

    def cut_in_the_middle(self) -> None:
        """Forward a part of the server's next piece, then reset its connection."""
        self._cut_next = True

    def hold(self) -> None:
        """Forward nothing, and close nothing: a half-open connection."""
        self._flows.clear()

    def release(self) -> None:
        """Forward again, first the held bytes."""
        self._flows.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuses:
            reset(writer)
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(self._parts.hostname, self._parts.port)
        except OSError:
            reset(writer)
            return
        self.upstream_ports.append(far_writer.get_extra_info("sockname")[1])
        ends = {writer, far_writer}
        unanswered = [0]
        self._writers |= ends
        for task in (
            asyncio.create_task(self._pass(reader, far_writer, ends, unanswered, from_server=False)),
            asyncio.create_task(self._pass(far_reader, writer, ends, unanswered, from_server=True)),
        ):
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _wait_before(self, size: int, *, from_server: bool) -> None:
        """Delay a piece of so many bytes."""
        if self.delay:
            await asyncio.sleep(self.delay)
        await self._flows.wait()
        if self.bytes_per_second is not None and not from_server:
            await asyncio.sleep(size / self.bytes_per_second)

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        ends: set[asyncio.StreamWriter],
        unanswered: list[int],
        *,
        from_server: bool,
    ) -> None:
        try:
            while data := await reader.read(CHUNK):
                unanswered[0] = 0 if from_server else unanswered[0] + len(data)
                if self.most_unanswered is not None and unanswered[0] > self.most_unanswered:
                    while not self.cuts_unanswered and await reader.read(CHUNK):
                        pass
                    break
                await self._wait_before(len(data), from_server=from_server)
                if from_server and self.mutes_server:
                    continue
                if not from_server and self.hold_after is not None:
                    self.hold_after -= len(data)
                    if self.hold_after <= 0:
                        self.hold_after = None
                        self.hold()
                        await self._flows.wait()
                if from_server and self._cut_next:
                    self._cut_next = False
                    writer.write(data[: self._random.randrange(len(data))])
                    await asyncio.sleep(0.01)  # let the bytes leave before the reset
                    break
                writer.write(data)
                await writer.drain()
            else:
                writer.close()
                return
        except OSError:
            pass
        finally:
            self._writers -= {end for end in ends if end.is_closing()}
        for end in ends:
            reset(end)
        self._writers -= ends
