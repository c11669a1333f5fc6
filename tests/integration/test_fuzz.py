from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ingestor.batch import Batcher
from ingestor.relay import server
from ingestor.relay.encoder import Encoder
from ingestor.relay.options import parse_options
from tests.fuzz import daemon, relay
from tests.unit.test_fuzz import all_of


async def test_a_lost_tick(writer_url: str, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon's cases detect a daemon that stores all ticks but one."""
    add = Batcher.add
    seen: list[Any] = []

    def forgetful(self: Batcher, *tick: Any) -> None:
        seen.append(tick)
        if len(seen) != 20:
            add(self, *tick)

    monkeypatch.setattr(Batcher, "add", forgetful)
    async with daemon.on_database(writer_url, database, tmp_path) as case:
        with pytest.raises(AssertionError, match=r"ticks and|is there"):
            await all_of(case, 5)
    assert len(seen) >= 20


async def test_an_option_that_is_not_handled(writer_url: str, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The relay's cases detect an option that raises an error that nothing expects."""
    parse = parse_options

    def careless(query: str, *others: Any) -> Any:
        if "speed" in query:
            raise KeyError("speed")
        return parse(query, *others)

    monkeypatch.setattr(server, "parse_options", careless)
    with pytest.raises(AssertionError, match="defect"):
        async with relay.on_database(writer_url, database) as case:
            await all_of(case, 40)


async def test_a_tick_that_is_sent_twice(writer_url: str, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The relay's cases detect a relay that sends a tick again."""
    frames = Encoder.frames

    def doubling(self: Encoder, rows: Any, cursor: Any = None) -> bytes:
        again = frames(self, rows[:1], cursor) if len(rows) > 1 and cursor is None else b""
        return frames(self, rows, cursor) + again

    monkeypatch.setattr(Encoder, "frames", doubling)
    with pytest.raises(AssertionError, match="came 2 times"):
        async with relay.on_database(writer_url, database) as case:
            await all_of(case, 40)
