from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import pytest

from ingestor.chart.geometry import Scale, TimeAxis, price_ticks, time_ticks, widened
from ingestor.chart.series import Width, merged, midnight, resample
from ingestor.chart.text import compact, price
from tests.charts import ZONE, bar, friday, gap, many
from tests.sessions import BEGINS, ENDS, MINUTE, at

HOUR = timedelta(hours=1)


@pytest.mark.parametrize(
    ("low", "high", "most", "labels"),
    [
        (36.72, 37.19, 5, ["36.8", "36.9", "37.0", "37.1"]),
        (0, 10, 5, ["0", "2", "4", "6", "8", "10"]),
        (-1, 1, 4, ["-1.0", "-0.5", "0.0", "0.5", "1.0"]),
        (0.0000012, 0.0000019, 4, ["0.0000012", "0.0000014", "0.0000016", "0.0000018"]),
        (1.2e-12, 1.9e-12, 4, ["1.2e-12", "1.4e-12", "1.6e-12", "1.8e-12"]),
        (123456789012340, 123456789012350, 2, ["123,456,789,012,340", "123,456,789,012,345", "123,456,789,012,350"]),
        (990, 1010, 2, ["990", "1,000", "1,010"]),
    ],
)
def test_price_ticks(low: float, high: float, most: int, labels: list[str]) -> None:
    """Ticks are round prices with enough digits to differ."""
    assert [tick.label for tick in price_ticks(low, high, most)] == labels


@pytest.mark.parametrize("value", [0.0, 1e-12, 0.05, 36.9, 123456789012345.0, 999999999999999.9, -3.5])
@pytest.mark.parametrize("other", [0, 1])
def test_prices_that_hardly_differ(value: float, other: int) -> None:
    """A constant price, or neighbouring floats, still give an axis with different ticks."""
    low, high = widened(value, math.nextafter(value, math.inf) if other else value)
    ticks = price_ticks(low, high, 5)
    assert low < value < high
    assert len({tick.label for tick in ticks}) == len({tick.at for tick in ticks}) == len(ticks) >= 2


def test_a_scale() -> None:
    """A scale is linear in either direction."""
    scale = Scale(10, 20, 100, 0)
    assert [scale.place(value) for value in (10, 15, 20)] == [100, 50, 0]


def test_an_axis_of_two_days() -> None:
    """The night takes no space; a time within it, or outside, is drawn at the nearer end."""
    day = timedelta(days=1)
    axis = TimeAxis.of([(BEGINS, ENDS, 33), (BEGINS + day, ENDS + day, 33)])
    assert axis.length == 66
    places = (at(-9), BEGINS, at(15), ENDS, ENDS + HOUR, BEGINS + day, at(15) + day, ENDS + 9 * day)
    assert [axis.place(moment) for moment in places] == [0, 0, 1, 33, 33, 33, 34, 66]


def test_bands() -> None:
    """A band is as long as its gap, but never too narrow to see or beyond the end of the axis."""
    axis = TimeAxis.of([(BEGINS, ENDS, 495)])
    assert axis.band(at(10), at(12), 1) == pytest.approx((10, 2))
    assert axis.band(at(10), at(10.001), 3) == pytest.approx((10, 3))
    assert axis.band(at(494.9), ENDS, 3) == pytest.approx((492, 3))
    assert axis.band(BEGINS - HOUR, ENDS + HOUR, 3) == (0, 495)
    assert axis.band(BEGINS, ENDS, 999) == (0, 495)


def test_ticks_of_a_day() -> None:
    """Ticks are round times of the exchange's clock, in the smallest step that fits."""
    axis = friday(bar(60, 1, 1)).figure(100).axis
    assert [tick.label for tick in time_ticks(axis, ZONE, 24)] == ["10:00", "12:00", "14:00", "16:00"]
    assert [tick.at for tick in time_ticks(axis, ZONE, 24)] == [12, 36, 60, 84]
    assert len(time_ticks(axis, ZONE, 12)) == 9
    assert time_ticks(axis, ZONE, 1000) == []


def test_ticks_of_several_days() -> None:
    """The date stands at the start of each day; times are shown only between dates with enough space."""
    axis = many(4 * 1440).figure(96).axis
    ticks = time_ticks(axis, ZONE, 9)
    assert [tick.label for tick in ticks if tick.major] == ["16 Nov", "17 Nov", "18 Nov", "19 Nov", "20 Nov"]
    assert [tick.label for tick in ticks if not tick.major] == ["12:00"] * 3
    assert [tick.label for tick in time_ticks(axis, ZONE, 30)] == ["16 Nov", "18 Nov", "20 Nov"]
    years = TimeAxis.of([(BEGINS, ENDS, 1), (BEGINS + 99 * 24 * HOUR, ENDS + 99 * 24 * HOUR, 1)])
    assert [tick.label for tick in time_ticks(years, ZONE, 1)] == ["20 Nov", "27 Feb 2027"]


def test_the_hour_that_occurs_twice() -> None:
    """When clocks are set back, the hour from two to three is two candles, and the later tick is marked."""
    start = datetime(2026, 4, 4, 12, tzinfo=UTC)  # 01:00 NZDT; at 03:00 it becomes 02:00 NZST
    minutes = [bar(start + n * MINUTE, 1, 1) for n in range(4 * 60)]
    hours = list(resample(minutes, Width.HOUR, ZONE))
    assert [hour.started_at for hour in hours] == [start + n * HOUR for n in range(4)]
    assert [hour.volume for hour in hours] == [6000] * 4
    axis = TimeAxis.of([(start, start + 4 * HOUR, 4)])
    assert [tick.label for tick in time_ticks(axis, ZONE, 1)] == ["01:00", "02:00", "02:00 NZST", "03:00"]
    (day,) = resample(minutes, Width.DAY, ZONE)
    assert day.ended_at - day.started_at == timedelta(hours=25)


def test_resampling() -> None:
    """A candle has first, highest, lowest and last price and the summed volume; one fetched bar makes it fetched."""
    minutes = [bar(60, 2, 3), bar(61, 3, 1, high=9), bar(64, 5, 4, low=0.5, backfilled=True), bar(65, 7, 7)]
    first, second = resample(minutes, Width.FIVE, ZONE)
    assert first == merged(minutes[:3], at(60), at(65))
    assert (first.open, first.high, first.low, first.close, first.volume, first.backfilled) == (2, 9, 0.5, 4, 300, True)
    assert (second.started_at, second.backfilled, second.rises) == (at(65), False, True)
    (day,) = resample(minutes, Width.DAY, ZONE)
    assert (day.started_at, day.ended_at) == (midnight(at(60).astimezone(ZONE).date(), ZONE), at(-540) + 24 * HOUR)


@pytest.mark.parametrize(
    ("room", "width", "length"), [(500, "1m", 495), (200, "5m", 99), (40, "15m", 33), (32, "1h", 9), (8, "1d", 1)]
)
def test_the_width_that_fits(room: int, width: str, length: float) -> None:
    """Bars are the shortest for which all of the trading time fits, at most a day's."""
    figure = friday(bar(60, 1, 1)).figure(room)
    assert (figure.width, figure.axis.length) == (width, length)


def test_bars_outside_of_trading_time() -> None:
    """Bars outside of trading time extend the axis."""
    figure = friday(bar(-5, 1, 1), bar(495, 1, 2)).figure(200)
    assert figure.axis.segments[0].started_at == at(-5)
    assert figure.axis.place(at(500)) == figure.axis.length == 101
    assert friday(bar(60, 1, 1), gaps=(gap(0, 495),)).title == "AIR.NZ, Friday 20 November 2026"
    assert many(2000).title == "AIR.NZ, 19 November 2026 to 20 November 2026"


def test_price_and_volume_texts() -> None:
    """Prices keep their digits, volumes are shortened."""
    assert [price(value) for value in (36.9, 123456789012345.0, 1e-12)] == ["36.9", "123456789012345", "1e-12"]
    assert [compact(count) for count in (0, 999, 1000, 12345, 4_560_000, 10**10)] == [
        "0", "999", "1k", "12.3k", "4.56M", "10G",
    ]  # fmt: skip
