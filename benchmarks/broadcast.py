"""A server that sends each message to all clients by `websockets.broadcast`.

`python -m benchmarks.broadcast CLIENTS TICKS` prints its port, waits for the clients and for a line, sends, and ends at
the next line. This is the usual way of a fan-out in Python.
"""

from __future__ import annotations

import asyncio
import sys

from websockets.asyncio.server import ServerConnection, broadcast, serve

BURST = 500
"""Messages between two turns of the event loop."""


async def main(clients: int, ticks: int) -> None:
    """Serve until a second line is read."""
    connected: set[ServerConnection] = set()
    complete = asyncio.Event()

    async def converse(connection: ServerConnection) -> None:
        await connection.recv()
        await connection.send('{"type": "authenticated", "data": {}}')
        connected.add(connection)
        if len(connected) == clients:
            complete.set()
        await connection.wait_closed()

    async with serve(converse, "127.0.0.1", 0, compression=None, ping_interval=None) as server:
        print(next(iter(server.sockets)).getsockname()[1], flush=True)
        await complete.wait()
        await asyncio.to_thread(sys.stdin.readline)
        for number in range(ticks):
            price = number % 50_000 / 1000 + 1
            broadcast(
                connected,
                f'{{"type":"price","data":{{"date":"2026-11-26T10:00:00+13:00","price":{price},"volume":100,"symbol":"AIR.NZ"}}}}',
            )
            if number % BURST == 0:
                await asyncio.sleep(0)
        await asyncio.to_thread(sys.stdin.readline)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
