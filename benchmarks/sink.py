"""Receiver that discards all bytes: `python -m benchmarks.sink URL`, until it is killed."""

from __future__ import annotations

import socket
import sys
from urllib.parse import urlsplit

from websockets.client import ClientProtocol
from websockets.uri import parse_uri

from benchmarks.frames import TOKEN


def main() -> None:
    """Do the handshake, then read the socket without end."""
    protocol = ClientProtocol(parse_uri(sys.argv[1]))
    with socket.create_connection(("127.0.0.1", urlsplit(sys.argv[1]).port)) as connection:
        protocol.send_request(protocol.connect())
        connection.sendall(b"".join(protocol.data_to_send()))
        protocol.receive_data(connection.recv(65536))
        protocol.send_text(TOKEN.encode())
        connection.sendall(b"".join(protocol.data_to_send()))
        space = bytearray(2**20)
        while connection.recv_into(space):
            pass


if __name__ == "__main__":
    main()
