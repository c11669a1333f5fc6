"""Reads the gap report, and records backfill and reconciliation."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

import asyncpg

from ingestor.coverage.report import Day, Gap, Report
from ingestor.errors import IngestorError, SchemaError
from ingestor.model import Bar, GapSpan, Instrument, Label, minute_of
from ingestor.redaction import outside_text
from ingestor.store.connect import connect
from ingestor.store.connection import GuardedConnection
from ingestor.store.copy_in import count_of
from ingestor.store.queries import QUERIES
from ingestor.store.registry import RegisteredRelay, listed_relays
from ingestor.store.retry import MIGRATE
from ingestor.store.version import check_schema
from ingestor.store.waiting import LockWatch

GAP_STATEMENT_SECONDS = 120.0
"""Seconds for one transaction, after which a server counts as gone."""

RETIRED_AT_ONCE = 10
"""Instruments, or a tenth of all that are listed if that is more, that one answer may retire."""

Isolation: TypeAlias = Literal["read_committed", "repeatable_read"]


@dataclass(frozen=True, slots=True)
class Bounds:
    """From `since` (inclusive) to `until` (exclusive): trading days, or instants; None is no bound."""

    since: date | datetime | None = None
    until: date | datetime | None = None

    def parameters(self) -> tuple[date | None, date | None, datetime | None, datetime | None]:
        """Return both as days, and both as instants: of each only one is given."""
        days = [None if isinstance(bound, datetime) else bound for bound in (self.since, self.until)]
        instants = [bound if isinstance(bound, datetime) else None for bound in (self.since, self.until)]
        return days[0], days[1], instants[0], instants[1]


@dataclass(frozen=True, slots=True)
class PendingBackfill:
    """A symbol of a piece that is not settled yet: how often it was asked for, and whether the provider lists it."""

    piece: GapSpan
    symbol: str
    attempts: int = 0
    is_listed: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a request for a span and a symbol."""

    piece: GapSpan
    status: Literal["filled", "no trades", "partial", "unfillable", "pending"]
    bars: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """A wholly covered minute in which our bar and the provider's are not the same; None: there is none."""

    symbol: str
    time: datetime
    ours: Bar | None
    theirs: Bar | None

    @property
    def kind(self) -> Literal["missing here", "missing there", "differs"]:
        """In words."""
        if self.ours is None:
            return "missing here"
        return "differs" if self.theirs is not None else "missing there"


@dataclass(frozen=True, slots=True)
class OpenGaps:
    """The number of open gaps, and the start of the oldest."""

    count: int
    oldest: datetime | None


class GapStore:
    """One connection, used while entered; calls wait for each other. Every method raises StoreError."""

    def __init__(self, url: str, *, timeout: float = 10.0, patience: float = GAP_STATEMENT_SECONDS) -> None:
        self._url = url
        self._timeout = timeout
        self._patience = patience
        self._lock = asyncio.Lock()
        self._open: GuardedConnection | None = None
        self.timezone = "UTC"
        """The exchange's time zone."""
        self.margin = timedelta()
        """Doubt between the exchange's clock and ours."""
        self.label: Label = "start"
        self.ticks_since: datetime | None = None
        """Ticks older than this may have been dropped."""

    async def __aenter__(self) -> Self:
        connection = await connect(self._url, timeout=self._timeout, application_name="ingestor gaps")
        self._open = GuardedConnection(connection, self._patience, watch=LockWatch(self._url))
        try:
            async with self._connection() as connection:
                await check_schema(connection)
                settings = await connection.fetchrow(QUERIES["gap_settings"])
            if settings is None:
                raise SchemaError("The database's settings were never written.", hint=MIGRATE)
        except BaseException:
            self._open.connection.terminate()
            raise
        self.timezone, self.margin, self.label, self.ticks_since = settings
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open is not None:
            await self._open.close()

    async def now(self) -> datetime:
        """Return what the database's clock shows: the one that what is on record is compared with."""
        async with self._connection() as connection:
            found: datetime = await connection.fetchval(QUERIES["database_now"])
        return found

    async def report(self, bounds: Bounds) -> Report:
        """Return coverage and gaps, as of one moment by the database's clock."""
        parameters = bounds.parameters()
        async with self._transaction(isolation="repeatable_read") as connection:
            now = await connection.fetchval(QUERIES["report_made_at"])
            days = await connection.fetch(QUERIES["report_days"], *parameters)
            gaps = await connection.fetch(QUERIES["report_gaps"], *parameters)
        return Report(
            bounds.since,
            bounds.until,
            self.timezone,
            now,
            tuple(Day(*row) for row in days),
            tuple(Gap(day, since, until, outside_text(cause), status) for day, since, until, cause, status in gaps),
        )

    async def open_gaps(self) -> OpenGaps:
        """Return how many gaps are open, of all days."""
        async with self._connection() as connection:
            (row,) = await connection.fetch(QUERIES["open_gaps"])
        return OpenGaps(*row)

    async def relays(self) -> tuple[RegisteredRelay, ...]:
        """Return the relays that listen, or have fallen silent."""
        async with self._connection() as connection:
            return await listed_relays(connection)

    async def exclude(self, since: datetime, until: datetime, reason: str) -> None:
        """Put on record that the exchange itself did not trade."""
        async with self._turn() as connection:
            await connection.execute(QUERIES["exclude"], since, until, reason)

    async def store_instruments(self, exchange: str, listed: Sequence[Instrument], *, is_complete: bool = True) -> int:
        """Note what the provider lists, and when each symbol was first and last received.

        Instruments that it lists no longer are retired, unless they are many at once, or the list is not `is_complete`:
        then it rather is the answer that is short. Returns how many are kept for that reason.
        """
        rows = [(each.symbol, exchange, each.company_name, each.industry, each.uuid, each.active) for each in listed]
        async with self._turn() as connection:
            await connection.executemany(QUERIES["upsert_instrument"], rows)
            missing = await connection.fetchval(QUERIES["count_unlisted"], exchange, [row[0] for row in rows])
            is_short = missing > max(RETIRED_AT_ONCE, len(rows) // 10) or not rows or not is_complete
            if not is_short:
                await connection.execute(QUERIES["retire_instruments"], exchange, [row[0] for row in rows])
            await connection.execute(QUERIES["note_seen_instruments"], exchange)
        return missing if is_short else 0

    async def active_symbols(self, since: datetime) -> list[str]:
        """Return the symbols that may have traded since then."""
        async with self._connection() as connection:
            return [row["symbol"] for row in await connection.fetch(QUERIES["active_symbols"], since)]

    async def unknown_symbols(self, symbols: Collection[str]) -> list[str]:
        """Return those of the symbols that were never listed nor received."""
        async with self._connection() as connection:
            return [row["symbol"] for row in await connection.fetch(QUERIES["unknown_symbols"], list(symbols))]

    async def fillable(self, bounds: Bounds) -> list[GapSpan]:
        """Return what is open and not begun yet, in the order of time."""
        async with self._connection() as connection:
            rows = await connection.fetch(QUERIES["fillable"], *bounds.parameters())
        return [GapSpan(row["gap_from"], row["gap_until"]) for row in rows]

    async def forget_needless(self) -> None:
        """Forget what was begun, is not settled, and is covered after all."""
        async with self._turn() as connection:
            await connection.execute(QUERIES["forget_needless"])

    async def begin(self, piece: GapSpan, symbols: Sequence[str]) -> None:
        """Put on record that a piece is to be filled, for all of these symbols."""
        async with self._turn() as connection:
            await connection.execute(QUERIES["begin_backfill"], piece.started_at, piece.ended_at, list(symbols))

    async def give_up(self, piece: GapSpan, why: str) -> None:
        """Put on record that nothing can fill a piece."""
        async with self._turn() as connection:
            await connection.execute(QUERIES["give_up_backfill"], piece.started_at, piece.ended_at, why)

    async def pending(
        self, since: datetime | None, until: datetime | None, *, due: bool = False
    ) -> list[PendingBackfill]:
        """Return what was begun and is not settled, in the order of symbols and time.

        With `due` only what it is time to ask for again: each failure is waited for four times as long as the one
        before, up to a day.
        """
        async with self._connection() as connection:
            rows = await connection.fetch(QUERIES["pending_backfills"], since, until, due)
        return [PendingBackfill(GapSpan(*row[:2]), *row[2:]) for row in rows]

    async def given_up(self, since: datetime | None, until: datetime | None) -> list[GapSpan]:
        """Return the pieces with a symbol that was given up, though the source may still have its bars."""
        async with self._connection() as connection:
            rows = await connection.fetch(QUERIES["given_up_backfills"], since, until)
        return [GapSpan(*row) for row in rows]

    async def ask_again(self, piece: GapSpan) -> None:
        """Let the symbols of a piece that were given up be asked for once more."""
        async with self._turn() as connection:
            await connection.execute(QUERIES["ask_again"], piece.started_at, piece.ended_at)

    async def settle(self, symbol: str, outcomes: Sequence[Outcome], bars: Iterable[Bar]) -> None:
        """Store a symbol's bars and what came of its pieces, all or nothing. To do it again changes nothing."""
        rows = [(symbol, bar.time, bar.open, bar.high, bar.low, bar.close, bar.volume) for bar in bars]
        async with self._turn() as connection:
            if await connection.fetchval(QUERIES["current_label"]) != self.label:
                raise IngestorError("The label of the bars was changed meanwhile (ingestor reconcile): run it again.")
            settled = 0
            for each in outcomes:
                key = (each.piece.started_at, each.piece.ended_at)
                status = await connection.execute(
                    QUERIES["settle_backfill"], *key, symbol, each.status, each.bars, each.error
                )
                settled += count_of(status)
                await connection.execute(QUERIES["settle_whole_backfill"], *key)
            if settled:  # else another process was quicker, or it is not needed any more
                await connection.executemany(QUERIES["upsert_bar"], rows)

    async def trading_day(self, day: date) -> tuple[datetime, datetime] | None:
        """Return the trading time of a day; None if it is no trading day or not on record."""
        async with self._connection() as connection:
            row = await connection.fetchrow(QUERIES["trading_day_span"], day)
        return None if row is None else (row["started_at"], row["ended_at"])

    async def whole_minutes(self, since: datetime, until: datetime) -> list[datetime]:
        """Return the starts of the minutes that were wholly covered."""
        async with self._connection() as connection:
            return [row["minute"] for row in await connection.fetch(QUERIES["whole_minutes"], since, until)]

    async def own_bars(self, symbol: str, since: datetime, until: datetime) -> list[Bar]:
        """Return a symbol's bars from our ticks; `since` and `until` are whole minutes."""
        async with self._connection() as connection:
            return [Bar(*row) for row in await connection.fetch(QUERIES["own_bars"], since, until, symbol)]

    async def bars(self, symbol: str, since: datetime, until: datetime) -> list[Bar]:
        """Return the one series of a symbol's one-minute bars, in the order of time."""
        async with self._connection() as connection:
            return [Bar(*row) for row in await connection.fetch(QUERIES["bars"], symbol, since, until)]

    async def last_trade(self, symbol: str, since: datetime, until: datetime) -> datetime | None:
        """Return when a symbol was last traded between two instants, as we received or fetched it."""
        async with self._connection() as connection:
            found: datetime | None = await connection.fetchval(QUERIES["last_trade"], symbol, since, until)
        return found

    async def last_bar(self, symbol: str, since: datetime, until: datetime) -> datetime | None:
        """Return the minute of a symbol's last bar between two instants; None where there is none.

        It looks back from the last trade in spans that double, since the bars of all time would take long to compute.
        """
        async with self._connection() as connection:
            last: datetime | None = await connection.fetchval(QUERIES["last_trade"], symbol, since, until)
            found: datetime | None = None
            span = timedelta(days=1)
            while last is not None and found is None and since < until:
                first = max(since, minute_of(last) - span)
                found = await connection.fetchval(QUERIES["last_bar"], symbol, first, until)
                until, span = first, 2 * span
        return found

    async def listed_symbols(self) -> list[str]:
        """Return the symbols that are on record, in their order; a symbol gets there with a backfill."""
        async with self._connection() as connection:
            return [row["symbol"] for row in await connection.fetch(QUERIES["listed_symbols"])]

    async def store_differences(self, day: date, symbols: Sequence[str], found: Sequence[Difference]) -> None:
        """Replace what was noted for these symbols and that day."""
        rows = [(day, each.symbol, each.time, each.kind, *_values(each.ours), *_values(each.theirs)) for each in found]
        async with self._turn() as connection:
            await connection.execute(QUERIES["forget_reconciliations"], day, list(symbols))
            await connection.executemany(QUERIES["note_difference"], rows)

    async def adopt(self, label: Label) -> None:
        """Interpret the provider's bars by another label. Bars that were fetched are moved and requested again."""
        shift = timedelta(minutes=-1 if label == "end" else 1)
        async with self._turn() as connection:
            for query, *arguments in (("set_bar_label", label), ("shift_bars", shift), ("forget_backfills",)):
                await connection.execute(QUERIES[query], *arguments)
        self.label = label

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[asyncpg.Connection]:
        """Read in a transaction: behind a pooler, nothing else keeps what belongs together on one session."""
        async with self._transaction() as connection:
            yield connection

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[asyncpg.Connection]:
        """Begin a transaction that no other gap store of the database writes in at the same time."""
        async with self._transaction() as connection:
            await connection.execute(QUERIES["lock_gaps"])
            yield connection

    @contextlib.asynccontextmanager
    async def _transaction(self, isolation: Isolation = "read_committed") -> AsyncIterator[asyncpg.Connection]:
        assert self._open is not None
        async with self._lock, self._open as connection:
            transaction = connection.transaction(isolation=isolation)
            await transaction.start()
            try:
                yield connection
            except asyncio.CancelledError:
                connection.terminate()  # a rollback would wait for a server that may hang
                raise
            except BaseException:
                await transaction.rollback()
                raise
            await transaction.commit()


def _values(bar: Bar | None) -> tuple[Any, ...]:
    return (None,) * 5 if bar is None else (bar.open, bar.high, bar.low, bar.close, bar.volume)
