"""The decoder agrees with an independent reading of the standards, over all forms of a message."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from random import Random

import pytest

from ingestor.model import SECOND, Micros, Reason, Tick
from ingestor.stream.decoder import Decoder, Message, Refused
from tests.oracle import read

NOW: Micros = 1_772_409_600 * SECOND
ZONE = "Pacific/Auckland"
MESSAGES = 6000

DAYS = ["2021-09-29", "2016-12-31", "2024-02-29", "2020-04-05", "2021-09-26", "2026-03-03"]
ODD_DAYS = [
    "2021-02-29",
    "1989-12-31",
    "1990-01-01",
    "0000-02-29",
    "0001-01-01",
    "9999-12-31",
    "2026-03-04",
    "1900-02-29",
    "2021-13-01",
    "2021-00-10",
    "2021-09-31",
    "2021-09-00",
    "21-09-29",
    "2021-9-29",
    "2021/09/29",
    "20210929",
    "2021-272",
]
CLOCKS = ["09:33:30", "00:00:00", "23:59:59", "02:30:00", "13:00:00", "02:59:59"]
ODD_CLOCKS = [
    "23:59:60",
    "12:59:60",
    "24:00:00",
    "24:00:01",
    "23:60:00",
    "09:33:61",
    "09:33",
    "23:59",
    "09",
    "9:33:30",
    "093330",
    "09:33:3",
    "99:99:99",
    "09:33:30:00",
    "-9:33:30",
    "09.33.30",
]
FRACTIONS = ["", "", *[".5", ".000001", ".645", ".123456", ".9999999", ".0000009", ".1234567890123456789"]]
ODD_FRACTIONS = [". 5", *[".", ",5", ".5.5", ".-5", "e3", ".5e3", ".٥", ".0x1"]]
OFFSETS = ["", "", *["Z", "z", "+00:00", "-00:00", "+13:00", "-09:30", "+23:59", "-23:59", "+05:45"]]
ODD_OFFSETS = [
    " Z",
    *[
        "+10:60",
        "+24:00",
        "-24:00",
        "+1000",
        "+10",
        "+1:00",
        "+10:0",
        "ZZ",
        "+10:00:00",
        "+99:99",
        "UTC",
        "−10:00",
        "[X]",
    ],
]
PRICES = [
    "2.61",
    "3",
    "0",
    "-0",
    "-0.0",
    "1e2",
    "1E+2",
    "12.5e-1",
    "0.1e1",
    "5e-324",
    "1e-400",
    "1.7976931348623157e308",
    "99999999999999999999",
    "0.30000000000000004",
    "9007199254740993",
    "2.4703282292062328e-324",
    "123456789.012345678901234567890",
]
VOLUMES = [
    "5000",
    "0",
    "-0",
    "5e3",
    "5000.0",
    "50E+2",
    "500000e-2",
    "9223372036854775807",
    "9007199254740993.0",
    "0.0",
    "0e5",
    "9.223372036854775807e18",
]
ODD_NUMBERS = [
    "1e400",
    "-1e400",
    "NaN",
    "Infinity",
    "-Infinity",
    "true",
    "null",
    "[1]",
    "{}",
    "01",
    "1.",
    ".5",
    "+1",
    "-",
    "1e",
    "1e+",
    "0x10",
    "1_000",
    "--1",
    "1.5",
    "-1",
    "9223372036854775808",
    "0.1",
    "1e-7",
    "1e19",
    "5e-1",
    "18446744073709551616",
    "inf",
]
ODD_TEXTS = [
    " 1 ",
    "",
    *[
        "1_000",
        "+1",
        "0x10",
        "١٢",
        "Infinity",
        "NaN",
        "1\\n",
        "1\\u0000",
        "01",
        "1e5",
        "-0",
        "1.0",
        "1,5",
        "\\u0031",
        "1e+5",
        "1.e5",
    ],
]
SYMBOLS = ["A B", *["SUM020.NZ", "A", "\\u0041IR.NZ", "Ω.NZ", "\\ud83d\\ude00", "A\\/B", 'a\\"b', "\\\\"], "x" * 32]
ODD_SYMBOLS = ["", " A", "A ", "A\tB", "\u3000A", "x" * 33]
ODD_SYMBOLS += ["A\\n", "A\\u0000B", "\\ud83d", "\\ude00\\ud83d", "\\u0085", "A\x7f", "\\x41", "\\u00"]
STRAY = [
    '"note":"\\q"',
    '"note":NaN',
    '"note":[1,]',
    '"note":"\\ud800"',
    '"note":01',
    '"n\\u006fte":1',
    '"x":{"price":7}',
    '"":null',
    "'a':1",
]
BLANKS = ["", "", "", " ", "\n", "\t ", "\r\n"]
ODD_BLANKS = ["\x0b", "\x0c", "\u00a0", "\ufeff", "//", "\0"]


class Generator:
    """Writes messages that are valid but for a few fields, each of which may be right, odd or wrong."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)

    def one(self, good: Sequence[str], odd: Sequence[str], chance: float = 0.12) -> str:
        return self.random.choice(odd if self.random.random() < chance else good)

    def date(self) -> str:
        separator = self.one(["T", "T", "t", " "], ["_", "", "  ", "T "], 0.04)
        text = self.one(DAYS, ODD_DAYS) + separator + self.one(CLOCKS, ODD_CLOCKS)
        return f'"{self.escaped(text + self.one(FRACTIONS, ODD_FRACTIONS) + self.one(OFFSETS, ODD_OFFSETS))}"'

    def number(self, good: Sequence[str]) -> str:
        kind = self.random.random()
        if kind < 0.2:
            return f'"{self.one(good, ODD_TEXTS, 0.4)}"'
        return self.one(good, ODD_NUMBERS)

    def symbol(self) -> str:
        return f'"{self.one(SYMBOLS, ODD_SYMBOLS)}"'

    def escaped(self, text: str) -> str:
        """Write some characters as escapes, which changes nothing."""
        if self.random.random() < 0.9:
            return text
        return "".join(f"\\u{ord(c):04x}" if self.random.random() < 0.2 else c for c in text)

    def fields(self) -> list[str]:
        """Return the fields of a price in any order, rarely one too few, rarely one twice."""
        writers = {
            "date": self.date,
            "price": lambda: self.number(PRICES),
            "volume": lambda: self.number(VOLUMES),
            "symbol": self.symbol,
        }
        found = [f'"{self.escaped(name)}":{self.blank()}{write()}' for name, write in writers.items()]
        if self.random.random() < 0.1:
            name = self.random.choice(list(writers))
            found.append(f'"{name}":{writers[name]()}')
        if self.random.random() < 0.03:
            found.pop(self.random.randrange(len(found)))
        if self.random.random() < 0.1:
            found.append(self.random.choice(STRAY))
        if self.random.random() < 0.3:
            self.random.shuffle(found)
        return found

    def data(self) -> str:
        return f'"data":{self.blank()}{{{",".join(self.fields())}}}'

    def blank(self) -> str:
        return self.one(BLANKS, ODD_BLANKS, 0.003)

    def message(self) -> bytes:
        kinds = ['"type":"pr\\u0069ce"', '"type":"trade"', '"type":5', '"Type":"price"']
        members = [self.one(['"type":"price"'], kinds, 0.05), self.data()]
        if self.random.random() < 0.08:
            again = ['"type":"price"', '"type":"trade"', '"type":null', '"data":null']
            members.append(self.random.choice([*again, self.data()]))
        if self.random.random() < 0.3:
            self.random.shuffle(members)
        text = self.blank() + "{" + ",".join(members) + "}" + self.blank()
        if self.random.random() < 0.03:
            at = self.random.randrange(len(text))
            text = text[:at] + self.random.choice(["", '"', "}", ",", "\\", "\x00", "\ud800"]) + text[at + 1 :]
        return text.encode("utf-8", "surrogatepass")


def agrees(message: Message, expected: Tick | set[Reason]) -> bool:
    if isinstance(expected, Tick):
        return message == expected
    return isinstance(message, Refused) and message.reason in expected


@pytest.mark.parametrize("seed", range(3))
def test_the_decoder_agrees_with_the_standards(seed: int) -> None:
    """Fast and complete path give the oracle's tick, or one of its reasons, for each message."""
    generator, decoder, counts = Generator(seed), Decoder(ZONE), Counter[str]()
    for _ in range(MESSAGES):
        frame = generator.message()
        expected = read(frame, NOW, ZONE)
        message = decoder.decode(frame, NOW)
        assert agrees(message, expected), (frame, message, expected)
        counts["tick" if isinstance(message, Tick) else message.reason] += 1  # type: ignore[union-attr]
        if Reason.INVALID_UTF8 not in ([] if isinstance(expected, Tick) else expected):
            assert decoder._decode_slowly(frame, NOW) == message, frame
    assert counts["tick"] > MESSAGES / 5
    assert len(counts) > 14, counts


def odd_dates() -> Iterator[str]:
    for parts in product(DAYS[:2] + ODD_DAYS, CLOCKS[:1] + ODD_CLOCKS, FRACTIONS[1:3], OFFSETS[1:4] + ODD_OFFSETS[:3]):
        yield "{}T{}{}{}".format(*parts)
    for end in product(FRACTIONS + ODD_FRACTIONS, OFFSETS + ODD_OFFSETS):
        yield "2021-09-29T09:33:30{}{}".format(*end)


def quoted(texts: Iterable[str]) -> list[str]:
    return [f'"{text}"' for text in texts]


def test_each_odd_thing_alone() -> None:
    """Each odd form in an otherwise valid message is accepted, or refused for its own reason."""
    good = {"date": '"2021-09-29T09:33:30Z"', "price": "2.61", "volume": "5000", "symbol": '"AIR.NZ"'}
    odd = {
        "date": quoted(odd_dates()),
        "price": PRICES + ODD_NUMBERS + quoted(PRICES + ODD_NUMBERS + ODD_TEXTS),
        "volume": VOLUMES + ODD_NUMBERS + quoted(VOLUMES + ODD_NUMBERS + ODD_TEXTS),
        "symbol": ODD_NUMBERS + quoted(SYMBOLS + ODD_SYMBOLS),
    }
    decoder = Decoder(ZONE)
    for name, forms in odd.items():
        for form in forms:
            data = ",".join(f'"{field}":{text}' for field, text in (good | {name: form}).items())
            frame = f'{{"type":"price","data":{{{data}}}}}'.encode()
            message, expected = decoder.decode(frame, NOW), read(frame, NOW, ZONE)
            assert agrees(message, expected), (frame, message, expected)
            assert decoder._decode_slowly(frame, NOW) == message
