"""The documented messages of the stream, as a server sends them."""

from __future__ import annotations

from functools import lru_cache
from zoneinfo import ZoneInfo

import msgspec

from ingestor.clock import to_datetime
from ingestor.model import Micros, Tick

AUTHENTICATED = b'{"type": "authenticated", "data": {"message": "Authenticated"}}'

NOT_AUTHORISED = "You are not authorised to use this stream"
NO_AUTHENTICATION = "not authorised: no authentication was received"
NO_ACCESS = "Your plan has no access to this stream"

CURSOR_TOO_OLD = "The cursor is too old"
"""The error of a relay that can't go on from a cursor begins so: a recorder knows it by these words."""


def stream_limit(streams: int) -> str:
    """Return the text of the error for one stream more than the limit."""
    return f"You have reached the stream limit of {streams} of your plan"


def price_message(tick: Tick, timezone: ZoneInfo) -> bytes:
    """Return a price message, dated in wall time. A whole price is an integer, as the service sometimes sends it."""
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
