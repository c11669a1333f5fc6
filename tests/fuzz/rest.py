"""Damaged answers of a REST server give valid bars in the requested range, or a documented error."""

from __future__ import annotations

import functools
import gzip
import json
import math
import random
import resource
import zlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from ingestor.backfill.client import RestClient, SourceError, UnknownTickerError
from ingestor.errors import ConfigurationError
from ingestor.model import Label
from ingestor.simulator.server import TOKEN
from tests.clocks import ManualClock
from tests.fuzz.target import Case, Counts, mutate
from tests.rest import answer, scripted

ZONE = ZoneInfo("Pacific/Auckland")
MINUTE = timedelta(minutes=1)
SYMBOL = "AIR.NZ"

MEMORY = 192 * 2**20
"""Bytes by which one answer may let this process grow: several times its own limit."""

_QUESTIONS = 20
_DAYS = (
    datetime(2026, 3, 2, 22, 0, tzinfo=UTC),
    datetime(2026, 4, 4, 12, 0, tzinfo=UTC),  # the hours at which the clocks change
    datetime(2026, 9, 26, 12, 0, tzinfo=UTC),
)
_ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1e400,
    -1e400,
    float("nan"),
    2**64,
    0.5,
    "",
    "1",
    "x",
    [],
    {},
    "2026-03-02",
    "NaN",
    "\0",
)
_ODD_STAMPS = (
    "",
    "2026-03-03T11:00:00Z",
    "2026-13-03T11:00:00",
    "2026-03-03T11:00:30",
    "24:00",
    "2026-03-03T11:00:00+13:99",
)
_STATUSES = (204, 206, 301, 400, 401, 403, 404, 408, 418, 425, 429, 500, 502, 503)


@functools.cache
def _bomb() -> bytes:
    """Return a few kilobytes that become 256 MiB when they are decompressed twice."""
    return gzip.compress(gzip.compress(bytes(2**28), 1))


async def case(chance: random.Random) -> Counts:
    """Make some requests; the server answers each in one wrong way, however often it is repeated."""
    reply = b""
    async with scripted(lambda _: reply) as server:
        client = RestClient(server.url, TOKEN, timezone=str(ZONE), clock=ManualClock(), timeout=5)
        async with client:
            for _ in range(_QUESTIONS):
                since = chance.choice(_DAYS) + chance.randint(-90, 90) * MINUTE
                until = since + chance.randint(1, 120) * MINUTE
                label: Label = chance.choice(("start", "end"))
                reply = draw(chance, since, until, label)
                size = _peak_memory()
                await _ask(client, since, until, label)
                grown = _peak_memory() - size
                assert grown < MEMORY, f"an answer of {len(reply)} bytes took {grown // 2**20} MiB of memory"
        return Counter(questions=_QUESTIONS, answers=len(server.asked))


async def _ask(client: RestClient, since: datetime, until: datetime, label: Label) -> None:
    said = ""
    try:
        found: Any = await client.minutes(SYMBOL, since, until, label)
    except (SourceError, UnknownTickerError, ConfigurationError) as error:
        said = str(error)
    else:
        _check(found.bars, since, until)
    assert TOKEN.encode() not in said.encode(), "the error shows the token"


def _check(bars: Any, since: datetime, until: datetime) -> None:
    times = [bar.time for bar in bars]
    assert len(set(times)) == len(times), "a minute comes twice"
    for bar in bars:
        assert since <= bar.time < until, f"{bar} is not between {since} and {until}"
        assert bar.time == bar.time.replace(second=0, microsecond=0), f"{bar} is not a minute"
        prices = (bar.open, bar.high, bar.low, bar.close)
        assert all(map(math.isfinite, prices)), f"{bar} is not finite"
        assert 0 < bar.low <= min(prices) <= max(prices) <= bar.high, f"{bar} cannot be"
        assert type(bar.volume) is int, f"{bar} has a volume that is not a whole number"
        assert 0 <= bar.volume < 2**63, f"{bar} has a volume out of range"


def draw(chance: random.Random, since: datetime, until: datetime, label: Label) -> bytes:
    """Draw an answer: its records, its frame, its bytes or its HTTP may be wrong, or nothing."""
    body = json.dumps(_content(chance, since, until, label)).encode()
    if chance.random() < 0.3:
        body = mutate(body, chance)
    ways = (_plain, _plain, _plain, _refused, _cut, _limited, _damaged, _compressed, _chunked)
    return chance.choice(ways)(body, chance)


def _plain(body: bytes, _: random.Random) -> bytes:
    return answer(body)


def _refused(body: bytes, chance: random.Random) -> bytes:
    return answer(body, status=chance.choice(_STATUSES), x_ratelimit_reset=chance.choice(("", "-1", "1e99", "5")))


def _cut(body: bytes, chance: random.Random) -> bytes:
    return answer(body, cut=chance.randint(1, len(body)))


def _limited(body: bytes, chance: random.Random) -> bytes:
    return answer(body, x_ratelimit_remaining=chance.choice(("0", "-1", "x", "1" * 400, "nan")))


def _damaged(body: bytes, chance: random.Random) -> bytes:
    return mutate(answer(body), chance)


def _content(chance: random.Random, since: datetime, until: datetime, label: Label) -> Any:
    first = since + (MINUTE if label == "end" else timedelta())
    count = (until - since) // MINUTE
    bars = [_bar(first + minute * MINUTE, chance) for minute in range(count) if chance.random() < 0.8]
    content: dict[str, Any] = {
        "ticker": SYMBOL, "company_name": "Air", "exchange": "nzx", "interval": "1m", "hits": len(bars), "data": bars,
    }  # fmt: skip
    draw = chance.random()
    if draw < 0.2 and bars:
        chance.choice(bars)[chance.choice(("open", "high", "low", "close", "volume", "timestamp"))] = chance.choice(
            _ODD
        )
    elif draw < 0.3 and bars:
        chance.choice(bars)["timestamp"] = chance.choice(_ODD_STAMPS)
    elif draw < 0.4:
        far = chance.choice((-1440, -60, -1, count, count + 1, 60 + count, 525_600))
        bars.insert(chance.randint(0, len(bars)), _bar(first + far * MINUTE, chance))
    elif draw < 0.5:
        content[chance.choice(list(content))] = chance.choice(_ODD)
    elif draw < 0.55:
        content.pop(chance.choice(list(content)))
    elif draw < 0.6:
        bars.append(chance.choice(_ODD))
    elif draw < 0.65:
        chance.shuffle(bars)
    elif draw < 0.7 and bars:
        bars.append(chance.choice(bars))
    elif draw < 0.72:
        return chance.choice(_ODD)
    return content


def _bar(moment: datetime, chance: random.Random) -> dict[str, Any]:
    low, start, end, high = sorted(round(chance.uniform(0.1, 90), 3) for _ in range(4))
    stamp = moment if chance.random() < 0.3 else moment.astimezone(ZONE).replace(tzinfo=None)
    values = {"open": start, "high": high, "low": low, "close": end, "volume": chance.randint(0, 10**6)}
    return {"timestamp": stamp.isoformat(), **values}


def _compressed(body: bytes, chance: random.Random) -> bytes:
    draw = chance.randrange(4)
    if draw == 0:
        return answer(_bomb(), content_encoding="gzip, gzip")
    if draw == 1:
        return answer(gzip.compress(body), content_encoding="gzip")
    if draw == 2:
        return answer(zlib.compress(body)[:-1], content_encoding="deflate")
    return answer(body, content_encoding=chance.choice(("gzip", "br", "identity", "x" * 5000, "deflate, gzip")))


def _chunked(body: bytes, chance: random.Random) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    size = chance.choice((f"{len(body):x}", f"{len(body) + 5:x}", "-1", "zz", "f" * 20, "0"))
    return head + f"{size}\r\n".encode() + body + chance.choice((b"\r\n0\r\n\r\n", b"\r\n", b"0\r\n\r\n", b""))


def _peak_memory() -> int:
    """Return the highest memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@asynccontextmanager
async def target(directory: Path) -> AsyncIterator[Case]:
    """Run the cases, which need nothing."""
    yield case
