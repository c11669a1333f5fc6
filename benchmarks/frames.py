"""The load: price messages as wire frames, prepared before the measurement starts."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from ingestor.model import Micros, Tick
from ingestor.stream.decoder import Decoder

TIMEZONE = "Pacific/Auckland"
TOKEN = "tk_benchmark_token00"  # noqa: S105 - the generator accepts any token
PER_SECOND = 5_000
"""Ticks that share one second of the exchange's time, as in a burst."""

_TEXT = 0x81  # FIN and opcode 1: https://www.rfc-editor.org/rfc/rfc6455#section-5.2
_COMPRESSED = 0x40  # RSV1: https://www.rfc-editor.org/rfc/rfc7692#section-6


@dataclass(frozen=True, slots=True)
class Load:
    """The messages of a generator; `duplicates` is the share (0 to 1) of ticks that equal the preceding one."""

    ticks: int
    symbols: int = 50
    duplicates: float = 0.0
    deflate: bool = False
    seed: int = 1


def payloads(load: Load, *, begin: datetime | None = None) -> list[bytes]:
    """Return JSON messages in the documented form; their dates end about now, in the exchange's time."""
    generator = random.Random(load.seed)
    names = [f"{name}.NZ" for name in _names(load.symbols)]
    begin = begin or datetime.now(UTC) - timedelta(seconds=load.ticks / PER_SECOND + 60)
    local = ZoneInfo(TIMEZONE)
    made: list[bytes] = []
    while len(made) < load.ticks:
        second = len(made) // PER_SECOND
        date = (begin + timedelta(seconds=second)).astimezone(local).strftime("%Y-%m-%dT%H:%M:%S")
        for _ in range(min(PER_SECOND, load.ticks - len(made))):
            if made and generator.random() < load.duplicates:
                made.append(made[-1])
                continue
            price = round(generator.uniform(0.5, 60), 3)
            volume = generator.randrange(1, 200_000)
            symbol = generator.choice(names)
            made.append(
                f'{{"type": "price", "data": {{"date": "{date}", "price": {price}, "volume": {volume}, '
                f'"symbol": "{symbol}"}}}}'.encode()
            )
    return made


def wire(messages: list[bytes], *, deflate: bool = False) -> list[bytes]:
    """Return each message as an unmasked text frame; with `deflate`, compressed without shared context."""
    return [frame(_deflated(each), _COMPRESSED) for each in messages] if deflate else [frame(each) for each in messages]


def frame(payload: bytes, flags: int = 0) -> bytes:
    """Return one complete text frame of a server."""
    length = len(payload)
    if length < 126:
        return bytes((_TEXT | flags, length)) + payload
    return bytes((_TEXT | flags, 126)) + length.to_bytes(2, "big") + payload


def ticks(messages: list[bytes], received_at: Micros) -> list[Tick]:
    """Decode the messages, which must all be ticks."""
    decoder = Decoder(TIMEZONE)
    found = [decoder.decode(message, received_at) for message in messages]
    assert all(isinstance(each, Tick) for each in found)
    return found  # type: ignore[return-value]


def _deflated(payload: bytes) -> bytes:
    """Compress one message without shared context: https://www.rfc-editor.org/rfc/rfc7692#section-7.2.1."""
    compressor = zlib.compressobj(wbits=-15)
    return (compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


def _names(count: int) -> list[str]:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return [letters[n // 676 % 26] + letters[n // 26 % 26] + letters[n % 26] for n in range(count)]
