"""The REST client works against correct and incorrect servers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import httpx
import pytest

from ingestor.backfill import client as module
from ingestor.backfill.bars import Bars
from ingestor.backfill.client import RestClient, SourceError, UnknownTickerError
from ingestor.clock import from_datetime
from ingestor.errors import ConfigurationError
from ingestor.model import SECOND, Bar, Tick
from ingestor.simulator.server import TOKEN, Simulator
from tests.clocks import HANG_SECONDS, ManualClock
from tests.rest import HANG, Request, answer, scripted

START = datetime(2026, 11, 19, 21, 0, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def bar(minute: int, price: float = 1.0, volume: Any = 5) -> dict[str, Any]:
    """Return a bar as the API sends it: in Auckland's time, without an offset."""
    moment = (START + minute * MINUTE).astimezone(ZoneInfo("Pacific/Auckland")).replace(tzinfo=None)
    prices = dict.fromkeys(("open", "high", "low", "close"), price)
    return {"timestamp": moment.isoformat(), **prices, "volume": volume}


def bars(*minutes: int) -> bytes:
    return answer({"ticker": "AIR.NZ", "hits": len(minutes), "data": [bar(minute) for minute in minutes]})


@contextlib.asynccontextmanager
async def client(url: str, clock: Any = None, timeout: float = HANG_SECONDS) -> AsyncIterator[RestClient]:
    async with RestClient(
        url, TOKEN, timezone="Pacific/Auckland", clock=clock or ManualClock(), timeout=timeout
    ) as found:
        yield found


async def minutes(url: str, *, until: int = 10, **options: Any) -> list[int]:
    """Request the minutes from the start on; return those that came."""
    async with client(url, **options) as found:
        received = await found.minutes("AIR.NZ", START, START + until * MINUTE, "start")
    return [(each.time - START) // MINUTE for each in received.bars]


async def test_against_the_simulator() -> None:
    """The documented API serves bars of the streamed ticks and instruments with names; an unknown ticker is refused."""
    async with Simulator(port=0, rate=0) as simulator:
        start = from_datetime(START)
        simulator.send([Tick("AIR.NZ", start + 61 * SECOND, price, 10) for price in (0.5, 0.75, 0.25)])
        async with client(simulator.rest_url) as found:
            assert await found.minutes("AIR.NZ", START, START + 5 * MINUTE, "start") == Bars(
                (Bar(START + MINUTE, 0.5, 0.75, 0.25, 0.25, 30),), 1
            )
            assert await found.minutes("AIR.NZ", START, START + 5 * MINUTE, "end") == Bars(
                (Bar(START, 0.5, 0.75, 0.25, 0.25, 30),), 1
            )
            assert await found.minutes("AIR.NZ", START, START + MINUTE, "start") == Bars((), 0)
            listed = {each.symbol: each for each in (await found.instruments()).listed}
            assert listed["AIR.NZ"].company_name == "Air New Zealand"
            assert listed["AIR.NZ"].active
            assert isinstance(listed["AIR.NZ"].uuid, UUID)
            with pytest.raises(UnknownTickerError):
                await found.minutes("NONE.NZ", START, START + MINUTE, "start")


async def test_requests_of_bars() -> None:
    """A request has the exchange's wall time, the ticker, and the token in a header, where no log shows it."""
    async with scripted(lambda _: bars()) as server:
        await minutes(server.url)
    (asked,) = server.asked
    assert asked.path == "/data/intraday"
    assert asked.parameters == {
        "ticker": "AIR.NZ",
        "exchange": "nzx",
        "datetime_from": "2026-11-20 10:00:00",
        "datetime_to": "2026-11-20 10:10:00",
        "interval": "1m",
    }
    assert asked.headers["authorization"] == f"bearer {TOKEN}".lower()


async def test_bars_outside_of_the_range_are_dropped() -> None:
    """Bars outside of the range are dropped: the end may be inclusive, or the answer a whole day."""
    async with scripted(lambda _: bars(-5, -1, 0, 3, 9, 10, 300)) as server:
        assert await minutes(server.url) == [0, 3, 9]


@pytest.mark.parametrize(
    "failure",
    [
        answer({"message": "busy"}, status=500),
        answer({"message": "busy"}, status=503),
        answer({"message": "busy"}, status=502),
        answer({"message": "slow"}, status=408),
        answer({"message": "early"}, status=425),
        bars(1, 2)[:-10],
        answer([bar(1)], cut=20),
        answer(b"<html>proxy error</html>"),
        answer({"message": "no data here"}),
        answer(b"\xff\xfe"),
        answer(b'{"data": [], "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n",
    ],
)
async def test_transient_failures(failure: bytes) -> None:
    """A server error, a cut or a malformed answer is retried; the final error gives the number of attempts."""
    left = [failure, failure]
    async with scripted(lambda _: left.pop() if left else bars(1, 2)) as server:
        assert await minutes(server.url) == [1, 2]
        assert len(server.asked) == 3
    async with scripted(lambda _: failure) as server:
        with pytest.raises(SourceError, match="5 times"):
            await minutes(server.url)
        assert len(server.asked) == 5


async def test_a_server_that_hangs() -> None:
    """A hanging server times out and is retried."""

    def script(_: Request) -> bytes:
        if len(server.asked) > 1:
            return bars(1)
        found._http.timeout = httpx.Timeout(HANG_SECONDS)  # from the next request on, which is answered
        return HANG

    async with scripted(script) as server, client(server.url, timeout=1) as found:
        received = await found.minutes("AIR.NZ", START, START + MINUTE * 5, "start")
    assert [each.time for each in received.bars] == [START + MINUTE]
    assert len(server.asked) == 2


async def test_no_server() -> None:
    """The error says that no server listens."""
    async with scripted(lambda _: HANG) as server:
        url = server.url
    with pytest.raises(SourceError, match="Connection refused"):
        await minutes(url)


@pytest.mark.parametrize(
    ("fields", "what"),
    [({"hits": 400}, "400 hits"), ({"interval": "1h"}, "interval"), ({"ticker": "FPH.NZ"}, "ticker 'FPH.NZ'")],
)
async def test_an_answer_to_another_question(fields: dict[str, Any], what: str) -> None:
    """An answer that names a smaller range or a longer interval is refused."""
    async with scripted(lambda _: answer({"data": [bar(2)], **fields})) as server:
        with pytest.raises(SourceError, match=what):
            await minutes(server.url)


@pytest.mark.parametrize("ticker", ["AIR.NZ", "air.nz", "AIR", None])
async def test_an_answer_that_names_its_ticker(ticker: str | None) -> None:
    """The ticker of an answer may be in any case, with or without its suffix."""
    async with scripted(lambda _: answer({"data": [bar(2)], "ticker": ticker})) as server:
        assert await minutes(server.url) == [2]


async def test_an_incomplete_listing() -> None:
    """An incomplete listing is refused, since the missing instruments would seem delisted."""
    async with scripted(lambda _: answer({"hits": 2, "data": [{"symbol": "A.NZ"}]})) as server:
        async with client(server.url) as found:
            with pytest.raises(SourceError, match=r"/info/ticker: .* 2 hits and 1 instruments"):
                await found.instruments()


async def test_a_bad_instrument_leaves_the_others_intact() -> None:
    """An invalid record is left out; invalid fields are corrected or left empty."""
    records = [{"symbol": "A.NZ", "active": None, "company_name": "a\0b", "uuid4": "x"}, {"symbol": 7}, {}, "B.NZ",
               {"symbol": "C\0.NZ"}, {"symbol": "D.NZ", "active": False, "meta": [[[[]]]]}]  # fmt: skip
    async with scripted(lambda _: answer({"data": records})) as server, client(server.url) as found:
        instruments = await found.instruments()
    assert [(each.symbol, each.company_name, each.active) for each in instruments.listed] == [
        ("A.NZ", "ab", True), ("D.NZ", None, False)
    ]  # fmt: skip


@pytest.mark.parametrize("url", ["https://xn--a.com", "https://a\x01b.nz"])
async def test_an_address_that_cannot_be_used(url: str) -> None:
    """An unusable address is an error of the settings."""
    with pytest.raises(ConfigurationError, match="INGESTOR_REST_URL"):
        await minutes(url)


async def test_an_endless_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A huge answer is not read to its end."""
    monkeypatch.setattr(module, "MAX_ANSWER", 1000)
    async with scripted(lambda _: bars(*range(200))) as server:
        with pytest.raises(SourceError, match="larger than"):
            await minutes(server.url)


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_token_requires_operator_action(status: int) -> None:
    """A refused token ends the run, since no other request would succeed."""
    async with scripted(lambda _: answer({"message": "no"}, status=status)) as server:
        with pytest.raises(ConfigurationError, match=rf"INGESTOR_TOKEN: 127.0.0.1 refused it \({status}") as caught:
            await minutes(server.url)
        assert TOKEN not in str(caught.value)
        assert len(server.asked) == 1


@pytest.mark.parametrize("status", [301, 307, 400, 410])
async def test_redirects_and_other_refusals(status: int) -> None:
    """The token follows no redirect, and a permanent refusal is not retried."""
    async with scripted(lambda _: answer({}, status=status, location="http://127.0.0.1:1/")) as server:
        with pytest.raises(SourceError, match=f"answered {status}"):
            await minutes(server.url)
        assert len(server.asked) == 1


@pytest.mark.parametrize("form", ["moment", "milliseconds", "seconds", "retry-after", "nothing"])
async def test_the_rate_limit(form: str) -> None:
    """After a 429 the client waits until the reset, in any form, and counts no failure."""
    clock = ManualClock()
    began = clock.monotonic()
    forms: dict[str, dict[str, Any]] = {
        "moment": {"x_ratelimit_reset": f"{clock.wall() / SECOND + 40:.0f}"},
        "milliseconds": {"x_ratelimit_reset": f"{clock.wall() / 1000 + 40_000:.0f}"},
        "seconds": {"x_ratelimit_reset": 40},
        "retry-after": {"retry_after": 40},
        "nothing": {},
    }
    left = [answer({"message": "slow"}, status=429, **forms[form])] * 7
    waits: list[float] = []

    def script(_: Request) -> bytes:
        return left.pop() if left else bars(1)

    async with scripted(script) as server:
        async with RestClient(
            server.url, TOKEN, timezone="Pacific/Auckland", clock=clock, on_wait=waits.append
        ) as found:
            assert len((await found.minutes("AIR.NZ", START, START + 5 * MINUTE, "start")).bars) == 1
    assert clock.monotonic() - began >= (70 if form == "nothing" else 40)
    assert waits[0] == pytest.approx(10 if form == "nothing" else 40, abs=1)


async def test_an_exhausted_rate_limit() -> None:
    """If an answer used up the limit, the next request waits for the reset."""
    clock = ManualClock()
    began = clock.monotonic()
    good = {"data": [bar(1)]}
    async with scripted(lambda _: answer(good, x_ratelimit_remaining=0, x_ratelimit_reset=30)) as server:
        async with client(server.url, clock) as found:
            for _ in range(3):
                await found.minutes("AIR.NZ", START, START + 5 * MINUTE, "start")
    assert 60 <= clock.monotonic() - began < 90


async def test_a_shorter_wait_does_not_replace_a_longer_one() -> None:
    """Of consecutive answers, the latest reset counts."""
    clock = ManualClock()
    began = clock.monotonic()
    resets = [5, 600]  # of two concurrent requests, the last to be answered

    def script(_: Request) -> bytes:
        return answer({"data": []}, x_ratelimit_remaining=0, x_ratelimit_reset=resets.pop()) if resets else bars(1)

    async with scripted(script) as server, client(server.url, clock) as found:
        ask = partial(found.minutes, "AIR.NZ", START, START + 5 * MINUTE, "start")
        await asyncio.gather(ask(), ask())
        assert clock.monotonic() == began
        await ask()
    assert clock.monotonic() - began >= 599


async def test_retry_after_of_a_busy_server() -> None:
    """After a 503, the server is not asked before the time in Retry-After."""
    clock = ManualClock()
    began = clock.monotonic()
    left = [answer({}, status=503, retry_after=90)]
    async with scripted(lambda _: left.pop() if left else bars(1)) as server, client(server.url, clock) as found:
        assert len((await found.minutes("AIR.NZ", START, START + 5 * MINUTE, "start")).bars) == 1
    assert clock.monotonic() - began >= 90


async def test_an_endless_rate_limit() -> None:
    """A rate limit that never ends is an error."""
    async with scripted(lambda _: answer({}, status=429, x_ratelimit_reset=5)) as server:
        with pytest.raises(SourceError, match="20 resets"):
            await minutes(server.url)


async def test_offsets_and_the_repeated_hour() -> None:
    """Offsets in times are respected; the bars of a repeated hour are taken in their order."""
    first = datetime(2026, 4, 4, 13, 0, tzinfo=UTC)  # 02:00 in Auckland, for the first time
    stamps = ["2026-04-05T02:00:00", "2026-04-05T02:59:00", "2026-04-05T02:00:00", "2026-04-05T02:30:00.000000",
              "2026-04-05T03:00:00", "2026-04-05T03:01:00+12:00"]  # fmt: skip
    body = {"data": [{**bar(0), "timestamp": stamp} for stamp in stamps]}
    async with scripted(lambda _: answer(body)) as server:
        async with client(server.url) as found:
            received = await found.minutes("AIR.NZ", first, first + 180 * MINUTE, "start")
            assert [(each.time - first) // MINUTE for each in received.bars] == [0, 59, 60, 90, 120, 121]
            late = await found.minutes("AIR.NZ", first + 60 * MINUTE, first + 90 * MINUTE, "start")
    assert [(each.time - first) // MINUTE for each in late.bars][:1] == [60]
    assert server.asked[1].parameters["datetime_from"] == "2026-04-05 02:00:00"
    assert server.asked[1].parameters["datetime_to"] == "2026-04-05 03:30:00"


async def test_no_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client uses the URL's host directly, whatever proxies are set."""
    async with scripted(lambda _: bars(2)) as proxy, scripted(lambda _: bars(1)) as server:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        assert await minutes(server.url) == [1]
        assert (len(server.asked), len(proxy.asked)) == (1, 0)
