"""Creates the stream, or compares it with what the rules of delivery need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ingestor.errors import ConfigurationError
from ingestor.jetstream.link import ApiError, Link
from ingestor.redaction import outside_text
from ingestor.settings import Settings, variable

DUPLICATE_SECONDS = 120
"""Time for which the stream remembers ids. Beyond it, the expected sequence refuses a second copy."""

STREAM_NOT_FOUND = 10059
_TOO_FEW_SERVERS = {10005, 10074}
"""No suitable peers for placement; replicas > 1 not supported in non-clustered mode."""
_NO_JETSTREAM = {10039, 10076}
"""JetStream not enabled for the account; not enabled."""

_REASONS = {
    "subjects": "the batches of every session belong into it",
    "retention": "another retention deletes batches that are not committed",
    "storage": "memory loses them when the servers restart",
    "discard": "with `old` a full stream deletes batches that are not committed; with `new` it refuses more",
    "max_age": "batches that are not committed must not expire",
    "max_msgs": "a limit deletes or refuses batches",
    "max_msgs_per_subject": "a limit deletes batches that are not committed",
    "sealed": "a sealed stream takes nothing",
    "no_ack": "without acknowledgements the recorder never knows that a batch is there",
    "deny_purge": "the writer removes what is committed",
}


@dataclass(frozen=True, slots=True)
class StreamSetup:
    """The result of looking for the stream: whether it was `created` now, and how it differs from our settings."""

    created: bool
    differences: tuple[str, ...] = ()


def wanted(settings: Settings) -> dict[str, Any]:
    """Return the configuration of the stream, as JetStream's API has it."""
    name = settings.buffer_stream
    return {
        "name": name,
        "description": "Batches of ticks on their way to the database (ingestor)",
        "subjects": [f"{name}.batch.*"],
        "retention": "limits",
        "storage": "file",
        "discard": "new",
        "num_replicas": settings.buffer_replicas,
        "max_age": 0,
        "max_msgs": -1,
        "max_bytes": -1,
        "max_msgs_per_subject": -1,
        "max_msg_size": -1,
        "max_consumers": -1,
        "duplicate_window": DUPLICATE_SECONDS * 1_000_000_000,
        "sealed": False,
        "no_ack": False,
        "deny_purge": False,
    }


async def prepare_stream(link: Link, settings: Settings) -> StreamSetup:
    """Create the stream if there is none; never change one. Raises BufferUnavailableError and ConfigurationError."""
    name = settings.buffer_stream
    try:
        info = await link.api(f"STREAM.INFO.{name}")
    except ApiError as error:
        if error.code != STREAM_NOT_FOUND:
            raise _explained(error, settings) from error
    else:
        return StreamSetup(created=False, differences=differences(settings, info["config"]))
    try:
        await link.api(f"STREAM.CREATE.{name}", wanted(settings))
    except ApiError as error:
        raise _explained(error, settings) from error
    return StreamSetup(created=True)


def differences(settings: Settings, found: dict[str, Any]) -> tuple[str, ...]:
    """Return a sentence for each setting of a stream that differs, with the reason why that matters."""
    lines = []
    for key, value in wanted(settings).items():
        actual = found.get(key, 0 if isinstance(value, int) else None)
        if key == "num_replicas" and actual < value:
            lines.append(f"num_replicas is {actual} instead of {value}: fewer servers may fail")
        elif key in _REASONS and actual not in (value, _none(value)):
            lines.append(f"{key} is {outside_text(actual)} instead of {value}: {_REASONS[key]}")
    return tuple(lines)


def _none(value: Any) -> Any:
    """Return the other way to write no limit."""
    return 0 if value == -1 else value


def _explained(error: ApiError, settings: Settings) -> Exception:
    if error.code in _TOO_FEW_SERVERS:
        return ConfigurationError(
            f"{variable('buffer_replicas')}: the NATS servers cannot keep {settings.buffer_replicas} copies: {error} "
            f"Start {settings.buffer_replicas} servers as a cluster, or lower the setting."
        )
    if error.code in _NO_JETSTREAM:
        return ConfigurationError(
            f"{variable('buffer_url')}: {error} Start the servers with JetStream (`jetstream {{}}`)."
        )
    return error
