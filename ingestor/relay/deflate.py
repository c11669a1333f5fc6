"""Compresses frames once for all clients that asked for it: permessage-deflate, https://www.rfc-editor.org/rfc/rfc7692.

A message may refer to those before it in the same run of frames, and to nothing else. So a run is the same bytes for
every client, whatever the client got before: no compressor belongs to a client.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

from websockets.extensions.base import Extension
from websockets.extensions.permessage_deflate import PerMessageDeflate, ServerPerMessageDeflateFactory
from websockets.typing import ExtensionParameter

from ingestor.relay.encoder import frame_head

LEVEL = 1

WINDOW_BITS = 12
"""Clients may allow more; clients of the library `websockets` allow just this."""

_HEAD = 0xC1  # FIN, RSV1, opcode 1


class SharedDeflate(PerMessageDeflate):
    """The extension of one connection. `accepts_runs`: its client keeps a large enough window between messages."""

    accepts_runs = True


class SharedDeflateFactory(ServerPerMessageDeflateFactory):
    """Negotiates the extension.

    The library's own messages are compressed by themselves, since it does not know which others were sent.
    """

    def process_request_params(
        self, params: Sequence[ExtensionParameter], accepted_extensions: Sequence[Extension]
    ) -> tuple[list[ExtensionParameter], PerMessageDeflate]:
        """Answer an offer. Raises NegotiationError."""
        answer, negotiated = super().process_request_params(params, accepted_extensions)
        bits = negotiated.local_max_window_bits
        shared = SharedDeflate(
            remote_no_context_takeover=negotiated.remote_no_context_takeover,
            local_no_context_takeover=True,
            remote_max_window_bits=negotiated.remote_max_window_bits,
            local_max_window_bits=bits,
        )
        shared.accepts_runs = bits >= WINDOW_BITS and not negotiated.local_no_context_takeover
        return answer, shared


def accepts_runs(extensions: Sequence[Extension]) -> bool:
    """Return whether a client that negotiated these extensions can read compressed runs."""
    return any(isinstance(each, SharedDeflate) and each.accepts_runs for each in extensions)


def deflated(frames: bytes) -> bytes:
    """Return a run of text frames, compressed. A frame alone is left as it is: it would hardly be shorter."""
    payloads = list(_payloads(frames))
    if len(payloads) < 2:
        return frames
    compressor = zlib.compressobj(LEVEL, zlib.DEFLATED, -WINDOW_BITS)
    pieces = []
    for payload in payloads:
        compressed = compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH)
        length = len(compressed) - 4  # without the end of a flush
        pieces.append(frame_head(length, _HEAD))
        pieces.append(compressed[:-4])
    return b"".join(pieces)


def _payloads(frames: bytes) -> Iterator[bytes]:
    """Yield the payloads of unmasked frames."""
    place = 0
    while place < len(frames):
        length = frames[place + 1]
        place += 2
        if length >= 126:
            size = 2 if length == 126 else 8
            length = int.from_bytes(frames[place : place + size], "big")
            place += size
        yield frames[place : place + length]
        place += length
