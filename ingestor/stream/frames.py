"""Cuts complete text messages, neither masked nor compressed, out of the bytes of a WebSocket. Pure.

Nearly all frames of a feed are of this kind. All others are left to the library, frame by frame, without pings that
need no answer. No other part of RFC 6455 is our own: https://www.rfc-editor.org/rfc/rfc6455#section-5.2.
"""

from __future__ import annotations

from collections import deque

_WHOLE_TEXT = 0x81  # FIN, no extension, opcode 1
_PING = 0x89
_CONTROL = 0x08  # the bit of an opcode that marks a control frame
_LENGTH_IN_2_BYTES = 126
_LENGTH_IN_8_BYTES = 127


def whole_texts(data: bytes, start: int) -> tuple[list[bytes], int]:
    """Return the payloads of the complete text messages from `start` on, and where something else begins.

    Messages of 64 KiB or more, and an incomplete last message, count as something else.
    """
    found: list[bytes] = []
    size = len(data)
    while size - start >= 2 and data[start] == _WHOLE_TEXT:
        length = data[start + 1]
        begin = start + 2
        if length >= _LENGTH_IN_2_BYTES:  # a masked one too, which a server must not send
            if length != _LENGTH_IN_2_BYTES or size - start < 4:
                break
            length = data[start + 2] << 8 | data[start + 3]
            begin = start + 4
        end = begin + length
        if end > size:
            break
        found.append(data[begin:end])
        start = end
    return found, start


def is_control(frame: bytes, start: int = 0) -> bool:
    """Return whether the frame at `start` is a ping, a pong or a close. Its first byte is enough."""
    return bool(frame[start] & _CONTROL)


def newest_pings(data: bytes, start: int, most: int) -> int:
    """Return where the newest `most` of the consecutive complete pings from `start` on begin."""
    found: deque[int] = deque(maxlen=most)
    position, size = start, len(data)
    while size - position >= 2 and data[position] == _PING and data[position + 1] < _LENGTH_IN_2_BYTES:
        end = position + 2 + data[position + 1]
        if end > size:
            break
        found.append(position)
        position = end
    return found[0] if found else start


def other_frames(data: bytes, start: int, most: int) -> int:
    """Return the end of at most `most` frames from `start` on that are complete and no whole text messages."""
    for _ in range(most):
        size = frame_size(data, start)
        if size is None or start + size > len(data) or data[start] == _WHOLE_TEXT:
            break
        start += size
    return start


def frame_size(data: bytes, start: int) -> int | None:
    """Return the size in bytes of the frame at `start` with its header; None if the header is incomplete."""
    available = len(data) - start
    if available < 2:
        return None
    masked, length = data[start + 1] & 0x80, data[start + 1] & 0x7F
    header = 2 + {_LENGTH_IN_2_BYTES: 2, _LENGTH_IN_8_BYTES: 8}.get(length, 0)
    if available < header:
        return None
    if length >= _LENGTH_IN_2_BYTES:
        length = int.from_bytes(data[start + 2 : start + header], "big")
    return header + (4 if masked else 0) + length
