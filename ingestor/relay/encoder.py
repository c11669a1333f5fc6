"""Encodes ticks as frames of the stream. Pure, but for caches of texts that repeat.

Frames of a server are not masked, so the same bytes go to every client of the same filter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

from ingestor.batch import Row
from ingestor.clock import to_datetime
from ingestor.model import SECOND, Micros

_CACHE_SIZE = 8192


def frame_head(length: int, first: int = 0x81) -> bytes:
    """Return the head of a complete, unmasked text frame: https://www.rfc-editor.org/rfc/rfc6455#section-5.2."""
    if length < 126:
        return bytes((first, length))
    if length < 2**16:
        return bytes((first, 126)) + length.to_bytes(2, "big")
    return bytes((first, 127)) + length.to_bytes(8, "big")


def text_frame(payload: bytes) -> bytes:
    """Return a complete, unmasked text frame."""
    return frame_head(len(payload)) + payload


# Ticks are encoded as text of which each character is a byte: one encoding of many ticks takes half the time of many.
_SHORT_HEADS = [frame_head(length).decode("latin-1") for length in range(126)]


def message(kind: str, data: dict[str, Any]) -> bytes:
    """Return the frame of a message that is not a price."""
    return text_frame(json.dumps({"type": kind, "data": data}, ensure_ascii=False).encode())


def instant(at: datetime | None) -> str | None:
    """Return an instant in UTC by RFC 3339; None for none."""
    return None if at is None else at.isoformat().replace("+00:00", "Z")


class Encoder:
    """Encodes ticks with dates in a time zone, with its offset."""

    def __init__(self, timezone: str) -> None:
        self._timezone = ZoneInfo(timezone)
        self._seconds: dict[int, tuple[str, str]] = {}
        self._arrivals: dict[int, str] = {}
        self._symbols: dict[bytes, str] = {}

    def frames(self, rows: Sequence[Row], cursor: Callable[[int], str] | None = None) -> bytes:
        """Return the frames of ticks. With `cursor`, which has that of each row by its index, also `meta`."""
        pieces: list[str] = []
        latest, date = None, ""
        for index, (time, received_at, price, volume, occurrence, symbol) in enumerate(rows):
            if time != latest:
                latest, date = time, self._date(time)
            name = self._symbols.get(symbol) or self._symbol(symbol)
            text = f'{{"type":"price","data":{{"date":"{date}","price":{price!r},"volume":{volume},"symbol":{name}'
            if cursor is not None:
                text += (
                    f',"received_at":"{self._arrival(received_at)}","occurrence":{occurrence}'
                    f',"cursor":"{cursor(index)}"'
                )
            length = len(text) + 2
            pieces.append(_SHORT_HEADS[length] if length < 126 else frame_head(length).decode("latin-1"))
            pieces.append(text)
            pieces.append("}}")
        return "".join(pieces).encode("latin-1")

    def _date(self, time: Micros) -> str:
        """Return a tick's time with the exchange's offset; a fraction only if it has one."""
        second, fraction = divmod(time, SECOND)
        found = self._seconds.get(second)
        if found is None:
            text = to_datetime(second * SECOND).astimezone(self._timezone).isoformat()
            found = text[:19], text[19:]
            if len(self._seconds) >= _CACHE_SIZE:
                self._seconds.clear()
            self._seconds[second] = found
        return f"{found[0]}.{fraction:06d}{found[1]}" if fraction else found[0] + found[1]

    def _arrival(self, received_at: Micros) -> str:
        second, fraction = divmod(received_at, SECOND)
        found = self._arrivals.get(second)
        if found is None:
            found = to_datetime(second * SECOND).isoformat()[:19]
            if len(self._arrivals) >= _CACHE_SIZE:
                self._arrivals.clear()
            self._arrivals[second] = found
        return f"{found}.{fraction:06d}Z"

    def _symbol(self, symbol: bytes) -> str:
        """Return a symbol as JSON in UTF-8, a character for each byte."""
        text = json.dumps(symbol.decode(), ensure_ascii=False).encode().decode("latin-1")
        if len(self._symbols) >= _CACHE_SIZE:
            self._symbols.clear()
        self._symbols[symbol] = text
        return text
