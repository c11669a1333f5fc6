"""Looks at the NATS servers and the stream once, for `ingestor check` and `ingestor migrate`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from ingestor.errors import BufferUnavailableError
from ingestor.jetstream.link import ApiError, Link
from ingestor.jetstream.reader import StreamState, stream_state
from ingestor.jetstream.setup import STREAM_NOT_FOUND, StreamSetup, differences, prepare_stream
from ingestor.settings import Settings

CONNECT_SECONDS = 5.0

MONITORING_PORT = 8222
"""The usual port of a NATS server's monitoring, which is open only if its configuration says so."""

MONITORING_SECONDS = 2.0
_MAX_ANSWER = 2**20


@dataclass(frozen=True, slots=True)
class BufferFacts:
    """The state of the buffer. `state` is None if there is no stream yet.

    `sync_always` has, by host, whether a server writes to its disk before it acknowledges; None: it does not say.
    """

    version: str
    state: StreamState | None
    differences: tuple[str, ...]
    sync_always: dict[str, bool | None]


@contextlib.asynccontextmanager
async def opened(settings: Settings, name: str) -> AsyncIterator[Link]:
    """Yield a connection. Raises BufferUnavailableError, and ConfigurationError if the login is refused."""
    problems: list[str | None] = []
    link = Link(settings, name=name, on_change=problems.append)
    running = asyncio.create_task(link.run(), name="link")
    waiting = asyncio.create_task(link.wait(CONNECT_SECONDS), name="link-wait")
    try:
        await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        if link.client is None:
            raise BufferUnavailableError(next((each for each in reversed(problems) if each), "NATS does not answer."))
        yield link
    finally:
        for task in (waiting, running):
            task.cancel()
        await asyncio.gather(waiting, running, return_exceptions=True)


async def prepare(settings: Settings) -> StreamSetup:
    """Create the stream if it is missing. Raises BufferUnavailableError and ConfigurationError."""
    async with opened(settings, "ingestor migrate") as link:
        return await prepare_stream(link, settings)


async def survey(settings: Settings, *, monitoring_port: int = MONITORING_PORT) -> BufferFacts:
    """Return the state of the buffer. Raises BufferUnavailableError and ConfigurationError."""
    async with opened(settings, "ingestor check") as link:
        version = str(link.current().connected_server_version)
        try:
            state: StreamState | None = await stream_state(link, settings.buffer_stream)
            info = await link.api(f"STREAM.INFO.{settings.buffer_stream}")
        except ApiError as error:
            if error.code != STREAM_NOT_FOUND:
                raise
            state, info = None, {}
    hosts = [urlsplit(url).hostname or "" for url in (settings.buffer_url or "").split(",")]
    synced = await asyncio.gather(*(asyncio.to_thread(_syncs_always, host, monitoring_port) for host in hosts))
    found = differences(settings, info["config"]) if info else ()
    return BufferFacts(version, state, found, dict(zip(hosts, synced, strict=True)))


def _syncs_always(host: str, port: int) -> bool | None:
    """Return what a server's monitoring says of its disk; None if it says nothing."""
    address = f"[{host}]" if ":" in host else host
    try:
        with urllib.request.urlopen(f"http://{address}:{port}/varz", timeout=MONITORING_SECONDS) as answer:
            found = json.loads(answer.read(_MAX_ANSWER))
        return bool(found["jetstream"]["config"].get("sync_always", False))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
