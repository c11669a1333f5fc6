"""Fills gaps with the provider's one-minute bars, for every symbol. A stopped run resumes at its last symbol."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from itertools import groupby
from typing import Literal
from zoneinfo import ZoneInfo

from ingestor.backfill.answers import Fault, summarize
from ingestor.backfill.bars import Bars
from ingestor.backfill.client import RestClient, SourceError, UnknownTickerError
from ingestor.clock import Clock, to_datetime
from ingestor.errors import IngestorError
from ingestor.model import BAR_LENGTH, Bar, GapSpan, minute_of
from ingestor.redaction import outside_text, redact
from ingestor.store.gaps import Bounds, GapStore, Outcome, PendingBackfill

PROVIDER_RETENTION = timedelta(days=365)
"""Age up to which the provider keeps one-minute bars: 1 year, according to its documentation."""

TOO_OLD = "older than the provider keeps one-minute bars (1 year)"
CONCURRENCY = 4
"""Concurrent requests."""

MAX_TRIES = 3
"""Attempts after which a symbol is given up if the provider still sends wrong records, or answers 404 although it lists
the symbol: a gateway also answers 404 during a deployment."""

MAX_FAILURES = 10
"""Consecutive failed requests, each retried several times, that end a run: the provider is unavailable."""


def asked_for(piece: GapSpan, margin: timedelta) -> tuple[datetime, datetime]:
    """Return the whole minutes that a piece touches, with the margin at both ends: start, and end (exclusive)."""
    last = piece.ended_at + margin
    until = minute_of(last)
    return minute_of(piece.started_at - margin), until if until == last else until + BAR_LENGTH


def cut(piece: GapSpan, now: datetime, margin: timedelta) -> GapSpan | None:
    """Return the part of a piece that may be requested now; None if there is none yet.

    A minute is requested once it has been over for the margin and one more minute, since the provider also needs time.
    """
    newest = minute_of(now - margin - BAR_LENGTH)
    if asked_for(piece, margin)[1] <= newest:
        return piece
    ended_at = newest - margin
    return GapSpan(piece.started_at, ended_at) if ended_at > piece.started_at else None


@dataclass(frozen=True, slots=True)
class Request:
    """A request for a symbol's bars of one day, with all the pieces that its answer settles."""

    symbol: str
    begun: tuple[PendingBackfill, ...]
    since: datetime
    until: datetime


@dataclass(frozen=True, slots=True)
class Plan:
    """The work of a run: new pieces with their symbols, pieces too old to fetch, and pieces not over yet."""

    pieces: tuple[GapSpan, ...] = ()
    symbols: tuple[tuple[str, ...], ...] = ()
    too_old: tuple[GapSpan, ...] = ()
    too_young: tuple[GapSpan, ...] = ()
    begun: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to request and nothing to give up."""
        return not (self.pieces or self.too_old or self.begun)


@dataclass(frozen=True, slots=True)
class Settled:
    """The result of a request: an outcome for each piece, and the wrong records of the answer."""

    outcomes: Sequence[Outcome]
    faults: Sequence[Fault] = ()

    @property
    def has_failed(self) -> bool:
        """Whether no usable answer came."""
        return not self.faults and any(each.status == "pending" for each in self.outcomes)


@dataclass(slots=True)
class Summary:
    """The outcomes of a run, counted in symbols of pieces.

    `failures` counts errors by message, `wrong` counts wrong records by reason; `ingest.backfills` names these records.
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
    """Requests not made, because too many before them had failed."""

    def add(self, answer: Settled) -> None:
        """Count the outcomes of a request."""
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
    """Fills the open gaps of the gap store from the REST API.

    With `patient` a failed request is retried only when it is due; otherwise at once.
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
        """Whether the provider has accepted the token."""
        return self._client.was_accepted

    async def check(self, only: Collection[str]) -> None:
        """Raise IngestorError if a symbol is neither listed nor was ever received."""
        if strange := await self._gap_store.unknown_symbols(only):
            raise IngestorError(
                f"Unknown symbol: {', '.join(strange)}. The provider does not list it, and no tick of it was received.",
                hint="Write symbols with their suffix (AIR.NZ); market.instruments lists them all.",
            )

    async def ask_again(self, bounds: Bounds) -> None:
        """Reopen the pieces within the bounds that were given up and that the provider may still have."""
        first, last, since, until = bounds.parameters()
        for piece in await self._gap_store.given_up(since, until):
            if self._lies_within(piece, first, last):
                await self._gap_store.ask_again(piece)

    async def plan(self, bounds: Bounds) -> Plan:
        """Return the work of a run. Requests and records nothing. Raises IngestorError if no instrument is known."""
        now = self._now()
        earlier = min(now, await self._gap_store.now())  # a minute is over only if it is by both clocks
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
            raise IngestorError("No instrument is known yet, so there is nothing to request.")
        begun = len(await self._pending(bounds))
        return Plan(tuple(pieces), tuple(symbols), tuple(too_old), tuple(too_young), begun)

    async def begin(self, plan: Plan) -> None:
        """Record the plan. From then on an interrupted run can be resumed."""
        await self._gap_store.forget_needless()
        for piece in plan.too_old:
            await self._gap_store.give_up(piece, TOO_OLD)
        for piece, symbols in zip(plan.pieces, plan.symbols, strict=True):
            await self._gap_store.begin(piece, symbols)

    async def requests(self, bounds: Bounds, only: Collection[str] = ()) -> list[Request]:
        """Return the requests for all begun pieces within the bounds: of the symbols `only`, or of every symbol."""
        pending = await self._pending(bounds)
        found: list[Request] = []
        for (symbol, _), group in groupby(pending, key=lambda each: (each.symbol, self._day(each.piece))):
            if only and symbol not in only:
                continue
            begun = tuple(group)
            ranges = [asked_for(each.piece, self._gap_store.margin) for each in begun]
            since, until = min(start for start, _ in ranges), max(end for _, end in ranges)
            found.append(Request(symbol, begun, since, until))
        # By day, so that one gap is settled completely before the next begins.
        return sorted(found, key=lambda request: (request.since, request.symbol))

    async def run(self, requests: Sequence[Request], on_done: Callable[[Request], None] = lambda _: None) -> Summary:
        """Send the requests and store the answers. Raises ConfigurationError if the token is refused; StoreError."""
        summary = Summary()
        waiting = iter(requests)
        failed = done = 0

        async def work() -> None:
            nonlocal failed, done
            while failed < MAX_FAILURES and (request := next(waiting, None)) is not None:
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
        """Return the outcome of each piece, and the bars within any piece. We have ticks for the others."""
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
        """Return the pieces begun and not settled, by symbol and time."""
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
    """Return the outcome of an answer without wrong records."""
    return Outcome(each.piece, "filled" if bars else "no trades", bars)


def _doubtful(each: PendingBackfill, bars: int, found: Bars, wrong: Sequence[Fault]) -> Outcome:
    """Return the outcome of an answer with wrong records: correct bars are kept, the rest is requested a few times."""
    status: Literal["pending", "partial", "unfillable"] = "pending"
    if each.attempts + 1 >= MAX_TRIES:
        status = "partial" if bars else "unfillable"
    return Outcome(each.piece, status, bars, redact(summarize(wrong, found.records)))


def _failed(each: PendingBackfill, error: IngestorError) -> Outcome:
    """Return the outcome of a failure: an unknown symbol is given up if unlisted, or after `MAX_TRIES` attempts."""
    is_believed = not each.is_listed or each.attempts + 1 >= MAX_TRIES
    is_final = isinstance(error, UnknownTickerError) and is_believed
    return Outcome(each.piece, "unfillable" if is_final else "pending", error=outside_text(error))
