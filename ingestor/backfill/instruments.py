"""Keeps `market.instruments`."""

from __future__ import annotations

from dataclasses import dataclass

from ingestor.backfill.answers import summarize
from ingestor.backfill.bars import EXCHANGE
from ingestor.backfill.client import RestClient
from ingestor.store.gaps import GapStore


@dataclass(frozen=True, slots=True)
class Refresh:
    """How many instruments are `listed`, and how many are `kept` that were listed before.

    They are kept if so many can't be gone, or if the answer had wrong records, which may be theirs: `wrong` says which
    these are; empty if there are none.
    """

    listed: int = 0
    kept: int = 0
    wrong: str = ""


async def refresh_instruments(gap_store: GapStore, client: RestClient) -> Refresh:
    """Ask what is listed, and note it beside what was heard. Raises SourceError."""
    found = await client.instruments()
    kept = await gap_store.store_instruments(EXCHANGE, found.listed, is_complete=not found.faults)
    return Refresh(len(found.listed), kept, summarize(found.faults, found.records))
