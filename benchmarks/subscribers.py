"""Clients of a stream in one process: `python -m benchmarks.subscribers --help`.

They count messages without decoding them, so that the server is measured and not its clients. The process prints
`ready` once all are authenticated, and `done` once each has all ticks; then it writes what each saw to the file, as
JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import time
from pathlib import Path
from urllib.parse import urlsplit

from websockets.client import ClientProtocol
from websockets.uri import parse_uri

PRICE = b'"type":"price"'
DATE = re.compile(rb'"date":"([^"]+)"')
READ = 2**20


async def log_in(url: str, token: str, limit: int = READ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Return an authenticated connection."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=limit)
    protocol = ClientProtocol(parse_uri(url))
    protocol.send_request(protocol.connect())
    writer.write(b"".join(protocol.data_to_send()))
    protocol.receive_data(await reader.readuntil(b"\r\n\r\n"))
    protocol.send_text(json.dumps({"type": "authenticate", "data": {"token": token}}).encode())
    writer.write(b"".join(protocol.data_to_send()))
    answer = await reader.readuntil(b"}}")
    assert b'"authenticated"' in answer, answer
    return reader, writer


async def read(reader: asyncio.StreamReader, ticks: int, *, keep: bool) -> tuple[list[tuple[float, int]], bytes]:
    """Read until so many ticks came; return the time and the ticks so far of each read, and the bytes if `keep`."""
    arrivals: list[tuple[float, int]] = []
    kept: list[bytes] = []
    count, tail = 0, b""
    while count < ticks:
        data = await reader.read(READ)
        if not data:
            raise ConnectionError(f"closed after {count} ticks")
        at = time.time()
        count += (tail + data).count(PRICE)
        tail = data[-len(PRICE) + 1 :]
        arrivals.append((at, count))
        if keep:
            kept.append(data)
    return arrivals, b"".join(kept)


async def subscribe(url: str, token: str, ticks: int, clients: int, file: Path) -> None:
    """Run all clients. The first one also keeps the dates of its ticks, which are the same for all."""
    connections = [await log_in(url, token) for _ in range(clients)]
    print("ready", flush=True)
    found = await asyncio.gather(
        *(read(reader, ticks, keep=number == 0) for number, (reader, _) in enumerate(connections))
    )
    print("done", flush=True)
    dates = [date.decode() for date in DATE.findall(found[0][1])]
    file.write_text(  # noqa: ASYNC240 - nothing else runs any more
        json.dumps({"dates": dates, "arrivals": [arrivals for arrivals, _ in found]}), encoding="utf-8"
    )
    for _, writer in connections:
        writer.close()


async def stick(url: str, token: str, clients: int) -> None:
    """Connect clients that never read again."""
    connections = [await log_in(url, token, limit=1024) for _ in range(clients)]
    for _, writer in connections:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
    print("ready", flush=True)
    await asyncio.Event().wait()


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
        asyncio.run(stick(options.url, options.token, options.clients))
    else:
        asyncio.run(subscribe(options.url, options.token, options.ticks, options.clients, options.file))


if __name__ == "__main__":
    main()
