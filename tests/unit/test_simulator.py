from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from ingestor.clock import from_datetime, to_datetime
from ingestor.errors import ConfigurationError
from ingestor.model import SECOND, Micros, Tick
from ingestor.protocol.messages import price_message, wall_time
from ingestor.simulator.bars import Bars
from ingestor.simulator.faults import DEFAULTS, GARBAGE, Fault, Faults
from ingestor.simulator.market import Market, listing, price_step
from ingestor.simulator.rest import RestApi
from ingestor.stream.decoder import Decoder, Refused

ZONE = ZoneInfo("Pacific/Auckland")
NOW: Micros = from_datetime(datetime(2026, 3, 2, 1, 0, tzinfo=UTC))  # 14:00 in Auckland


def ticks(seed: int = 1, rate: float = 100, seconds: int = 60, cycle: float = 60) -> list[Tick]:
    return Market(seed, rate, NOW, cycle=cycle).until(NOW + seconds * SECOND)


def test_the_same_seed_gives_the_same_market() -> None:
    """The same seed gives the same market, at any interval of reading."""
    market, together = Market(7, 100, NOW), ticks(7, cycle=600)
    assert [t for s in range(1, 61) for t in market.until(NOW + s * SECOND)] == together
    assert ticks(8, cycle=600) != together


def test_prices_lie_on_the_grid() -> None:
    """A price is a whole number of its steps, without rounding noise, also where the steps become coarser."""
    made = ticks(seed=3, seconds=600)
    finer, coarser = (
        {tick.symbol for tick in made if low <= tick.price < high} for low, high in ((0.1, 0.2), (0.2, 0.3))
    )
    assert finer & coarser, "no price of this seed passes from one step to another: take another seed"
    for tick in made:
        steps = tick.price / price_step(tick.price)
        assert abs(steps - round(steps)) < 1e-6
        assert tick.price == round(tick.price, 3) > 0
        assert tick.volume > 0


def test_market_statistics() -> None:
    """The mean rate is kept; open and close are busy; symbols are uneven; equal trades in a second occur."""
    made = ticks(seconds=60)
    assert len(made) == pytest.approx(6000, abs=5)
    by_second = Counter((tick.time - NOW) // SECOND for tick in made)
    assert min(by_second[1], by_second[58]) > 2 * by_second[30]
    symbols = [count for _, count in Counter(tick.symbol for tick in made).most_common()]
    assert symbols[0] > 5 * symbols[-1] > 0
    assert len(symbols) == len(listing())
    pairs = [(one, two) for one, two in pairwise(made) if (one.symbol, one.time) == (two.symbol, two.time)]
    equal = sum(one == two for one, two in pairs)
    split = sum(one.price == two.price and one.volume != two.volume for one, two in pairs)
    assert equal / len(made) == pytest.approx(0.04, abs=0.01)
    assert split / len(made) == pytest.approx(0.09, abs=0.02)
    assert [tick.time for tick in made] == sorted(tick.time for tick in made)


def test_wire_format_is_the_documented_one() -> None:
    """The documented sample is written literally; a whole price is an integer."""
    time = from_datetime(datetime(2021, 9, 28, 20, 33, 30, tzinfo=UTC))
    message = json.loads(price_message(Tick("SUM020.NZ", time, 2.61, 5000), ZONE))
    sample = {"date": "2021-09-29T09:33:30", "price": 2.61, "volume": 5000, "symbol": "SUM020.NZ"}
    assert message == {"type": "price", "data": sample}
    assert b'"price":3,' in price_message(Tick("A", time, 3.0, 1), ZONE)


@pytest.mark.parametrize(
    ("utc", "expected"),
    [
        ("2021-04-03T13:59:59", "2021-04-04T02:59:59"),  # the last second of summer time
        ("2021-04-03T14:00:00", "2021-04-04T02:00:00"),  # the same hour again
        ("2021-04-03T15:00:00", "2021-04-04T03:00:00"),
        ("2021-09-25T13:59:59", "2021-09-26T01:59:59"),
        ("2021-09-25T14:00:00", "2021-09-26T03:00:00"),  # an hour is missing
        ("2021-09-28T20:33:30.000250", "2021-09-29T09:33:30.000250"),
    ],
)
def test_wall_time(utc: str, expected: str) -> None:
    """An instant is sent as Auckland's wall time without an offset, also on the days of a clock change."""
    assert wall_time(from_datetime(datetime.fromisoformat(utc).replace(tzinfo=UTC)), ZONE) == expected


def test_the_decoder_reads_the_simulator() -> None:
    """The daemon's decoder reads the simulator's messages back to the same ticks."""
    decoder = Decoder("Pacific/Auckland")
    for tick in ticks(seconds=5):
        assert decoder.decode(price_message(tick, ZONE), NOW) == tick


def test_garbage_is_refused() -> None:
    """The daemon's decoder refuses each malformed message."""
    decoder = Decoder("Pacific/Auckland")
    for message in GARBAGE:
        binary = isinstance(message, bytes)
        frame = message if isinstance(message, bytes) else message.encode()
        assert isinstance(decoder.decode(frame, NOW, binary=binary), Refused)


@pytest.mark.parametrize("text", ["", "explode", "drop=", "drop=0s", "drop=x", "reject=5s", "replay=1s"])
def test_bad_faults(text: str) -> None:
    """An unknown fault, or an invalid duration, is reported with the valid values."""
    with pytest.raises(ConfigurationError, match="half-open"):
        Faults([text])


def test_a_bad_fault_is_clear() -> None:
    """The message repeats the value, names its fault, and lists every fault."""
    with pytest.raises(ConfigurationError) as caught:
        Faults(["drop", "reject=5s"])
    (line,) = caught.value.problems
    assert "--fault reject=5s: reject takes no duration" in line
    assert all(fault in line for fault in Fault)


@pytest.mark.parametrize(
    ("text", "fault", "seconds"),
    [
        *((str(fault), fault, seconds) for fault, seconds in DEFAULTS.items()),
        ("drop=5s", Fault.DROP, 5),
        ("stall=250ms", Fault.STALL, 0.25),
        ("half-open=2m", Fault.HALF_OPEN, 120),
        ("garbage=3", Fault.GARBAGE, 3),
    ],
)
def test_faults_strike_as_often_as_asked(text: str, fault: Fault, seconds: float) -> None:
    """An enabled fault occurs, alone, after the given mean time or its default."""
    faults = Faults([text])
    assert [each for each in Fault if each in faults] == [fault]
    waits = [faults.due_after(fault) or 0 for _ in range(4000)]
    assert sum(waits) / len(waits) == pytest.approx(seconds, rel=0.1)


def test_faults_are_seeded() -> None:
    """The same seed gives the same times; a disabled fault never occurs."""
    one, two = Faults(["drop=5s"], seed=3), Faults(["drop=5s"], seed=3)
    assert [one.due_after(Fault.DROP) for _ in range(5)] == [two.due_after(Fault.DROP) for _ in range(5)]
    assert one.due_after(Fault.STALL) is None
    assert [Faults(["limit"]).refusal() for _ in range(2)] == [None, None]
    limit = Faults(["limit"])
    assert [limit.refusal() for _ in range(4)] == [None, Fault.LIMIT, None, Fault.LIMIT]


def api(limit: int = 1000, clock: list[Micros] | None = None) -> tuple[RestApi, list[Tick]]:
    made = ticks(seconds=300, rate=20, cycle=300)
    bars = Bars()
    for tick in made:
        bars.add(tick)
    now = clock or [NOW + 300 * SECOND]
    return RestApi(bars, token="tk_right", timezone=ZONE, now=lambda: now[0], limit=limit), made


def get(rest: RestApi, target: str, token: str | None = "tk_right") -> tuple[int, dict[str, Any]]:
    answer = rest.answer(target, None if token is None else f"Bearer {token}")
    return int(answer.status), answer.body


def test_bars_are_those_of_the_ticks() -> None:
    """Each one-minute bar has the values of its minute's ticks, to the unit."""
    rest, made = api()
    status, body = get(
        rest, "/data/intraday?ticker=FPH.NZ&datetime_from=2026-03-02%2014:00:00&datetime_to=2026-03-02%2014:05:00"
    )
    assert (status, body["hits"], body["interval"], body["ticker"]) == (200, 5, "1m", "FPH.NZ")
    for minute, bar in enumerate(body["data"]):
        mine = [t for t in made if t.symbol == "FPH.NZ" and (t.time - NOW) // (60 * SECOND) == minute]
        prices = [tick.price for tick in mine]
        assert bar == {
            "timestamp": f"2026-03-02T14:0{minute}:00",
            "open": prices[0],
            "high": max(prices),
            "low": min(prices),
            "close": prices[-1],
            "volume": sum(tick.volume for tick in mine),
        }


@pytest.mark.parametrize("day", ["2026-03-02", "2026-04-05", "2025-09-28"])  # plain, of 25 hours, of 23 hours
@pytest.mark.parametrize("interval", ["1m", "1h", "1d"])
def test_bars_over_days(day: str, interval: str) -> None:
    """Minutes, hours and days of three days of ticks equal, to the unit, an independent computation."""
    noon = datetime.fromisoformat(f"{day}T12:00").replace(tzinfo=ZONE)
    begin, end = noon - timedelta(days=1), noon + timedelta(days=1)
    start = from_datetime(begin)
    # 432 seconds of a market, stretched to two days.
    made = [Tick(t.symbol, start + (t.time - NOW) * 400, t.price, t.volume) for t in ticks(5, 20, 432, 432)]
    bars = Bars()
    expected: dict[str, list[Tick]] = {}
    for tick in made:
        bars.add(tick)
        wall = to_datetime(tick.time).astimezone(ZONE).replace(microsecond=0)
        label = wall.replace(second=0)
        if interval != "1m":
            label = label.replace(minute=0)
        if interval == "1d":
            label = label.replace(hour=0, fold=0)
        if tick.symbol == "FPH.NZ":
            expected.setdefault(label.isoformat(), []).append(tick)  # the offset distinguishes a repeated hour
    rest = RestApi(bars, token="tk_right", timezone=ZONE, now=lambda: NOW, limit=10)
    if interval == "1d":
        span = f"date_from={begin:%Y-%m-%d}&date_to={end:%Y-%m-%d}"
    else:
        span = f"datetime_from={begin:%Y-%m-%d} 00:00:00&datetime_to={end:%Y-%m-%d} 23:59:59"
    path = "eod" if interval == "1d" else "intraday"
    status, body = get(rest, f"/data/{path}?ticker=FPH.NZ&interval={interval}&{span}")
    assert status == 200
    assert body["data"] == [
        {
            "timestamp": datetime.fromisoformat(label).replace(tzinfo=None).isoformat(),
            "open": trades[0].price,
            "high": max(tick.price for tick in trades),
            "low": min(tick.price for tick in trades),
            "close": trades[-1].price,
            "volume": sum(tick.volume for tick in trades),
        }
        for label, trades in expected.items()
    ]
    assert body["hits"] == len(expected) >= 3


def test_longer_bars_add_up() -> None:
    """An hour and a day contain the volume of their minutes, and begin at the exchange's time."""
    rest, made = api()
    total = sum(tick.volume for tick in made if tick.symbol == "AIA.NZ")
    _, day = get(rest, "/data/eod?ticker=aia.nz&date_from=2026-03-02&date_to=2026-03-02")
    assert (day["date_from"], day["date_to"]) == ("2026-03-02T00:00:00", "2026-03-02T00:00:00")
    assert [(bar["timestamp"], bar["volume"]) for bar in day["data"]] == [("2026-03-02T00:00:00", total)]
    span = "datetime_from=2026-03-02%2000:00:00&datetime_to=2026-03-03%2000:00:00"
    _, hour = get(rest, f"/data/intraday?ticker=AIA.NZ&{span}&interval=1h")
    assert [(bar["timestamp"], bar["volume"]) for bar in hour["data"]] == [("2026-03-02T14:00:00", total)]
    _, last = get(rest, "/data/last?ticker=AIA.NZ")
    assert (last["hits"], last["data"][0]["timestamp"]) == (1, "2026-03-02T14:04:00")


def test_open_endpoints() -> None:
    """Tickers, the exchange's status and health need no token."""
    rest, _ = api()
    status, body = get(rest, "/info/ticker?exchange=nzx", None)
    assert (status, body["hits"], body["exchange"]) == (200, len(listing()), "nzx")
    expected = {"symbol", "company_name", "industry", "exchange", "uuid4", "active", "meta"}
    assert set(body["data"][0]) == expected
    assert get(rest, "/info/exchange/status?exchange=nzx", None)[1]["data"][0]["status"] == "open"
    assert get(rest, "/health/alive", None)[0] == 200


def test_the_shape_of_a_series() -> None:
    """Bars come with the documented fields around them, for minutes, days and the last one."""
    rest, _ = api()
    first = listing()[0]
    common = {"ticker": first.symbol, "company_name": first.company_name, "exchange": "nzx", "uuid4": first.uuid4}
    fields = {"timestamp", "open", "high", "low", "close", "volume"}
    shape = {*common, "date_from", "date_to", "interval", "hits", "took_ms", "data"}
    times = "datetime_from=2026-03-02%2014:00:00&datetime_to=2026-03-02%2014:02:00"
    for target, interval, hits in (
        (f"/data/intraday?ticker={first.symbol}&exchange=nzx&{times}&interval=1m", "1m", 2),
        (f"/data/eod?ticker={first.symbol}&date_from=2026-03-01&date_to=2026-03-03", "1d", 1),
        (f"/data/last?ticker={first.symbol}&exchange=NZX", "1m", 1),
    ):
        status, body = get(rest, target)
        assert (status, set(body)) == (200, shape)
        assert {name: body[name] for name in common} == common
        assert (body["interval"], body["hits"], len(body["data"])) == (interval, hits, hits)
        assert all(set(bar) == fields for bar in body["data"])
        assert isinstance(body["took_ms"], int)
        assert datetime.fromisoformat(body["date_from"]) < datetime.fromisoformat(body["date_to"])


def test_no_trades_give_no_bars() -> None:
    """A symbol without trades is no error: no hits, and no data."""
    rest, _ = api()
    target = "/data/intraday?ticker=FPH.NZ&datetime_from=2026-03-01%2010:00:00&datetime_to=2026-03-01%2011:00:00"
    status, body = get(rest, target)
    assert (status, body["hits"], body["data"]) == (200, 0, [])
    empty = RestApi(Bars(), token="tk_right", timezone=ZONE, now=lambda: NOW, limit=10)
    status, body = get(empty, "/data/last?ticker=FPH.NZ")
    assert (status, body["hits"], body["data"]) == (200, 0, [])


@pytest.mark.parametrize("key", [listing()[3].symbol.lower(), listing()[3].uuid4, listing()[3].uuid4.upper()])
def test_keys_of_a_ticker(key: str) -> None:
    """A symbol is found in either case, and by its uuid4, with the same answer."""
    rest, _ = api()
    assert get(rest, f"/data/last?ticker={key}") == get(rest, f"/data/last?ticker={listing()[3].symbol}")


@pytest.mark.parametrize(
    ("target", "token", "status"),
    [
        ("/oauth/validate", "tk_right", 200),
        ("/oauth/validate", "tk_wrong", 403),
        ("/data/last?ticker=FPH.NZ", None, 403),
        ("/data/last?ticker=FPH.NZ", "tk_right", 200),
        (f"/data/last?ticker={listing()[0].uuid4}", "tk_right", 200),
        ("/data/last?ticker=NOPE.NZ", "tk_right", 404),
        ("/data/last", "tk_right", 400),
        ("/data/last?ticker=", "tk_right", 400),
        ("/data/intraday?ticker=FPH.NZ", "tk_right", 400),
        ("/data/intraday?ticker=FPH.NZ&datetime_from=2026-03-02%2014:00:00", "tk_right", 400),
        (
            "/data/intraday?ticker=FPH.NZ&datetime_from=2026-03-02&datetime_to=2026-03-02%2014:00:00",
            "tk_right",
            400,
        ),
        ("/data/eod?ticker=FPH.NZ&date_to=2026-03-02", "tk_right", 400),
        ("/data/eod?ticker=FPH.NZ&date_from=2026-02-30&date_to=2026-03-02", "tk_right", 400),
        ("/data/eod?ticker=FPH.NZ&date_from=2026-03-02&date_to=9999-12-31", "tk_right", 400),
        ("/data/eod?ticker=NOPE.NZ&date_from=2026-03-02&date_to=2026-03-02", "tk_right", 404),
        ("/data/eod?ticker=FPH.NZ&date_from=2026-03-02&date_to=2026-03-02", None, 403),
        ("/data/intraday", "tk_wrong", 403),
        ("/oauth/validate", None, 403),
        ("/data/eod?ticker=FPH.NZ&date_from=2026-03-02&date_to=tomorrow", "tk_right", 400),
        ("/data/eod?ticker=FPH.NZ&date_from=2026-03-02&date_to=2026-03-02&interval=5m", "tk_right", 400),
        ("/info/ticker?exchange=asx", None, 404),
        ("/nothing", None, 404),
    ],
)
def test_refusals(target: str, token: str | None, status: int) -> None:
    """The simulator refuses the same requests as the real service, with a message."""
    rest, _ = api()
    found, body = get(rest, target, token)
    assert found == status
    assert status == 200 or isinstance(body["message"], str)


def test_only_a_bearer_is_accepted() -> None:
    """A token without a scheme, or with another one, is refused with 403."""
    rest, _ = api()
    for authorization in ("tk_right", "Basic tk_right", "Bearer", "Bearer ", "Bearer tk_righ"):
        assert rest.answer("/oauth/validate", authorization).status == 403
    assert rest.answer("/oauth/validate", "Bearer tk_right").body == {"valid": True}


def test_rate_limit() -> None:
    """Every answer gives the remaining requests; beyond the limit it is 429, until the window ends."""
    clock = [NOW]
    rest, _ = api(limit=2, clock=clock)
    left = [rest.answer("/health/alive", None) for _ in range(3)]
    assert [int(answer.status) for answer in left] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining"] for answer in left] == ["1", "0", "0"]
    assert {answer.headers["x-ratelimit-limit"] for answer in left} == {"2"}
    assert {answer.headers["x-ratelimit-reset"] for answer in left} == {str(NOW // SECOND + 60)}
    clock[0] += 60 * SECOND - 1
    assert rest.answer("/oauth/validate", "Bearer tk_right").status == 429
    clock[0] = int(left[2].headers["x-ratelimit-reset"]) * SECOND
    after = rest.answer("/health/alive", None)
    assert (after.status, after.headers["x-ratelimit-remaining"]) == (200, "1")
    assert after.headers["x-ratelimit-reset"] == str(NOW // SECOND + 120)
