"""Runs `ingestor` with a defect built in, for the test of the audit.

    CLUSTER_DEFECT=pipelining python -m tests.cluster.defective run

Each is an error that an earlier design had, or could have had. The product has no switch for them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any
from uuid import UUID

from ingestor.cli import main
from ingestor.errors import BufferUnavailableError
from ingestor.jetstream.feedback import Committed
from ingestor.jetstream.message import subject_of
from ingestor.jetstream.outlet import Outlet
from ingestor.jetstream.reader import Received
from ingestor.model import Batch
from ingestor.service.publisher import Publisher
from ingestor.service.stream_writer import StreamWriter

VARIABLE = "CLUSTER_DEFECT"
MANY = 256
BETWEEN_SECONDS = 0.3
"""Time from the early acknowledgement to the commit, as of a writer that gathers larger transactions."""


def pipeline() -> None:
    """Publish many messages at once, in no order, and take them as they come."""
    flying: set[asyncio.Task[None]] = set()

    async def deliver(outlet: Any, subject: str, headers: dict[str, str], body: bytes) -> None:
        while True:
            try:
                await outlet._link.request(subject, body, headers=headers, timeout=2.0)
            except BufferUnavailableError:
                await asyncio.sleep(0.1 + len(body) % 7 / 10)
            else:
                return

    async def publish(outlet: Any, session: UUID, headers: dict[str, str], body: bytes, after: int) -> int:
        while len(flying) >= MANY:
            await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED)
        task = asyncio.create_task(deliver(outlet, subject_of(outlet._stream, session), headers, body))
        flying.add(task)
        task.add_done_callback(flying.discard)
        return after + 1

    is_next = StreamWriter._is_next

    def take(writer: StreamWriter, batch: Batch, sequence: int) -> bool:
        writer._accepted.add(batch.session.id)
        return is_next(writer, batch, sequence)

    Outlet._publish = publish  # type: ignore[method-assign,assignment]
    StreamWriter._is_next = take  # type: ignore[method-assign,assignment]


def acknowledge_early() -> None:
    """Report batches as committed, and remove them from the stream, before their commit."""
    write = StreamWriter._write_portion

    async def acknowledge(writer: StreamWriter, portion: list[Received]) -> None:
        for received in portion:
            for batch in received.batches[-1:]:
                committed = Committed(batch.number, 0, 0, 0, is_ended=batch.end is not None)
                await writer._tell(batch.session.id, committed)
        upto = max(received.sequence for received in portion)
        await writer.link.api(f"STREAM.PURGE.{writer._stream}", {"seq": upto + 1})
        await asyncio.sleep(BETWEEN_SECONDS)
        await write(writer, portion)

    StreamWriter._write_portion = acknowledge  # type: ignore[method-assign,assignment]


def forget() -> None:
    """Forget the spool's batches once the stream has acknowledged them."""
    note = Publisher._note

    def note_and_drop(publisher: Publisher, portion: Any, sequence: int) -> None:
        note(publisher, portion, sequence)
        publisher._sent.clear()
        publisher._drop_to = portion[-1].position
        publisher._drop.set()

    Publisher._note = note_and_drop  # type: ignore[method-assign,assignment]


DEFECTS: dict[str, tuple[Callable[[], None], tuple[str, ...]]] = {
    "pipelining": (pipeline, ("NATS leader killed", "recorder cut off from NATS")),
    "acknowledging before the commit": (acknowledge_early, ("writers killed",)),
    "forgetting the spool": (forget, ("messages deleted",)),
}
"""Each defect with the faults that reveal it."""


if __name__ == "__main__":
    DEFECTS[os.environ[VARIABLE]][0]()
    main()
