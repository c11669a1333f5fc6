from __future__ import annotations

import pytest

from ingestor.admin import maintenance
from ingestor.coverage.calendar import xnze


@pytest.mark.filterwarnings("ignore::Warning")  # pandas warns about the library
def test_the_library_where_it_is_installed() -> None:
    """The library's sessions equal the snapshot's for their common time, and its version is named."""
    source, known = maintenance.known_sessions()
    assert source.startswith("exchange-calendars ")
    days = {session.trading_day: session for session in known}
    assert all(days[session.trading_day] == session for session in xnze() if session.trading_day in days)
    assert len(days) > 2000


def test_the_snapshot_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra, the bundled sessions are used."""
    monkeypatch.setattr(maintenance, "find_spec", lambda _: None)
    assert maintenance.known_sessions() == ("the bundled snapshot", list(xnze()))
