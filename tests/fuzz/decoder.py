"""For generated and damaged messages, decoding never raises and follows the standards.

The fast path and the complete one agree, and both with the oracle, which reads slowly and shares no code with them.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from ingestor.model import SECOND, Micros, Reason, Tick
from ingestor.simulator.faults import GARBAGE
from ingestor.stream.decoder import Decoder, Message, Refused
from tests.fuzz.target import Case, Counts, mutate
from tests.oracle import read

NOW: Micros = 1_772_409_600 * SECOND
TIMEZONE = "Pacific/Auckland"

_MESSAGES = 200
_NO_INSTANT = {Reason.DATE_NONEXISTENT, Reason.DATE_OUT_OF_RANGE}
"""Both reasons may be true of an hour that a clock change leaves out, of a year far away."""

_HUGE_EXPONENT = re.compile(rb"[eE][+-]?\d{18}")
_YEARS = ("2021", "2026", "1989", "1990", "0001", "9999", "2024")
_CLOCKS = ("09:33:30", "23:59:59", "24:00:00", "23:59:60", "02:30:00", "9:33:30", "09:33", "09:60:00", "00:00:00")
_FRACTIONS = ("", ".5", ".123456", ".1234567", ".", ",5", ".999999999", ".0")
_OFFSETS = ("", "Z", "z", "+13:00", "-00:00", "+10:60", "+24:00", "-23:59", "+1300", "+13", " 13:00")
_NUMBERS = (
    "0", "-0", "0.0", "-0.0", "1", "2.61", "2.610", "100", "1e2", "1E+2", "1e-2", "12.5e1", "9007199254740993",
    "9007199254740993.0", "9223372036854775807", "9223372036854775808", "1e400", "-1e400", "1e-400", "0.1e1", "01",
    ".5", "5.", "+1", "NaN", "Infinity", "true", "null", "[]", "{}", '"2.61"', '"1e2"', '" 1"', '"1_0"', '""', '"-0"',
    "1" * 400, "0." + "1" * 400, "1e999999999", '"1e999999999"',
)  # fmt: skip
_SYMBOLS = (
    '"AIR.NZ"', '"SUM020.NZ"', '"A\\u0049R.NZ"', '""', '" A"', '"\\u0000"', '"\\ud800"', '"\\ud83d\\ude00"', '"é"',
    '"\\n"', '"' + "A" * 32 + '"', '"' + "A" * 33 + '"', '"\\\\"', '"\\""', '"\\x"', "1", "null",
)  # fmt: skip


async def case(chance: random.Random) -> Counts:
    """Decode some messages in turn by one decoder, whose caches they share."""
    decoder = Decoder(TIMEZONE)
    for _ in range(_MESSAGES):
        frame = draw(chance)
        fast = decoder.decode(frame, NOW)
        slow = Decoder(TIMEZONE)._decode_slowly(frame, NOW) if _is_utf_8(frame) else Refused(Reason.INVALID_UTF8)
        assert fast == slow, f"{frame!r} is read as {fast}, but by the complete path as {slow}"
        check(frame, fast)
    return Counter(messages=_MESSAGES)


def _is_utf_8(frame: bytes) -> bool:
    try:
        frame.decode()
    except UnicodeDecodeError:
        return False
    return True


def check(frame: bytes, message: Message) -> None:
    """Compare a decoded frame with the oracle: a tick, one of its faults, or no price message."""
    expected = read(frame, NOW, TIMEZONE)
    match message:
        case Tick():
            agrees = message == expected
        case Refused(reason=Reason.VOLUME_INVALID) if _HUGE_EXPONENT.search(frame):
            agrees = True  # the decoder does not compute how large or how small that would be
        case Refused(reason=Reason.DATE_NONEXISTENT):
            agrees = not isinstance(expected, Tick) and not expected.isdisjoint(_NO_INSTANT)
        case Refused():
            agrees = not isinstance(expected, Tick) and message.reason in expected
        case _:
            agrees = expected == {Reason.UNKNOWN_TYPE}  # of prices, the only type that the oracle reads
    assert agrees, f"{frame!r} is read as {message}, but should be {expected}"


def draw(chance: random.Random) -> bytes:
    """Draw a message: mostly almost right, and damaged in half of the cases."""
    if chance.random() < 0.1:
        found = chance.choice(GARBAGE)
        frame = found.encode() if isinstance(found, str) else found
    else:
        frame = _price(chance).encode("utf-8", "surrogatepass")
    return mutate(frame, chance) if chance.random() < 0.5 else frame


def _price(chance: random.Random) -> str:
    plain = chance.random() < 0.3
    date = "2021-09-29T09:33:30" if plain else _date(chance)
    number = str(round(chance.uniform(0, 100), chance.randint(0, 6)))
    fields = [
        ("date", json.dumps(date)),
        ("price", number if plain else chance.choice((number, *_NUMBERS))),
        ("volume", chance.choice(("0", "1", "5000", *(() if plain else _NUMBERS)))),
        ("symbol", chance.choice(_SYMBOLS[:2] if plain else _SYMBOLS)),
    ]
    if chance.random() < 0.2:
        fields.append(chance.choice((("other", chance.choice(_NUMBERS)), *fields)))  # one more, or one twice
    if chance.random() < 0.1:
        fields.pop(chance.randrange(len(fields)))
    chance.shuffle(fields)
    space = chance.choice(("", " ", "\n", "\t "))
    data = ",".join(f'{space}"{name}":{space}{value}' for name, value in fields)
    kind = "price" if chance.random() < 0.9 else chance.choice(("authenticated", "error", "pric\\u0065", "x", ""))
    parts = [f'"type":{space}"{kind}"', f'"data":{space}{{{data}}}']
    if chance.random() < 0.1:
        parts.append(chance.choice(('"data": null', '"type": "error"', '"other": [1, {"a": NaN}]')))
    chance.shuffle(parts)
    return f"{space}{{{','.join(parts)}}}{space}"


def _date(chance: random.Random) -> str:
    day = f"{chance.choice(_YEARS)}-{chance.choice(('09', '4', '13', '02'))}-{chance.choice(('29', '26', '31', '04'))}"
    return f"{day}{chance.choice('TTTt ')}{chance.choice(_CLOCKS)}{chance.choice(_FRACTIONS)}{chance.choice(_OFFSETS)}"


@asynccontextmanager
async def target(directory: Path) -> AsyncIterator[Case]:
    """Run the cases, which need nothing."""
    yield case
