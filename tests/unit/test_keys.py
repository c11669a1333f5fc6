from __future__ import annotations

import pytest

from ingestor.admin.keys import MAX_RATIO, is_bloated, packed_size

KEY = [8, 8, 8, 8, 4]


def test_size_of_a_packed_key() -> None:
    """The estimate is that of PostgreSQL: 59 bytes for a tick and 31 for a bar, less the inner pages."""
    assert packed_size(1_000_000, KEY) == pytest.approx(58.0e6, rel=0.01)
    assert packed_size(1_000_000, [7, 8]) == packed_size(1_000_000, [8, 8]) == pytest.approx(31.1e6, rel=0.01)
    assert packed_size(1_000_000, [9, 8]) == pytest.approx(40.0e6, rel=0.01)


@pytest.mark.parametrize(
    ("rows", "widths", "expected"),
    [
        (1000, KEY, True),
        (2000, KEY, False),
        (0, KEY, False),
        (-1, KEY, False),
        (None, KEY, False),
        (1000, [8, None, 8, 8, 4], False),
    ],
    ids=["half empty", "packed", "without rows", "never analysed", "without pages", "without a width"],
)
def test_bloated_indexes(rows: float | None, widths: list[int | None], expected: bool) -> None:
    """Half of its entries make a packed index bloated; unknown contents do not."""
    assert is_bloated(int(packed_size(2000, KEY)), rows, widths) == expected
    assert MAX_RATIO < 2
