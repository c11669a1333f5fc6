"""An HTTP server that answers by a script, in ways that the simulator never does."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from urllib.parse import parse_qsl, urlsplit

HANG = b""
"""An answer that never comes."""


@dataclass(frozen=True)
class Endless:
    """An answer that never ends: `head`, then `chunk` repeatedly, each after `pause` seconds."""

    head: bytes
    chunk: bytes
    pause: float = 0.0


Reply: TypeAlias = bytes | Endless


def answer(body: Any = None, *, status: int = 200, cut: int = 0, **headers: Any) -> bytes:
    """Return an answer; the last `cut` bytes of its body are never sent."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", f"content-length: {len(content)}", "connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content[: len(content) - cut]


@dataclass
class Request:
    """A request."""

    path: str
    parameters: dict[str, str]
    headers: dict[str, str]


@dataclass
class ScriptedServer:
    """Answers each request with the result of `script`, and records it."""

    script: Callable[[Request], Reply]
    asked: list[Request] = field(default_factory=list)
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError), contextlib.closing(writer):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            target = urlsplit(head[0].split(" ")[1])
            headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
            asked = Request(target.path, dict(parse_qsl(target.query)), headers)
            self.asked.append(asked)
            reply = self.script(asked)
            if reply == HANG:
                await reader.read()
            writer.write(reply.head if isinstance(reply, Endless) else reply)
            await writer.drain()
            while isinstance(reply, Endless):
                await asyncio.sleep(reply.pause)
                writer.write(reply.chunk)
                await writer.drain()


@contextlib.asynccontextmanager
async def scripted(script: Callable[[Request], Reply]) -> AsyncIterator[ScriptedServer]:
    """Run such a server."""
    server = ScriptedServer(script)
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(server.serve(reader, writer)))

    reader = await asyncio.start_server(accept, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{reader.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        reader.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
