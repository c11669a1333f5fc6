"""A target of `make fuzz` is opened once, and then run case by case."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TypeAlias

Counts: TypeAlias = Counter[str]
"""The inputs of a case, counted by a plural noun."""

Case: TypeAlias = Callable[[random.Random], Awaitable[Counts]]
"""Runs one case, which follows from the dice alone.

Raises AssertionError, or an undocumented error of the tested part.
"""

Target: TypeAlias = Callable[[Path], AbstractAsyncContextManager[Case]]
"""Prepares the cases, with a directory of its own for files."""


def dice(seed: int, target: str, number: int) -> random.Random:
    """Return the dice of one case: the same for the same seed, whatever ran before."""
    return random.Random(f"{seed}/{target}/{number}")


def mutate(data: bytes, chance: random.Random, *, most: int = 3) -> bytes:
    """Return bytes with up to `most` small damages: bits flipped, pieces lost, doubled, moved, or made up."""
    result = bytearray(data)
    for _ in range(chance.randint(1, most)):
        place = chance.randrange(len(result) + 1)
        end = min(len(result), place + chance.choice((1, 1, 2, 5, 20)))
        match chance.randrange(6):
            case 0 if place < len(result):
                result[place] ^= 1 << chance.randrange(8)
            case 1:
                del result[place:end]
            case 2:
                result[place:place] = result[place:end]
            case 3:
                result[place:place] = chance.randbytes(chance.randint(1, 4))
            case 4:
                piece = result[place:end]
                del result[place:end]
                place = chance.randrange(len(result) + 1)
                result[place:place] = piece
            case _:
                result[place:end] = chance.choice(b'"{}[]:,\\0189-+.eE \n\0\xff').to_bytes(1, "big") * (end - place)
    return bytes(result)
