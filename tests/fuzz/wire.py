"""Frames on a raw socket to the real connection: all messages are delivered as they were sent, and nothing else.

The server fragments, compresses, interleaves control frames, cuts at any place and breaks rules.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ingestor.stream.connection import closing_error, open_connection
from tests.fuzz.frames import FIN, PING, PONG, TEXT, Deflater, Ending, ending, frame, message
from tests.fuzz.server import Client, serving
from tests.fuzz.target import Case, Counts

_SIZES = (0, 1, 90, 90, 90, 124, 125, 126, 127, 300, 65_535, 65_536)


@dataclass
class Script:
    """The sent bytes, the messages to be received, and the number of messages before each ping, by its payload."""

    wire: bytes = b""
    frames: int = 0
    messages: list[tuple[bytes, bool]] = field(default_factory=list)
    before: dict[bytes, int] = field(default_factory=dict)


def compose(chance: random.Random, deflate: Deflater | None) -> Script:
    """Draw the server's bytes between its greeting and its end."""
    script = Script()
    frames: list[bytes] = []
    for _ in range(chance.choice((3, 30, 300))):
        draw = chance.random()
        if draw < 0.1:
            payload = f"ping {len(script.before)}".encode()
            script.before[payload] = len(script.messages)
            frames.append(frame(FIN | PING, payload))
        elif draw < 0.15:
            frames.append(frame(FIN | PONG, chance.randbytes(chance.randint(0, 125))))
        else:
            size = chance.choice(_SIZES[:-2] if draw < 0.995 else _SIZES)
            payload = chance.randbytes(size) if chance.random() < 0.5 else b"{" * size
            binary = chance.random() < 0.2
            script.messages.append((payload, binary))
            frames += message(payload, chance, binary=binary, deflate=deflate)
    script.frames = len(frames)
    script.wire = b"".join(frames)
    return script


async def case(chance: random.Random) -> Counts:
    """Test one connection."""
    received: list[tuple[bytes, bool]] = []
    script, last = Script(), Ending(b"", ending(chance, deflates=False).reason)
    counts: Counts = Counter()
    proved = 0

    def on_pong(payload: bytes) -> None:
        nonlocal proved
        proved = script.before[payload]
        assert received[:proved] == script.messages[:proved], (
            f"{payload!r} was answered before all messages were handed on"
        )

    async def talk(client: Client) -> None:
        nonlocal script, last
        greeting = await client.accept()
        script = compose(chance, client.deflate)
        last = ending(chance, deflates=client.deflate is not None)
        client.on_pong = on_pong
        client.listen()
        trailing = frame(FIN | TEXT, b"too late") if last.is_final else b""
        await client.send(greeting + script.wire + last.wire + trailing)
        counts.update(connections=1, frames=script.frames, pieces=client.pieces)
        if last.is_reset:
            client.reset()
            return
        if not last.is_final:
            client.finish()
        await client.gone()

    def on_messages(payloads: Sequence[bytes], binary: bool) -> None:
        received.extend((payload, binary) for payload in payloads)

    async with serving(talk, chance) as url, open_connection(url) as connection:
        connection.attach(on_messages)
        await connection.wait_closed()
        found = closing_error(connection).reason
    if last.is_reset:  # unread bytes may be lost with it
        assert received == script.messages[: len(received)]
        assert len(received) >= proved
    else:
        _compare(received, script.messages)
        assert found is last.reason, f"the session ended by {last.reason}, but {found} is recorded"
    counts["messages"] += len(received)
    return counts


def _compare(received: list[tuple[bytes, bool]], sent: list[tuple[bytes, bool]]) -> None:
    for number, (ours, theirs) in enumerate(zip(received, sent, strict=False)):
        assert ours == theirs, f"message {number} was sent as {theirs!r:.80}, and received as {ours!r:.80}"
    assert len(received) == len(sent), f"{len(sent)} messages were sent, and {len(received)} received"


@asynccontextmanager
async def target(directory: Path) -> AsyncIterator[Case]:
    """Run the cases, which need nothing."""
    yield case
