"""Keeps `market.instruments`."""

from __future__ import annotations

from ingestor.backfill.client import EXCHANGE, RestClient
from ingestor.store.ledger import Ledger


async def refresh_instruments(ledger: Ledger, client: RestClient) -> tuple[int, int]:
    """Ask what is listed, and note it beside what was heard. Raises SourceError.

    Returns how many are listed, and how many were listed before and are kept, since it can't be believed that so many
    are gone.
    """
    listed = await client.instruments()
    return len(listed), await ledger.store_instruments(EXCHANGE, listed)
