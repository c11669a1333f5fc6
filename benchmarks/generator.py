"""Stream server of the benchmarks: sends prepared frames as fast as they are read, or at a given rate.

It passes only large blocks to the kernel, so the receiver is always slower. `make bench` also measures the generator
alone, with a receiver that only reads its socket.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import sys
import time
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

from websockets.extensions.permessage_deflate import ServerPerMessageDeflateFactory
from websockets.http11 import Request
from websockets.server import ServerProtocol

from benchmarks.frames import TIMEZONE, Load, frame, payloads, wire

BLOCK = 2**18
AUTHENTICATED = frame(b'{"type": "authenticated", "data": {"message": "Authenticated"}}')


def main() -> None:
    """Print the port, then for each connection: print `ready`, wait for a line, send, and print the times as JSON.

    The process ends at the end of standard input.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--ticks", type=int, required=True)
    parser.add_argument("--symbols", type=int, default=50)
    parser.add_argument("--duplicates", type=float, default=0.0)
    parser.add_argument("--deflate", action="store_true")
    parser.add_argument("--rate", type=float, help="ticks a second, each dated when it is sent; else all at once")
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    load = Load(options.ticks, options.symbols, options.duplicates, options.deflate)
    blocks = [] if options.rate else _blocks(wire(payloads(load), deflate=load.deflate))
    with socket.create_server(("127.0.0.1", options.port)) as server:
        print(server.getsockname()[1], flush=True)
        while True:
            connection, _ = server.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                protocol = _handshake(connection, deflate=load.deflate)
                print("ready", flush=True)
                if not sys.stdin.readline():
                    return
                began = time.time()
                try:
                    if options.rate:
                        _send_at_rate(connection, protocol, load, options.rate)
                    else:
                        for block in blocks:
                            connection.sendall(block)
                    sent = time.time()
                    print(json.dumps({"began": began, "sent": sent}), flush=True)
                    _wait_for_close(connection, protocol)
                except (ConnectionError, BrokenPipeError):
                    print(json.dumps({"began": began, "sent": None}), flush=True)


def _blocks(frames: list[bytes]) -> list[bytes]:
    joined = b"".join(frames)
    return [joined[start : start + BLOCK] for start in range(0, len(joined), BLOCK)]


def _handshake(connection: socket.socket, *, deflate: bool) -> ServerProtocol:
    """Do the opening handshake and accept any token."""
    extensions = [ServerPerMessageDeflateFactory(server_no_context_takeover=True)] if deflate else []
    protocol = ServerProtocol(extensions=extensions)
    received = 0
    while received < 2:  # the request, then the token
        protocol.receive_data(connection.recv(65536))
        for event in protocol.events_received():
            received += 1
            if isinstance(event, Request):
                protocol.send_response(protocol.accept(event))
        for data in protocol.data_to_send():
            connection.sendall(data)
    connection.sendall(AUTHENTICATED)
    return protocol


def _send_at_rate(connection: socket.socket, protocol: ServerProtocol, load: Load, rate: float) -> None:
    """Send each tick on schedule, dated with the microsecond of its sending."""
    local = ZoneInfo(TIMEZONE)
    messages = payloads(load, begin=datetime.now(UTC))
    every = max(1, round(rate))  # answer pings once a second
    tails = [message.partition(b'", "price"')[2] for message in messages]
    began = time.perf_counter()
    for number, tail in enumerate(tails):
        wait = began + number / rate - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        if number % every == 0:
            _answer_pings(connection, protocol)
        date = datetime.now(local).strftime("%Y-%m-%dT%H:%M:%S.%f").encode()
        connection.sendall(frame(b'{"type": "price", "data": {"date": "' + date + b'", "price"' + tail))


def _answer_pings(connection: socket.socket, protocol: ServerProtocol) -> None:
    """Answer pings. Without a rate, sending ends before the receiver pings."""
    with contextlib.suppress(BlockingIOError):
        protocol.receive_data(connection.recv(65536, socket.MSG_DONTWAIT))
        for data in protocol.data_to_send():
            connection.sendall(data)


def _wait_for_close(connection: socket.socket, protocol: ServerProtocol) -> None:
    """Read until the receiver closes the connection."""
    connection.settimeout(600)
    while protocol.close_rcvd is None and (data := connection.recv(65536)):
        protocol.receive_data(data)
        for answer in protocol.data_to_send():
            connection.sendall(answer)


if __name__ == "__main__":
    main()
