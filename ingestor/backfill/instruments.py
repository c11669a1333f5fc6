"""Keeps `market.instruments`."""

from __future__ import annotations

from ingestor.backfill.client import EXCHANGE, RestClient
from ingestor.store.ledger import Ledger


async def refresh_instruments(ledger: Ledger, client: RestClient) -> int:
    """Ask what is listed, and note it beside what was heard; return how many are listed. Raises SourceError."""
    listed = await client.instruments()
    await ledger.store_instruments(EXCHANGE, listed)
    return len(listed)
