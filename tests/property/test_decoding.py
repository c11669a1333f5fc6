from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ingestor.model import SECOND, Micros, Reason, Tick
from ingestor.stream.decoder import Authenticated, Decoder, Refused, ServerError

NOW: Micros = 1_772_409_600 * SECOND
DECODER = Decoder("Pacific/Auckland")

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
dates = st.datetimes(timezones=st.none() | st.timezones()).map(lambda moment: moment.isoformat()) | st.text(max_size=30)
numbers = st.integers() | st.floats() | st.text(max_size=12) | st.integers().map(str) | st.floats().map(str)
data = st.fixed_dictionaries(
    {},
    optional={
        "date": dates | json_values,
        "price": numbers | json_values,
        "volume": numbers | json_values,
        "symbol": st.text(max_size=40) | json_values,
        "other": json_values,
    },
)
messages = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["price", "authenticated", "error", "ping"]) | json_values,
        "data": data | json_values,
    },
)


def check(frame: bytes, *, binary: bool = False) -> None:
    message = DECODER.decode(frame, NOW, binary=binary)
    assert isinstance(message, Tick | Authenticated | ServerError | Refused)
    if isinstance(message, Refused):
        assert message.reason in Reason
    if isinstance(message, Tick):
        assert 0 <= message.volume < 2**63
        assert message.price - message.price == 0  # finite
        assert 1 <= len(message.symbol.encode()) <= 32 * 4


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes(frame: bytes, binary: bool) -> None:
    """Decoding raises nothing for any bytes."""
    check(frame, binary=binary)


@given(json_values)
def test_any_json(value: Any) -> None:
    """Decoding raises nothing for any JSON text."""
    check(json.dumps(value).encode())


@given(messages, st.booleans())
def test_nearly_messages(message: Any, ascii_only: bool) -> None:
    """Decoding raises nothing for any almost valid message."""
    check(json.dumps(message, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass"))


@given(
    price=st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**80), 2**80),
    volume=st.integers(0, 2**63 - 1),
    symbol=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Z"]), min_size=1, max_size=32),
    quoted=st.booleans(),
)
def test_the_decoder_agrees_with_the_oracle(price: float, volume: int, symbol: str, quoted: bool) -> None:
    """The decoder and the oracle read the same tick from the same message."""
    values = {"price": str(price), "volume": str(volume)} if quoted else {"price": price, "volume": volume}
    message = {"type": "price", "data": {"date": "2021-09-29T09:33:30", "symbol": symbol, **values}}
    frame = json.dumps(message).encode()
    fast = DECODER.decode(frame, NOW)
    slow = DECODER._decode_slowly(frame, NOW)
    assert fast == slow == Tick(symbol, 1_632_861_210 * SECOND, float(price) + 0.0, volume)


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=6))
def test_fifteen_digits_come_back(price: Any) -> None:
    """A decimal of up to 15 digits reads back as it was sent."""
    message = f'{{"type":"price","data":{{"date":"2021-09-29T09:33:30","price":{price},"volume":1,"symbol":"A"}}}}'
    tick = DECODER.decode(message.encode(), NOW)
    assert isinstance(tick, Tick)
    assert type(price)(f"{tick.price:.15g}") == price
