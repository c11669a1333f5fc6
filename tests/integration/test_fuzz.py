from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ingestor.batch import Batcher
from tests.fuzz import daemon
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
