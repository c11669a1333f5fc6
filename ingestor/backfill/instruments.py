"""Updates `market.instruments`."""

from __future__ import annotations

from dataclasses import dataclass

from ingestor.backfill.answers import summarize
from ingestor.backfill.bars import EXCHANGE
from ingestor.backfill.client import RestClient
from ingestor.store.gaps import GapStore


@dataclass(frozen=True, slots=True)
class Refresh:
    """The number of `listed` instruments, and of those `kept` active although the list lacks them.

    They are kept if too many are missing to be true, or if the answer had wrong records, which may be theirs. `wrong`
    names the wrong records; it is empty if there are none.
    """

    listed: int = 0
    kept: int = 0
    wrong: str = ""


async def refresh_instruments(gap_store: GapStore, client: RestClient) -> Refresh:
    """Fetch the listed instruments and store them beside the received symbols. Raises SourceError."""
    found = await client.instruments()
    kept = await gap_store.store_instruments(EXCHANGE, found.listed, is_complete=not found.faults)
    return Refresh(len(found.listed), kept, summarize(found.faults, found.records))
