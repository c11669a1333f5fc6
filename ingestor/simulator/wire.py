"""The documented messages of the stream. Dates are wall time of the exchange, without an offset."""

from __future__ import annotations

from functools import lru_cache
from zoneinfo import ZoneInfo

import msgspec

from ingestor.clock import to_datetime
from ingestor.model import Micros, Tick

AUTHENTICATED = b'{"type": "authenticated", "data": {"message": "Authenticated"}}'


def price_message(tick: Tick, timezone: ZoneInfo) -> bytes:
    """Return a price message. A whole price is sent as an integer, as the service sometimes does."""
    price = int(tick.price) if tick.price == int(tick.price) else tick.price
    data = {"date": wall_time(tick.time, timezone), "price": price, "volume": tick.volume, "symbol": tick.symbol}
    return msgspec.json.encode({"type": "price", "data": data})


def error_message(text: str) -> bytes:
    """Return an error message; the server then closes the connection."""
    return msgspec.json.encode({"type": "error", "data": {"message": text}})


@lru_cache(maxsize=64)
def wall_time(instant: Micros, timezone: ZoneInfo) -> str:
    """Return an instant as wall time of the exchange, without an offset."""
    return to_datetime(instant).astimezone(timezone).replace(tzinfo=None).isoformat()
