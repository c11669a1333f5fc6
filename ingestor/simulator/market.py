"""A realistic market of NZX symbols. Without clock and I/O: the same seed makes the same ticks."""

from __future__ import annotations

import math
import random
import uuid
from dataclasses import dataclass

from ingestor.model import SECOND, Duration, Micros, Tick

CYCLE = 600.0
"""Seconds of a compressed trading day: busy at both ends, quiet between; then the next one begins."""

MARKET_STEP: Duration = 10_000
"""The market's time advances in steps of this length."""

REPEATED = 0.04
"""Share of trades that repeat the previous one in every field, in the same second: a large order in pieces."""

SPLIT = 0.06
"""Share of trades that repeat the previous one with another volume."""

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "simulator.ingestor.invalid")

# Symbols and names of issuers on NZX, roughly by turnover, with plausible prices.
_LISTING = """
FPH.NZ|Fisher & Paykel Healthcare|Health Care|37.10
AIA.NZ|Auckland International Airport|Industrials|8.15
IFT.NZ|Infratil|Utilities|11.40
SPK.NZ|Spark New Zealand|Communication|2.25
MEL.NZ|Meridian Energy|Utilities|5.65
CEN.NZ|Contact Energy|Utilities|9.10
MFT.NZ|Mainfreight|Industrials|66.50
EBO.NZ|EBOS Group|Health Care|38.20
ATM.NZ|The a2 Milk Company|Consumer Staples|8.90
AIR.NZ|Air New Zealand|Industrials|0.575
FBU.NZ|Fletcher Building|Materials|3.30
RYM.NZ|Ryman Healthcare|Health Care|2.70
MCY.NZ|Mercury NZ|Utilities|6.20
KPG.NZ|Kiwi Property Group|Real Estate|0.945
SKC.NZ|SkyCity Entertainment|Consumer Discretionary|0.92
GMT.NZ|Goodman Property Trust|Real Estate|2.08
PCT.NZ|Precinct Properties|Real Estate|1.215
FSF.NZ|Fonterra Shareholders' Fund|Consumer Staples|5.85
VCT.NZ|Vector|Utilities|4.05
SUM.NZ|Summerset Group|Health Care|11.90
GNE.NZ|Genesis Energy|Utilities|2.32
HGH.NZ|Heartland Group|Financials|0.99
POT.NZ|Port of Tauranga|Industrials|6.85
CNU.NZ|Chorus|Communication|8.75
TWR.NZ|Tower|Financials|1.52
WHS.NZ|The Warehouse Group|Consumer Discretionary|0.89
SCL.NZ|Scales Corporation|Consumer Staples|5.02
OCA.NZ|Oceania Healthcare|Health Care|0.77
SKT.NZ|Sky Network Television|Communication|3.05
KMD.NZ|KMD Brands|Consumer Discretionary|0.255
SAN.NZ|Sanford|Consumer Staples|5.90
NZX.NZ|NZX|Financials|1.44
PEB.NZ|Pacific Edge|Health Care|0.118
SUM020.NZ|Summerset Group 4.20% Bonds|Debt|2.61
WIA080.NZ|Wellington Airport 3.32% Bonds|Debt|3.0
KCFHA.NZ|Kiwi Capital Funding Notes|Debt|99.9
"""


@dataclass(frozen=True, slots=True)
class Instrument:
    """One listed symbol."""

    symbol: str
    company_name: str
    industry: str
    uuid4: str
    price: float


def listing() -> tuple[Instrument, ...]:
    """Return the instruments, the busiest first."""
    rows = [line.split("|") for line in _LISTING.strip().splitlines()]
    return tuple(
        Instrument(symbol, name, industry, str(uuid.uuid5(_NAMESPACE, symbol)), float(price))
        for symbol, name, industry, price in rows
    )


def price_step(price: float) -> float:
    """Return the smallest change of a price in dollars: smaller for cheap shares, as on NZX."""
    if price < 0.2:
        return 0.001
    return 0.005 if price < 1 else 0.01


class Market:
    """Makes ticks from `start` on, on average `rate` a second over a cycle of `cycle` seconds."""

    def __init__(self, seed: int, rate: float, start: Micros, *, cycle: float = CYCLE) -> None:
        self._random = random.Random(seed)  # noqa: S311 - a market, not a secret
        self._rate = rate
        self._cycle = cycle
        self._start = self._now = start
        self._due = 0.0
        self._instruments = listing()
        self._prices = {each.symbol: each.price for each in self._instruments}
        self._weights = [1 / (rank + 1) ** 0.9 for rank in range(len(self._instruments))]
        self._last: Tick | None = None

    def until(self, now: Micros) -> list[Tick]:
        """Return the ticks since the last call, in the order of time."""
        ticks: list[Tick] = []
        while self._now + MARKET_STEP <= now:
            self._now += MARKET_STEP
            self._due += self._rate * activity((self._now - self._start) / SECOND, self._cycle) * MARKET_STEP / SECOND
            while self._due >= 1:
                self._due -= 1
                ticks.append(self._trade())
        return ticks

    def _trade(self) -> Tick:
        chance, second, last = self._random.random(), self._now // SECOND * SECOND, self._last
        if last is not None and last.time == second and chance < REPEATED + SPLIT:
            volume = last.volume if chance < REPEATED else self._volume()
            self._last = Tick(last.symbol, second, last.price, volume)
        else:
            symbol = self._random.choices(self._instruments, self._weights)[0].symbol
            self._last = Tick(symbol, second, self._move(symbol), self._volume())
        return self._last

    def _move(self, symbol: str) -> float:
        price = self._prices[symbol]
        step = price_step(price)
        steps = self._random.choices((-2, -1, 0, 1, 2), (1, 6, 20, 6, 1))[0]
        price = round(price / step) * step + steps * step
        step = price_step(round(price, 3))  # the new price may have a larger step
        price = max(round(round(price / step) * step, 3), 0.01)
        self._prices[symbol] = price
        return price

    def _volume(self) -> int:
        lots = math.ceil(self._random.lognormvariate(1.2, 1.3))
        return lots * self._random.choice((1, 10, 100, 100, 500))


def activity(seconds: float, cycle: float) -> float:
    """Return the relative activity, on average 1 over a cycle, with bursts at the opening and at the close."""
    place = seconds % cycle / cycle
    return 0.6 + 3.2 * math.exp(-place / 0.0625) + 3.2 * math.exp(-(1 - place) / 0.0625)
