"""Fills gaps with the provider's one-minute bars: every symbol, and resumable at the symbol where it stopped."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from itertools import groupby
from typing import Literal
from zoneinfo import ZoneInfo

from ingestor.backfill.answers import BAR_LENGTH, Fault, summarize
from ingestor.backfill.bars import Bars
from ingestor.backfill.client import RestClient, SourceError, UnknownTickerError
from ingestor.clock import Clock, to_datetime
from ingestor.errors import IngestorError
from ingestor.model import Bar, GapSpan, minute_of
from ingestor.redaction import outside_text, redact
from ingestor.store.gaps import Bounds, GapStore, Outcome, PendingBackfill

PROVIDER_RETENTION = timedelta(days=365)
"""Age up to which the provider keeps one-minute bars: 1 year, according to its documentation."""

TOO_OLD = "older than the source keeps one-minute bars (1 year)"
CONCURRENCY = 4
"""Requests at once."""

MAX_TRIES = 3
"""After so many tries the symbol is given up if the provider, which lists it, does not know it (404: a gateway that is
being set up answers so, too), or if it still sends wrong records."""

MOST_FAILURES = 10
"""So many requests that fail one after the other, each after several tries, end a run: the source is away."""


def asked_for(piece: GapSpan, margin: timedelta) -> tuple[datetime, datetime]:
    """Return the whole minutes that a piece touches, with the margin at both ends: from, and up to."""
    last = piece.ended_at + margin
    until = minute_of(last)
    return minute_of(piece.started_at - margin), until if until == last else until + BAR_LENGTH


def cut(piece: GapSpan, now: datetime, margin: timedelta) -> GapSpan | None:
    """Return the part of a piece that may be asked for now; None where there is none yet.

    A minute is asked for when it has been over for the margin and a minute: the source needs its time as well.
    """
    newest = minute_of(now - margin - BAR_LENGTH)
    if asked_for(piece, margin)[1] <= newest:
        return piece
    ended_at = newest - margin
    return GapSpan(piece.started_at, ended_at) if ended_at > piece.started_at else None


@dataclass(frozen=True, slots=True)
class Request:
    """One question to the source: a symbol on one day, with all the pieces that its answer settles."""

    symbol: str
    begun: tuple[PendingBackfill, ...]
    since: datetime
    until: datetime


@dataclass(frozen=True, slots=True)
class Plan:
    """What there is to do: new pieces and their symbols, what is too old, and what has to wait until it is over."""

    pieces: tuple[GapSpan, ...] = ()
    symbols: tuple[tuple[str, ...], ...] = ()
    too_old: tuple[GapSpan, ...] = ()
    too_young: tuple[GapSpan, ...] = ()
    begun: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to ask for, and nothing to give up."""
        return not (self.pieces or self.too_old or self.begun)


@dataclass(frozen=True, slots=True)
class Settled:
    """What came of a request: an outcome for each piece, and the wrong records of the answer."""

    outcomes: Sequence[Outcome]
    faults: Sequence[Fault] = ()

    @property
    def has_failed(self) -> bool:
        """Whether no answer came that could be used."""
        return not self.faults and any(each.status == "pending" for each in self.outcomes)


@dataclass(slots=True)
class Summary:
    """What was done, in symbols of pieces. `failures` are the errors, each with how often it came.

    `wrong` are the wrong records of all answers, counted by reason; which they were stands in `ingest.backfills`.
    """

    filled: int = 0
    no_trades: int = 0
    partial: int = 0
    unfillable: int = 0
    pending: int = 0
    bars: int = 0
    failures: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    wrong: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    unasked: int = 0
    """Requests that were not made, since too many before them had failed."""

    def add(self, answer: Settled) -> None:
        """Count."""
        for fault in answer.faults:
            self.wrong[fault.reason] += 1
        for each in answer.outcomes:
            self.bars += each.bars
            match each.status:
                case "filled":
                    self.filled += 1
                case "no trades":
                    self.no_trades += 1
                case "partial":
                    self.partial += 1
                case "unfillable":
                    self.unfillable += 1
                case "pending":
                    self.pending += 1
                    if not answer.faults:
                        self.failures[each.error or ""] += 1


class Backfill:
    """Fills what the gap store says is open from the REST API.

    A `patient` one asks again for what has failed only when its time has come; any other asks at once.
    """

    def __init__(
        self,
        gap_store: GapStore,
        client: RestClient,
        *,
        clock: Clock,
        concurrency: int = CONCURRENCY,
        patient: bool = False,
    ) -> None:
        self._gap_store = gap_store
        self._client = client
        self._clock = clock
        self._concurrency = concurrency
        self._patient = patient

    @property
    def was_accepted(self) -> bool:
        """Whether the source has taken the token."""
        return self._client.was_accepted

    async def check(self, only: Collection[str]) -> None:
        """Raise IngestorError where nobody knows one of these symbols."""
        if strange := await self._gap_store.unknown_symbols(only):
            raise IngestorError(
                f"Nobody knows {', '.join(strange)}: neither the provider lists it, nor was it ever heard.",
                hint="Write symbols with their suffix (AIR.NZ); market.instruments has all of them.",
            )

    async def ask_again(self, bounds: Bounds) -> None:
        """Let what was given up within the bounds be asked for once more, where the source may still have it."""
        first, last, since, until = bounds.parameters()
        for piece in await self._gap_store.given_up(since, until):
            if self._lies_within(piece, first, last):
                await self._gap_store.ask_again(piece)

    async def plan(self, bounds: Bounds) -> Plan:
        """Look at what there is to do. Nothing is asked for, and nothing put on record."""
        now = self._now()
        earlier = min(now, await self._gap_store.now())  # a minute is over when it is so by both clocks
        pieces: list[GapSpan] = []
        too_old: list[GapSpan] = []
        too_young: list[GapSpan] = []
        for each in await self._gap_store.fillable(bounds):
            part = cut(each, earlier, self._gap_store.margin)
            if each.started_at < now - PROVIDER_RETENTION:
                too_old.append(each)
            elif part is None:
                too_young.append(each)
            else:
                pieces.append(part)
        symbols = [tuple(await self._gap_store.active_symbols(piece.started_at)) for piece in pieces]
        if pieces and not all(symbols):
            raise IngestorError("No instrument is known yet, so there is nothing to ask for.")
        begun = len(await self._pending(bounds))
        return Plan(tuple(pieces), tuple(symbols), tuple(too_old), tuple(too_young), begun)

    async def begin(self, plan: Plan) -> None:
        """Put the plan on record: from here on it can be taken up again after whatever happens."""
        await self._gap_store.forget_needless()
        for piece in plan.too_old:
            await self._gap_store.give_up(piece, TOO_OLD)
        for piece, symbols in zip(plan.pieces, plan.symbols, strict=True):
            await self._gap_store.begin(piece, symbols)

    async def requests(self, bounds: Bounds, only: Collection[str] = ()) -> list[Request]:
        """Return what is to be asked of all that was begun within the bounds: the symbols `only`, or every one."""
        pending = await self._pending(bounds)
        found: list[Request] = []
        for (symbol, _), group in groupby(pending, key=lambda each: (each.symbol, self._day(each.piece))):
            if only and symbol not in only:
                continue
            begun = tuple(group)
            ranges = [asked_for(each.piece, self._gap_store.margin) for each in begun]
            since, until = min(start for start, _ in ranges), max(end for _, end in ranges)
            found.append(Request(symbol, begun, since, until))
        # By day, so that a gap is settled as a whole before the next one is begun.
        return sorted(found, key=lambda request: (request.since, request.symbol))

    async def run(self, requests: Sequence[Request], on_done: Callable[[Request], None] = lambda _: None) -> Summary:
        """Ask and store, several at once. Raises ConfigurationError where the token is refused, StoreError."""
        summary = Summary()
        waiting = iter(requests)
        failed = done = 0

        async def work() -> None:
            nonlocal failed, done
            while failed < MOST_FAILURES and (request := next(waiting, None)) is not None:
                settled = await self._settle(request)
                failed = failed + 1 if settled.has_failed else 0
                done += 1
                summary.add(settled)
                on_done(request)

        tasks = [asyncio.create_task(work(), name=f"backfill {number}") for number in range(self._concurrency)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        summary.unasked = len(requests) - done
        return summary

    async def _settle(self, request: Request) -> Settled:
        oldest = self._now() - PROVIDER_RETENTION
        bars: Sequence[Bar] = ()
        faults: Sequence[Fault] = ()
        if any(each.piece.started_at < oldest for each in request.begun):  # the run, or the gap, has lasted too long
            outcomes = [Outcome(each.piece, "unfillable", error=TOO_OLD) for each in request.begun]
        else:
            try:
                found = await self._client.minutes(request.symbol, request.since, request.until, self._gap_store.label)
            except (UnknownTickerError, SourceError) as error:
                outcomes = [_failed(each, error) for each in request.begun]
            else:
                outcomes, bars = self._part(request, found)
                faults = found.faults
        await self._gap_store.settle(request.symbol, outcomes, bars)
        return Settled(outcomes, faults)

    def _part(self, request: Request, found: Bars) -> tuple[list[Outcome], list[Bar]]:
        """Return what each piece gets of an answer, and the bars that some piece wants: the others were heard."""
        outcomes: list[Outcome] = []
        wanted: dict[datetime, Bar] = {}
        for each in request.begun:
            since, until = asked_for(each.piece, self._gap_store.margin)
            its = {bar.time: bar for bar in found.bars if since <= bar.time < until}
            wrong = [fault for fault in found.faults if fault.may_lie_within(since, until)]
            outcomes.append(_doubtful(each, len(its), found, wrong) if wrong else _complete(each, len(its)))
            wanted |= its
        return outcomes, list(wanted.values())

    async def _pending(self, bounds: Bounds) -> list[PendingBackfill]:
        """Return what was begun and is not settled, by symbol and time."""
        first, last, since, until = bounds.parameters()
        pending = await self._gap_store.pending(since, until, due=self._patient)
        return [each for each in pending if self._lies_within(each.piece, first, last)]

    def _lies_within(self, piece: GapSpan, first: date | None, last: date | None) -> bool:
        day = self._day(piece)
        return (first is None or day >= first) and (last is None or day < last)

    def _day(self, piece: GapSpan) -> date:
        return piece.started_at.astimezone(ZoneInfo(self._gap_store.timezone)).date()

    def _now(self) -> datetime:
        return to_datetime(self._clock.wall())


def _complete(each: PendingBackfill, bars: int) -> Outcome:
    """Return what an answer without wrong records means."""
    return Outcome(each.piece, "filled" if bars else "no trades", bars)


def _doubtful(each: PendingBackfill, bars: int, found: Bars, wrong: Sequence[Fault]) -> Outcome:
    """Return what wrong records mean: what is right is kept, and the rest is asked for again, a few times."""
    status: Literal["pending", "partial", "unfillable"] = "pending"
    if each.attempts + 1 >= MAX_TRIES:
        status = "partial" if bars else "unfillable"
    return Outcome(each.piece, status, bars, redact(summarize(wrong, found.records)))


def _failed(each: PendingBackfill, error: IngestorError) -> Outcome:
    """Return what a failure means: a symbol that is not listed, or is unknown again and again, is given up."""
    is_believed = not each.is_listed or each.attempts + 1 >= MAX_TRIES
    is_final = isinstance(error, UnknownTickerError) and is_believed
    return Outcome(each.piece, "unfillable" if is_final else "pending", error=outside_text(error))
