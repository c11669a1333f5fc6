"""Clients of a stream in one process: `python -m benchmarks.subscribers --help`.

They count messages without decoding them, by bare sockets, so that the server is measured and not its clients. The
process prints `ready` once all are authenticated, and `done` once each has all ticks; then it writes what each saw to
the file, as JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import selectors
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from websockets.client import ClientProtocol
from websockets.uri import parse_uri

PRICE = b'"type":"price"'
DATE = re.compile(rb'"date":"([^"]+)"')
READ = 2**20


@dataclass
class Client:
    """An authenticated connection, and the time and the ticks so far of each read; their bytes too if `keeps`."""

    connection: socket.socket
    keeps: bool
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    kept: list[bytes] = field(default_factory=list)
    count: int = 0
    tail: bytes = b""

    def read(self, buffer: bytearray) -> None:
        """Read what is there. Raises ConnectionError at its end."""
        length = self.connection.recv_into(buffer)
        at = time.time()
        if not length:
            raise ConnectionError(f"closed after {self.count} ticks")
        self.count += buffer.count(PRICE, 0, length)
        self.count += (self.tail + buffer[: min(length, len(PRICE) - 1)]).count(PRICE)  # divided by two reads
        self.tail = (self.tail + buffer[max(0, length - len(PRICE) + 1) : length])[-len(PRICE) + 1 :]
        self.arrivals.append((at, self.count))
        if self.keeps:
            self.kept.append(bytes(buffer[:length]))


def log_in(url: str, token: str, *, keeps: bool = False) -> Client:
    """Return an authenticated client."""
    address = urlsplit(url)
    assert address.hostname is not None
    assert address.port is not None
    connection = socket.create_connection((address.hostname, address.port))
    protocol = ClientProtocol(parse_uri(url))
    protocol.send_request(protocol.connect())
    connection.sendall(b"".join(protocol.data_to_send()))
    protocol.receive_data(_read_until(connection, b"\r\n\r\n"))
    protocol.send_text(json.dumps({"type": "authenticate", "data": {"token": token}}).encode())
    connection.sendall(b"".join(protocol.data_to_send()))
    answer = _read_until(connection, b"}}")
    assert b'"authenticated"' in answer, answer
    return Client(connection, keeps)


def _read_until(connection: socket.socket, end: bytes) -> bytes:
    """Read byte by byte, since ticks may follow at once."""
    found = b""
    while not found.endswith(end):
        found += connection.recv(1)
    return found


def subscribe(url: str, token: str, ticks: int, clients: int, file: Path) -> None:
    """Run all clients. The first one also keeps the dates of its ticks, which are the same for all."""
    connected = [log_in(url, token, keeps=number == 0) for number in range(clients)]
    print("ready", flush=True)
    buffer = bytearray(READ)
    with selectors.DefaultSelector() as selector:
        for client in connected:
            selector.register(client.connection, selectors.EVENT_READ, client)
        while selector.get_map():
            for key, _ in selector.select():
                key.data.read(buffer)
                if key.data.count >= ticks:
                    selector.unregister(key.fileobj)
    print("done", flush=True)
    dates = [date.decode() for date in DATE.findall(b"".join(connected[0].kept))]
    file.write_text(json.dumps({"dates": dates, "arrivals": [each.arrivals for each in connected]}), encoding="utf-8")


def stick(url: str, token: str, clients: int) -> None:
    """Connect clients that never read again."""
    connected = [log_in(url, token) for _ in range(clients)]
    print("ready", flush=True)
    while connected:
        time.sleep(3600)


def main() -> None:
    """Run the clients of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("token")
    parser.add_argument("--ticks", type=int, help="ticks that each client waits for; none: clients that never read")
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--file", type=Path, help="file for the report")
    options = parser.parse_args()
    if options.ticks is None:
        stick(options.url, options.token, options.clients)
    else:
        subscribe(options.url, options.token, options.ticks, options.clients, options.file)


if __name__ == "__main__":
    main()
