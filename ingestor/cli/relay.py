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

    The feed allows few streams and repeats nothing; a relay serves from the database whatever is on record, and goes
    over into live without a missing or a doubled tick. To begin, as the owner of the tables:

    `CREATE ROLE relay LOGIN PASSWORD '…' IN ROLE market_relay`, and `ingestor relay-token NAME` for each client.

    Then start the relay with this login in **INGESTOR_DATABASE_URL**. The daemon need not run on this machine, and
    several relays can serve one database. A client connects to **ws://127.0.0.1:5005/ws** (the environment `local` of
    the official client) and sends its token. It gets each tick after its commit. Options in the query:

    `from` and `to`: instants such as 2026-11-26T10:00:00%2B13:00; first what has arrived since then, then live.

    `symbols`: only these, such as FPH.NZ,AIR.NZ. `speed`: max, or a factor of real time.

    `gaps=1`: mark each gap. `meta=1`: add arrival and cursor to each tick. `resume`: go on behind a cursor.

    Beyond this machine, set **INGESTOR_RELAY_HOST** with a certificate in **INGESTOR_RELAY_TLS_CERT** and
    **INGESTOR_RELAY_TLS_KEY**. Health and metrics are on **INGESTOR_RELAY_HTTP_PORT**. Passing data on to third parties
    is a matter of your plan's licence.

    Exit status: 0 orderly stop, 78 an operator must act: a setting is wrong, a port is in use, or the login is refused.
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
