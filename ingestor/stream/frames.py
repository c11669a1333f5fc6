"""The one kind of WebSocket frame that a feed sends all day: a whole text message, neither masked nor compressed.

It is cut out of what was read here, and everything else is left to the library. That is the whole of our own RFC 6455:
https://www.rfc-editor.org/rfc/rfc6455#section-5.2.
"""

from __future__ import annotations

_WHOLE_TEXT = 0x81  # FIN, no extension, opcode 1
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
