"""`ingestor simulate`: a stand-in for Financefeast on this machine."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from ingestor.errors import ConfigurationError
from ingestor.redaction import outside_text
from ingestor.service.process import stop_on_signals
from ingestor.settings import is_loopback, parse_duration
from ingestor.simulator.server import TOKEN, Simulator
from ingestor.telemetry.standard_streams import never_block

REPORT_SECONDS = 5.0

_FAULT_HELP = (
    "drop, stall, half-open or garbage (with =EVERY, as in drop=5s), reject, limit, no-access, replay; repeatable."
)


def simulate(
    host: Annotated[str, typer.Option(help="Address to listen on; only a loopback address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of both APIs.", min=0, max=65535)] = 5005,
    rate: Annotated[float, typer.Option(help="Mean ticks a second.", min=0, max=20_000)] = 50.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same market.")] = 1,
    session: Annotated[
        str, typer.Option(metavar="<duration>", help="Length of the market's day, which is busy at both ends.")
    ] = "10m",
    max_streams: Annotated[int, typer.Option(help="Limit of simultaneous streams.", min=1)] = 2,
    rate_limit: Annotated[int, typer.Option(help="REST requests a minute.", min=1)] = 600,
    fault: Annotated[list[str] | None, typer.Option(metavar="<fault>", help=_FAULT_HELP)] = None,
) -> None:
    """Stand in for Financefeast: Stream API and REST API for a made-up market of NZX symbols.

    The stream is at **ws://127.0.0.1:5005/ws**, the `local` environment of the official client. The REST endpoints are
    on the same port; their bars come from the streamed ticks. The simulator accepts one published token, which it
    prints, and refuses what the real service refuses.

    Faults: `drop` cuts a connection, `stall` keeps it but sends nothing more, `half-open` does not even answer
    pings, `garbage` mixes in malformed messages, `reject`, `limit` and `no-access` refuse every second
    authentication, `replay` repeats the last 200 messages after a reconnect.
    """
    if not is_loopback(host):
        raise ConfigurationError(f"--host {host}: the simulator is for this machine only; use 127.0.0.1 or ::1.")
    try:
        cycle = parse_duration(session)
    except ValueError as error:
        raise typer.BadParameter(outside_text(error), param_hint="--session") from None
    if cycle < 1:
        raise typer.BadParameter("must be at least 1s", param_hint="--session")
    never_block()
    asyncio.run(
        _simulate(
            Simulator(
                host=host,
                port=port,
                rate=rate,
                seed=seed,
                cycle=cycle,
                faults=fault or (),
                max_streams=max_streams,
                rate_limit=rate_limit,
            )
        )
    )


async def _simulate(simulator: Simulator) -> None:
    with stop_on_signals(lambda name: print(f"{name} is ignored.", flush=True)) as request:
        async with simulator:
            print(f"Stream API  {simulator.stream_url}\nREST API    {simulator.rest_url}\nToken       {TOKEN}\n")
            print("To point a daemon at it:")
            print(f"  export INGESTOR_STREAM_URL={simulator.stream_url} INGESTOR_TOKEN={TOKEN}\n", flush=True)
            while not request.stop.is_set():
                try:
                    await asyncio.wait_for(request.stop.wait(), REPORT_SECONDS)
                except TimeoutError:
                    print(f"{simulator.connected} streams, {simulator.ticks_sent:,} ticks sent", flush=True)
    print(f"Stopped after {simulator.ticks_sent:,} ticks.")
