from __future__ import annotations

import asyncio
import itertools
import socket
import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st
from websockets.client import ClientProtocol
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.uri import parse_uri
from websockets.utils import accept_key

from ingestor.stream.connection import FeedConnection
from ingestor.stream.decoder import MAX_MESSAGE_BYTES
from ingestor.stream.frames import frame_size, whole_texts


class LibraryConnection(FeedConnection):
    """The same connection with every frame read by the library."""

    def data_received(self, data: bytes) -> None:
        self._give(data)


DEFLATE = "Sec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover\r\n"


def deflated(payload: bytes) -> bytes:
    """Return a payload as permessage-deflate encodes it."""
    compressor = zlib.compressobj(wbits=-15)
    return (compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


def frame(head: int, payload: bytes, *, mask: bool = False) -> bytes:
    """Return a frame with the shortest form of its length."""
    size = len(payload)
    if size < 126:
        length = bytes([size])
    elif size < 65536:
        length = bytes([126]) + size.to_bytes(2, "big")
    else:
        length = bytes([127]) + size.to_bytes(8, "big")
    if mask:
        return bytes([head, length[0] | 0x80]) + length[1:] + bytes(4) + payload
    return bytes([head]) + length + payload


PAYLOADS = st.one_of(
    st.binary(max_size=10),
    st.integers(0, 300).map(lambda size: b"t" * size),
    st.sampled_from([b"x" * 65535, b"y" * 65536, b"z" * (MAX_MESSAGE_BYTES + 1)]),
)
TEXT, BINARY, CLOSE, PING, PONG = 0x81, 0x82, 0x88, 0x89, 0x8A
FRAMES = st.one_of(
    st.builds(frame, st.just(TEXT), PAYLOADS),
    st.builds(frame, st.just(TEXT), st.binary(max_size=130)),
    st.builds(frame, st.sampled_from([BINARY, 0x01, 0x02, 0x00, 0x80]), PAYLOADS),
    st.builds(frame, st.sampled_from([PING, PONG]), st.binary(max_size=125)),
    st.builds(frame, st.sampled_from([0x01, 0x80, PING, TEXT]), st.binary(max_size=5)),
    st.builds(frame, st.sampled_from([0xC1, 0xC2, 0x41]), PAYLOADS.map(deflated)),
)
PROTOCOL_ERRORS = st.one_of(
    st.builds(frame, st.sampled_from([0xC1, 0x83, 0x8B, 0x91, 0xFF, 0x09]), st.binary(max_size=200)),
    st.builds(frame, st.just(TEXT), st.binary(max_size=200), mask=st.just(True)),
    st.sampled_from([frame(CLOSE, b"\x03\xe8bye"), frame(CLOSE, b""), frame(CLOSE, b"\x00")]),
    st.binary(max_size=12),
)
STREAMS = st.lists(st.one_of(FRAMES, FRAMES, FRAMES, PROTOCOL_ERRORS), max_size=12)
SWITCHING, FORBIDDEN = "HTTP/1.1 101 Switching Protocols", "HTTP/1.1 403 Forbidden"
ANSWERS = st.sampled_from([SWITCHING, FORBIDDEN, "Hello"])


async def received(
    kind: type[FeedConnection], answer: str, chunks: Sequence[bytes], *, ends: bool, deflate: bool = False
) -> tuple[list[tuple[bytes, bool]], list[Any]]:
    """Feed a connection read by read; return the messages and the connection's state."""
    messages: list[tuple[bytes, bool]] = []
    connection, theirs = await connected(kind)
    connection.attach(lambda payloads, binary: messages.extend((payload, binary) for payload in payloads))
    greeting = welcome(connection, answer, deflate=deflate)
    marked = greeting + chunks[0] if chunks else greeting
    for chunk in (marked, *chunks[1:]):
        connection.data_received(chunk)
    if ends:
        connection.eof_received()
    protocol = connection.protocol
    state = [
        protocol.state,
        type(protocol.handshake_exc),
        protocol.close_rcvd,
        protocol.close_sent,
        protocol.close_rcvd_then_sent,
        repr(protocol.parser_exc),
    ]
    connection.transport.abort()
    theirs.close()
    return messages, state


async def connected(kind: type[FeedConnection] = FeedConnection) -> tuple[FeedConnection, socket.socket]:
    """Return a connection that has asked for an upgrade, and the other end."""
    offers = [ClientPerMessageDeflateFactory()]
    protocol = ClientProtocol(parse_uri("ws://localhost/"), max_size=MAX_MESSAGE_BYTES, extensions=offers)
    request = protocol.connect()
    protocol.send_request(request)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    _, connection = await asyncio.get_running_loop().create_connection(
        lambda: kind(protocol, ping_interval=None, close_timeout=1), sock=ours
    )
    connection.request = request
    return connection, theirs


def welcome(connection: FeedConnection, answer: str, *, deflate: bool = False) -> bytes:
    """Return the server's answer to the upgrade."""
    assert connection.request is not None
    return (
        f"{answer}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{DEFLATE if deflate else ''}"
        f"Sec-WebSocket-Accept: {accept_key(connection.request.headers['Sec-WebSocket-Key'])}\r\n\r\n"
    ).encode()


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    """Return the same bytes, divided as the network may deliver them."""
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@settings(max_examples=400, deadline=None)
@given(STREAMS, st.lists(st.integers(0, 2**20), max_size=12), ANSWERS, st.booleans(), st.booleans())
@example([frame(TEXT, b"a"), frame(TEXT, b"b" * 126)], [1, 2, 3, 4, 5, 6], SWITCHING, True, False)
@example([frame(0x01, b"a"), frame(TEXT, b"b"), frame(0x80, b"c")], [], SWITCHING, True, False)
@example([frame(CLOSE, b""), frame(TEXT, b"late")], [], SWITCHING, False, False)
@example([frame(0xC1, deflated(b"a")), frame(PING, b""), frame(TEXT, b"b")], [], SWITCHING, False, True)
def test_the_fast_path_agrees_with_the_library(
    frames: list[bytes], places: list[int], answer: str, ends: bool, deflate: bool
) -> None:
    """Messages, their kind and order, and the end of the connection agree, whatever is sent and however it is cut."""
    chunks = cut(b"".join(frames), places)

    async def both() -> None:
        ours = await received(FeedConnection, answer, chunks, ends=ends, deflate=deflate)
        assert ours == await received(LibraryConnection, answer, chunks, ends=ends, deflate=deflate)

    asyncio.run(both())


@given(st.integers(0, 60), st.sampled_from([SWITCHING, FORBIDDEN]))
def test_the_handshake_may_be_cut_anywhere(place: int, answer: str) -> None:
    """Messages in the same read as the end of the answer are received."""

    class ByteByByte(FeedConnection):
        def data_received(self, data: bytes) -> None:
            for part in cut(data, [place * 4, place * 4 + 2, len(data) - place]):
                super().data_received(part)

    chunks = [frame(TEXT, b"first") + frame(TEXT, b"second"), frame(TEXT, b"third")]

    async def both() -> None:
        found = await received(ByteByByte, answer, chunks, ends=False)
        assert found == await received(LibraryConnection, answer, chunks, ends=False)
        assert len(found[0]) == (3 if "101" in answer else 0)

    asyncio.run(both())


@given(st.lists(FRAMES, max_size=5), st.integers(0, 2**21))
def test_control_frames_between_messages(frames: list[bytes], place: int) -> None:
    """The size of each frame is known as soon as its header is complete, and not before."""
    data = b"".join(frames)
    start = 0
    for each in frames:
        header = 2 if each[1] < 126 else 4 if each[1] == 126 else 10
        assert frame_size(data, start) == len(each)
        assert frame_size(data[: start + header - 1], start) is None
        start += len(each)
    payloads, end = whole_texts(data[: place % (len(data) + 1)], 0)
    assert data[:end] == b"".join(frame(TEXT, payload) for payload in payloads)


def message(payload: bytes, sizes: list[int], controls: list[bytes], compressed: bool) -> list[bytes]:
    """Return the frames of one message in fragments, with control frames between them."""
    payload = deflated(payload) if compressed else payload
    parts = [payload[start:end] for start, end in itertools.pairwise([0, *sorted(sizes), len(payload)])]
    heads = [0x01 | compressed << 6, *[0x00] * (len(parts) - 1)]
    heads[-1] |= 0x80
    frames = [frame(head, part) for head, part in zip(heads, parts, strict=True)]
    between = itertools.zip_longest(frames, controls[: len(frames) - 1], fillvalue=b"")
    return list(itertools.chain.from_iterable(between))


CONTROLS = st.sampled_from([frame(PING, b"p"), frame(PONG, b"")])
MESSAGES = st.builds(
    message,
    st.binary(max_size=300),
    st.lists(st.integers(0, 300), max_size=3),
    st.lists(CONTROLS, max_size=3),
    st.booleans(),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(MESSAGES, max_size=5), st.lists(st.integers(0, 2**12), max_size=12), st.lists(CONTROLS, max_size=5))
def test_an_unfinished_message_is_known_from_its_first_byte_to_its_last(
    messages: list[list[bytes]], places: list[int], controls: list[bytes]
) -> None:
    """Each read reports in which read the unfinished message began, within a frame or between fragments."""
    wire, spans = b"", []
    for frames, control in itertools.zip_longest(messages, controls):
        begins, wire = len(wire), wire + b"".join(frames or [])
        spans.append((begins, len(wire)))
        wire += control or b""
    chunks = cut(wire, places)
    ends = list(itertools.accumulate(map(len, chunks)))

    async def run() -> None:
        connection, theirs = await connected()
        began: int | None = None
        number = -1

        def handler(payloads: Sequence[bytes], binary: bool) -> None:
            nonlocal began
            began = None

        def on_partial() -> None:
            nonlocal began
            began = number if began is None else began

        connection.data_received(welcome(connection, SWITCHING, deflate=True))
        connection.attach(handler, on_partial)
        for number, chunk in enumerate(chunks):
            connection.data_received(chunk)
            unfinished = [start for start, end in spans if start < ends[number] < end]
            expected = next((read for read, end in enumerate(ends) if unfinished and unfinished[0] < end), None)
            assert began == expected
        connection.transport.abort()
        theirs.close()

    asyncio.run(run())


def take(received_values: list[Any], payloads: Sequence[bytes], binary: bool) -> None:
    received_values.extend(payloads)


async def test_a_message_that_began_before_the_handler_was_attached() -> None:
    """An attached handler gets the complete messages first, and then a notice of the unfinished one."""
    for part in (frame(0x01, b"a"), frame(TEXT, b"ab")[:1], frame(TEXT, b"ab")[:3]):
        connection, theirs = await connected()
        connection.data_received(welcome(connection, SWITCHING) + frame(TEXT, b"first") + part)
        received_values: list[Any] = []
        connection.attach(partial(take, received_values), partial(received_values.append, "partial"))
        assert received_values == [b"first", "partial"]
        connection.transport.abort()
        theirs.close()
