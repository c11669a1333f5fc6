"""The lines of `ingestor check` about the replicated buffer. They change nothing: no stream is created."""

from __future__ import annotations

import asyncio
import contextlib
import json
import urllib.request
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

from ingestor.errors import BufferUnavailableError, ConfigurationError
from ingestor.jetstream.link import ApiError, Link
from ingestor.jetstream.reader import StreamState, stream_state
from ingestor.jetstream.setup import STREAM_NOT_FOUND, differences
from ingestor.service.checks import CheckResult, Severity
from ingestor.settings import Settings

CONNECT_SECONDS = 5.0
"""Time for one of the servers to accept the connection."""

MONITORING_PORT = 8222
"""The usual port of a NATS server's monitoring, which alone tells how it writes to disk."""

MONITORING_SECONDS = 2.0

_AT_RISK = "with fewer than three, the loss of one server's disk loses batches that are not committed"
_SYNC = "set sync_interval: always, else a power failure loses batches that the servers had acknowledged"


async def check_buffer(settings: Settings, *, monitoring_port: int = MONITORING_PORT) -> AsyncIterator[CheckResult]:
    """Yield the findings about servers, stream and copies."""
    problems: list[str] = []
    link = Link(settings, name="ingestor check", on_change=lambda problem: problems.append(problem or ""))
    running = asyncio.create_task(link.run())
    try:
        connecting = asyncio.create_task(link.wait(CONNECT_SECONDS))
        await asyncio.wait({running, connecting}, return_when=asyncio.FIRST_COMPLETED)
        if running.done() and (error := running.exception()) is not None:
            raise error
        if not await connecting:
            yield CheckResult("buffer", Severity.PROBLEM, problems[-1] if problems else "No NATS server answers.")
            return
        for finding in await _stream(link, settings):
            yield finding
        yield await asyncio.to_thread(_disks, settings.read_buffer_url(), monitoring_port)
    except ConfigurationError as error:
        yield CheckResult("buffer", Severity.PROBLEM, str(error))
    except BufferUnavailableError as error:
        yield CheckResult("buffer", Severity.PROBLEM, f"JetStream does not answer: {error}")
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _stream(link: Link, settings: Settings) -> list[CheckResult]:
    name = settings.buffer_stream
    try:
        info = await link.api(f"STREAM.INFO.{name}")
    except ApiError as error:
        if error.code != STREAM_NOT_FOUND:
            raise
        text = f"the stream {name} is missing; the first `ingestor run` or `ingestor write` creates it"
        return [CheckResult("buffer", Severity.OK, text)]
    found = [CheckResult("buffer", Severity.WARNING, each) for each in differences(settings, info["config"])]
    state = await stream_state(link, name)
    return [*found, _copies(state)]


def _copies(state: StreamState) -> CheckResult:
    text = f"{state.messages:,} messages, {state.size:,} bytes, {state.replicas - state.lagging} copies in step"
    if state.lagging:
        return CheckResult("buffer", Severity.WARNING, f"{text} of {state.replicas}: is one of the servers down?")
    if state.replicas < 3:
        return CheckResult("buffer", Severity.WARNING, f"{text}: {_AT_RISK}")
    return CheckResult("buffer", Severity.OK, text)


def _disks(url: str, port: int) -> CheckResult:
    """Say whether the servers write each batch to disk before they acknowledge it."""
    hosts = sorted({urlsplit(each).hostname or "" for each in url.split(",")})
    answers = {host: _syncs_always(host, port) for host in hosts}
    if late := [host for host, answer in answers.items() if answer is False]:
        return CheckResult(
            "buffer", Severity.WARNING, f"{', '.join(late)} acknowledges before writing to disk: {_SYNC}"
        )
    if unknown := [host for host, answer in answers.items() if answer is None]:
        text = f"{', '.join(unknown)} does not tell at port {port} whether it writes to disk at once: {_SYNC}"
        return CheckResult("buffer", Severity.WARNING, text)
    return CheckResult("buffer", Severity.OK, "each server writes a batch to disk before it acknowledges it")


def _syncs_always(host: str, port: int) -> bool | None:
    """Return whether the server at a host has `sync_interval: always`; None if it does not tell."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    shown = f"[{host}]" if ":" in host else host
    with contextlib.suppress(OSError, ValueError):
        with opener.open(f"http://{shown}:{port}/varz", timeout=MONITORING_SECONDS) as answer:
            found = json.loads(answer.read(2**20))
        config = found["jetstream"]["config"]
        return bool(config.get("sync_always", False))
    return None
