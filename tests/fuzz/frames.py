"""Valid and invalid frames of a WebSocket server, as bytes: RFC 6455 and RFC 7692."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

from ingestor.model import EndReason
from ingestor.stream.decoder import MAX_MESSAGE_BYTES

CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
FIN, RSV1, RSV2, RSV3 = 0x80, 0x40, 0x20, 0x10


def frame(head: int, payload: bytes = b"", *, mask: bool = False, size: int | None = None) -> bytes:
    """Return a frame with the shortest form of its length; `size` replaces the length in its header."""
    size = len(payload) if size is None else size
    flag = 0x80 if mask else 0
    if size < 126:
        begin = bytes([head, flag | size])
    elif size < 65536:
        begin = bytes([head, flag | 126]) + size.to_bytes(2, "big")
    else:
        begin = bytes([head, flag | 127]) + size.to_bytes(8, "big")
    return begin + (bytes(4) if mask else b"") + payload


class Deflater:
    """Compresses messages as permessage-deflate does, each by itself or all of them by one window."""

    def __init__(self, *, takes_over: bool) -> None:
        self._takes_over = takes_over
        self._compressor = zlib.compressobj(wbits=-15)

    def __call__(self, payload: bytes) -> bytes:
        if not self._takes_over:
            self._compressor = zlib.compressobj(wbits=-15)
        return (self._compressor.compress(payload) + self._compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


def message(payload: bytes, chance: random.Random, *, binary: bool, deflate: Deflater | None) -> list[bytes]:
    """Return the frames of one message: whole or in fragments, with control frames between, compressed or not."""
    head = BINARY if binary else TEXT
    if deflate is not None and chance.random() < 0.5:
        payload, head = deflate(payload), head | RSV1
    if chance.random() < 0.7:
        return [frame(FIN | head, payload)]
    places = sorted(chance.randrange(len(payload) + 1) for _ in range(chance.randint(1, 4)))
    parts = [payload[begin:end] for begin, end in zip([0, *places], [*places, len(payload)], strict=True)]
    frames: list[bytes] = []
    for number, part in enumerate(parts):
        opcode = head if number == 0 else CONT
        frames.append(frame((FIN if number == len(parts) - 1 else 0) | opcode, part))
        if number < len(parts) - 1 and chance.random() < 0.4:
            frames.append(frame(FIN | PONG, chance.randbytes(chance.randint(0, 125))))
    return frames


@dataclass(frozen=True)
class Ending:
    """The end of a connection: the last bytes, and the expected reason on record.

    After an `is_final` end nothing is read, so no later message may be received.
    """

    wire: bytes
    reason: EndReason
    is_final: bool = True
    is_reset: bool = False


def ending(chance: random.Random, *, deflates: bool) -> Ending:
    """Draw an end of the connection, by the rules or by a broken rule."""
    some = chance.randbytes(chance.randint(0, 200))
    match chance.randrange(6):
        case 0 | 1 as draw:
            unfinished = (b"", frame(TEXT, some), frame(FIN | TEXT, some + b"x")[:-1], b"\x81", b"\x81\x7e\0")
            return Ending(chance.choice(unfinished), EndReason.CLOSED, is_final=False, is_reset=draw == 1)
        case 2:
            code = chance.choice((1000, 1001, 1011, 1013, 3000, 4999)).to_bytes(2, "big")
            return Ending(frame(FIN | CLOSE, chance.choice((b"", code, code + b"bye"))), EndReason.CLOSED)
        case 3:
            return Ending(_too_big(some, chance, deflates=deflates), EndReason.MESSAGE_TOO_BIG)
        case _:
            return Ending(_broken(some, chance, deflates=deflates), EndReason.PROTOCOL_ERROR)


def _broken(some: bytes, chance: random.Random, *, deflates: bool) -> bytes:
    """Return bytes that break a rule of the protocol."""
    reserved_bits = (RSV2, RSV3, RSV2 | RSV3) if deflates else (RSV1, RSV2, RSV3, RSV1 | RSV2)
    reserved_code = chance.choice((0, 999, 1005, 1006, 1015, 2999, 5000)).to_bytes(2, "big")
    return chance.choice(
        (
            frame(FIN | chance.choice((3, 7, 11, 15)), some),
            frame(FIN | TEXT | chance.choice(reserved_bits), some),
            frame(FIN | TEXT, some, mask=True),
            frame(FIN | chance.choice((PING, PONG, CLOSE)), b"x" * 126),
            frame(chance.choice((PING, PONG)), some[:100]),
            frame(FIN | CONT, some),
            frame(CONT, some),
            frame(TEXT, some) + frame(FIN | TEXT, some),
            frame(BINARY, some) + frame(TEXT, some),
            frame(FIN | CLOSE, b"\x03"),
            frame(FIN | CLOSE, reserved_code),
            frame(FIN | CLOSE, b"\x03\xe8\xff\xfe"),
        )
    )


def _too_big(some: bytes, chance: random.Random, *, deflates: bool) -> bytes:
    """Return a message over the limit: by its header, in fragments, or after decompression."""
    draw = chance.randrange(4)
    if draw == 0 and deflates:
        bomb = zlib.compressobj(wbits=-15)
        return frame(FIN | RSV1 | TEXT, bomb.compress(bytes(MAX_MESSAGE_BYTES + 1)) + bomb.flush())
    if draw == 1:
        half = bytes(MAX_MESSAGE_BYTES // 2)
        return frame(TEXT, half) + frame(FIN | CONT, half + b"x")
    size = MAX_MESSAGE_BYTES + 1 if draw == 2 else chance.randrange(MAX_MESSAGE_BYTES + 1, 2**63)
    return frame(FIN | chance.choice((TEXT, BINARY)), some, size=size)


def cut(data: bytes, chance: random.Random) -> list[bytes]:
    """Return the same bytes as the network may deliver them: at once, in some pieces, or byte by byte."""
    how = chance.randrange(4)
    if how == 0:
        return [data]
    if how == 1 and len(data) < 5000:
        return [data[place : place + 1] for place in range(len(data))]
    mean = chance.choice((3, 20, 100, 1000))
    pieces = []
    place = 0
    while place < len(data):
        size = 1 + int(chance.expovariate(1 / mean)) if len(data) < 50_000 else chance.randint(1, 50_000)
        pieces.append(data[place : place + size])
        place += size
    return pieces
