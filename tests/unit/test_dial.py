from __future__ import annotations

import pytest

from ingestor.dial import MAX_ADDRESSES, addresses_of
from tests.addresses import resolve

V4 = [f"127.0.0.{number}" for number in range(1, 21)]
V6 = [f"fd00::{number:x}" for number in range(1, 21)]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (V4[:2], V4[:2]),
        (V6[:3] + V4[:3], [V6[0], V4[0], V6[1], V4[1], V6[2], V4[2]]),
        (V4[:1] + V6[:3], [V4[0], V6[0], V6[1], V6[2]]),  # the resolver's first family is the first here
        (V6[:1] * 3 + V4[:1] * 2, [V6[0], V4[0]]),
        (V6 + V4[:1], [V6[0], V4[0], *V6[1:9]]),  # a long list of one family does not hide the other
    ],
)
async def test_families_alternate(found: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses alternate between families in the resolver's order, each once, ten of them at most."""
    resolve(monkeypatch, {"name.test": found})
    assert await addresses_of("name.test", 443) == expected


async def test_many_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many addresses, as many of each family are tried."""
    resolve(monkeypatch, {"name.test": V6 + V4})
    addresses = await addresses_of("name.test", 443)
    assert len(addresses) == MAX_ADDRESSES == 10
    assert addresses[::2] == V6[:5]
    assert addresses[1::2] == V4[:5]
