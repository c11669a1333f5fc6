"""`ingestor relay`: serves the record and the live stream to clients."""

from __future__ import annotations

import asyncio

from ingestor.service.process import stop_on_signals
from ingestor.service.relay import Relay
from ingestor.settings import Settings, load_settings, unknown_variables
from ingestor.telemetry.log import configure, report_dropped
from ingestor.telemetry.relay_events import RelayTelemetry
from ingestor.telemetry.standard_streams import never_block


def relay() -> None:
    """Serve recorded and live ticks by Stream API v1 to any number of programs, until SIGTERM or Ctrl-C.

    A client connects to **ws://127.0.0.1:5005/ws** (the `local` environment of the official client) and sends a token
    of `ingestor relay-token`. It gets each tick after its commit; with `?from=2026-11-26T10:00:00%2B13:00` first
    everything that has arrived since then, and each tick once. Further options: `to`, `symbols`, `speed`, `gaps=1`,
    `meta=1`, `resume`.

    Needs **INGESTOR_DATABASE_URL** with a login in the role `market_relay`. The daemon need not run on this machine.
    Several relays can serve one database. Health and metrics are on **INGESTOR_RELAY_HTTP_PORT**.

    Exit status: 0 orderly stop, 78 an operator must act: a setting is wrong, or a port is in use.
    """
    never_block(report_dropped)
    settings = load_settings()
    settings.require("database_url")
    configure(settings.log_level, settings.log_format)
    asyncio.run(_relay(settings))


async def _relay(settings: Settings) -> None:
    telemetry = RelayTelemetry()
    with stop_on_signals(telemetry.signal_ignored) as request:
        for name in unknown_variables():
            telemetry.variable_unknown(name)
        await Relay(settings, telemetry=telemetry).run(request)
