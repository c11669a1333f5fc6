from __future__ import annotations

import asyncio
from uuid import uuid4

from ingestor.batch import Batcher
from ingestor.model import Micros, Session, Tick
from ingestor.relay.encoder import Encoder
from ingestor.relay.hub import Hub
from ingestor.relay.options import Filter
from ingestor.store.record import CoverageStatement, Entry, LogPosition, LogState, Progress

ONE = Batcher(Session(uuid4(), "one", "ws://localhost/ws", 0), max_rows=9, occurrence_keys=9)
ONE.add(Tick("AIR.NZ", 0, 1.0, 1), 0)
ROWS = ONE.close().rows


class Live:
    """A client that notes the statements."""

    def __init__(self, position: LogPosition) -> None:
        self.progress = Progress(position, None)
        self.filter = Filter()
        self.stated_until: Micros | None = 5 * 3600 * 1_000_000
        self.statements: list[CoverageStatement] = []

    def accept(self, _frames: bytes, _ticks: int, after: LogPosition) -> None:
        self.progress = Progress(after, None)

    def state(self, statement: CoverageStatement) -> None:
        assert self.progress.position >= statement.end
        self.statements.append(statement)

    def restart(self) -> None:
        pass


def hub_with(client_position: int) -> tuple[Hub, Live]:
    hub = Hub(Encoder("UTC"))
    hub.restart(LogState(uuid4(), 0, LogPosition(client_position), None))
    client = Live(LogPosition(client_position))
    assert hub.join(client)
    return hub, client


def test_a_statement_waits_for_its_commits() -> None:
    """A statement of coverage is handed out once the log is handed out as far as it was read for the statement."""

    async def run() -> None:
        hub, client = hub_with(3)
        statement = CoverageStatement(((0, 1),), LogPosition(5), 0.0)
        hub.state(statement)
        assert not client.statements
        await hub.publish([Entry(3, ROWS, 0, 0.0)])
        assert not client.statements
        await hub.publish([Entry(4, ROWS, 0, 0.0)])
        assert client.statements == [statement]

    asyncio.run(run())


def test_a_waiting_statement_is_not_replaced() -> None:
    """While a statement waits, a newer one, which would wait longer, does not take its place."""
    hub, client = hub_with(3)
    hub.state(CoverageStatement((), LogPosition(4), 0.0))
    hub.state(CoverageStatement((), LogPosition(9), 1.0))
    asyncio.run(hub.publish([Entry(3, ROWS, 0, 0.0)]))
    assert [statement.began for statement in client.statements] == [0.0]


def test_a_new_log_forgets_the_statement() -> None:
    """A statement about a log that has begun again is never handed out."""
    hub, _ = hub_with(3)
    hub.state(CoverageStatement((), LogPosition(4), 0.0))
    hub.restart(LogState(uuid4(), 9, LogPosition(10), None))
    client = Live(LogPosition(10))
    hub.join(client)
    asyncio.run(hub.publish([Entry(10, ROWS, 0, 0.0)]))
    assert not client.statements


def test_coverage_is_read_an_hour_back() -> None:
    """Coverage is asked for from an hour before the earliest time of which a client knows; without one, not at all."""
    hub, client = hub_with(3)
    assert hub.coverage_since == 4 * 3600 * 1_000_000
    client.stated_until = None
    assert hub.coverage_since is None
