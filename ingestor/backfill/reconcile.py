"""Compares our bars with the provider's: finds ticks that the server dropped while the stream looked alive."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta

from ingestor.backfill.answers import summarize
from ingestor.backfill.bars import Bars
from ingestor.backfill.client import RestClient, SourceError, UnknownTickerError
from ingestor.backfill.fill import PROVIDER_RETENTION, TOO_OLD
from ingestor.backfill.instruments import refresh_instruments
from ingestor.errors import IngestorError
from ingestor.model import BAR_LENGTH, Bar, Label, minute_of
from ingestor.redaction import outside_text
from ingestor.store.gaps import Difference, GapStore

ENOUGH = 10
"""A label is accepted if at least this many bars fit it, and ten times as many as fit the other."""

SHIFTS: dict[Label, int] = {"start": 0, "end": 1}
"""Minutes from the start of a bar to its timestamp, for each label."""

Minutes = Mapping[datetime, Bar]


@dataclass(frozen=True, slots=True)
class Fit:
    """How many of the provider's bars equal ours, minute by minute, under one label."""

    label: Label
    same: int
    differences: tuple[Difference, ...]

    @property
    def compared(self) -> int:
        """The number of minutes for which either side has a bar."""
        return self.same + len(self.differences)


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """A day's comparison. `best` fits better than `other`; if neither does, it is the assumed label.

    `failed` are the symbols that could not be compared, `doubtful` those with minutes that could not be, each with the
    reason.
    """

    day: date
    minutes: int
    symbols: tuple[str, ...]
    unknown: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]
    doubtful: tuple[tuple[str, str], ...]
    best: Fit
    other: Fit

    @property
    def is_decided(self) -> bool:
        """Whether the bars decide which label is right."""
        return self.best.same >= ENOUGH and self.best.same >= 10 * self.other.same


def compare(symbol: str, minutes: Sequence[datetime], ours: Minutes, theirs: Minutes) -> tuple[int, list[Difference]]:
    """Return the number of minutes with equal bars on both sides, and the differences."""
    same = 0
    found: list[Difference] = []
    for minute in minutes:
        our, their = ours.get(minute), theirs.get(minute)
        if our is None and their is None:
            continue
        if our is not None and their is not None and _equal(our, their):
            same += 1
        else:
            found.append(Difference(symbol, minute, our, their))
    return same, found


def _equal(our: Bar, their: Bar) -> bool:
    prices = ((our.open, their.open), (our.high, their.high), (our.low, their.low), (our.close, their.close))
    return our.volume == their.volume and all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) for a, b in prices)


async def reconcile(
    gap_store: GapStore,
    client: RestClient,
    day: date,
    now: datetime,
    *,
    only: Collection[str] = (),
    on_symbols: Callable[[int], None] = lambda _: None,
    on_done: Callable[[str], None] = lambda _: None,
) -> Reconciliation:
    """Compare every fully covered minute of a trading day, and record the differences.

    The provider does not document whether it labels a bar by its start or its end: both are tried. Raises IngestorError
    if the day can't be compared.
    """
    first, last, minutes = await _whole_minutes(gap_store, day, now)
    await refresh_instruments(gap_store, client)
    symbols = [symbol for symbol in await gap_store.active_symbols(first) if not only or symbol in only]
    if strange := set(only) - set(symbols):
        raise IngestorError(f"No active symbol on {day}: {', '.join(sorted(strange))}.")
    on_symbols(len(symbols))
    counts: dict[Label, tuple[int, list[Difference]]] = {"start": (0, []), "end": (0, [])}
    unknown: list[str] = []
    failed: list[tuple[str, str]] = []
    doubtful: list[tuple[str, str]] = []
    for symbol in symbols:
        try:
            answer = await client.minutes(symbol, first, last + 2 * BAR_LENGTH, "start")
        except UnknownTickerError:
            unknown.append(symbol)
        except SourceError as error:
            failed.append((symbol, outside_text(error)))
        else:
            if answer.faults:
                doubtful.append((symbol, summarize(answer.faults, answer.records)))
            ours = {bar.time: bar for bar in await gap_store.own_bars(symbol, first, last + BAR_LENGTH)}
            for label, shift in SHIFTS.items():
                sure = _sure_minutes(minutes, answer, shift * BAR_LENGTH)
                theirs = {bar.time - shift * BAR_LENGTH: bar for bar in answer.bars}
                same, found = compare(symbol, sure, ours, theirs)
                counts[label] = (counts[label][0] + same, counts[label][1] + found)
        on_done(symbol)
    fits = {label: Fit(label, same, tuple(found)) for label, (same, found) in counts.items()}
    best, other = fits[gap_store.label], fits["end" if gap_store.label == "start" else "start"]
    if other.same > best.same:
        best, other = other, best
    compared = [symbol for symbol in symbols if symbol not in {*unknown, *(name for name, _ in failed)}]
    await gap_store.store_differences(day, compared, best.differences)
    return Reconciliation(
        day, len(minutes), tuple(compared), tuple(unknown), tuple(failed), tuple(doubtful), best, other
    )


def _sure_minutes(minutes: Sequence[datetime], answer: Bars, shift: timedelta) -> list[datetime]:
    """Return the minutes that the answer settles: a wrong record is no difference.

    A wrong record without its time may be the bar of any minute without one.
    """
    answered = {bar.time - shift for bar in answer.bars}
    times = [fault.time - shift for fault in answer.faults if fault.time is not None]
    doubtful = {
        minute for time in times for minute in (minute_of(time), minute_of(time + BAR_LENGTH - timedelta.resolution))
    }
    is_incomplete = len(times) < len(answer.faults)
    return [each for each in minutes if each not in doubtful and (each in answered or not is_incomplete)]


async def _whole_minutes(gap_store: GapStore, day: date, now: datetime) -> tuple[datetime, datetime, list[datetime]]:
    """Return a day's span, as far as the provider should have it by now, and its fully covered minutes."""
    span = await gap_store.trading_day(day)
    if span is None:
        raise IngestorError(f"{day} is not a trading day on record.")
    if span[0] < now - PROVIDER_RETENTION:
        raise IngestorError(f"{day} is {TOO_OLD}.")
    if gap_store.ticks_since is not None and span[0] < gap_store.ticks_since:
        raise IngestorError(f"The ticks of {day} were dropped, as INGESTOR_RETENTION says.")
    first, last = minute_of(span[0]), min(minute_of(span[1]), minute_of(now - gap_store.margin - 2 * BAR_LENGTH))
    minutes = await gap_store.whole_minutes(first, last)
    if not minutes:
        raise IngestorError(f"No minute of {day} is fully covered, so there is nothing to compare.")
    return first, last, minutes
