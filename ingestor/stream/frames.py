"""The one kind of WebSocket frame that a feed sends all day: a whole text message, neither masked nor compressed.

It is cut out of what was read here, and everything else is left to the library, frame by frame, and without pings that
need no answer. That is the whole of our own RFC 6455: https://www.rfc-editor.org/rfc/rfc6455#section-5.2.
"""

from __future__ import annotations

from collections import deque

_WHOLE_TEXT = 0x81  # FIN, no extension, opcode 1
_PING = 0x89
_CONTROL = 0x08  # the bit of an opcode that tells control frames from those of messages
_LENGTH_IN_2_BYTES = 126
_LENGTH_IN_8_BYTES = 127


def whole_texts(data: bytes, start: int) -> tuple[list[bytes], int]:
    """Return the payloads of the whole text messages from `start` on, and where something else begins.

    Those of 64 KiB or more are something else, as is the last message where the rest of it has not been read yet.
    """
    found: list[bytes] = []
    size = len(data)
    while size - start >= 2 and data[start] == _WHOLE_TEXT:
        length = data[start + 1]
        begin = start + 2
        if length >= _LENGTH_IN_2_BYTES:  # masked ones too, which a server must not send
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
    """Return whether the frame from `start` on, of which the first byte is enough, is a ping, a pong or a close."""
    return bool(frame[start] & _CONTROL)


def newest_pings(data: bytes, start: int, most: int) -> int:
    """Return where the newest of the whole pings begin that follow each other from `start` on, at most so many."""
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
    """Return where the frames from `start` on end that were read as a whole and are no whole texts, at most so many."""
    for _ in range(most):
        size = frame_size(data, start)
        if size is None or start + size > len(data) or data[start] == _WHOLE_TEXT:
            break
        start += size
    return start


def frame_size(data: bytes, start: int) -> int | None:
    """Return the size in bytes of the frame from `start` on with its header; None where that is not whole yet."""
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
