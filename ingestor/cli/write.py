"""`ingestor write`: commits the batches of the replicated buffer."""

from __future__ import annotations

import asyncio

from ingestor.service.process import return_large_blocks, stop_on_signals
from ingestor.settings import Settings, load_settings, require_nats, unknown_variables
from ingestor.telemetry.events import Telemetry
from ingestor.telemetry.log import configure, report_dropped
from ingestor.telemetry.standard_streams import never_block


def write() -> None:
    """Commit what `ingestor run` publishes to NATS, until SIGTERM, SIGHUP, SIGQUIT or Ctrl-C.

    With **INGESTOR_BUFFER_URL**, `ingestor run` does not write to the database: it publishes each batch into a
    JetStream stream, of which several servers keep a copy, and this command commits it. Without the setting this
    command is not needed.

    Start two or more, on different machines: one is active and the others take over within ten seconds. They need
    **INGESTOR_DATABASE_URL** and a database that `ingestor migrate` has prepared.

    A batch is acknowledged after its commit, and its recorder keeps it until then. Health and metrics are on
    **INGESTOR_WRITE_HTTP_PORT**.

    Exit status: 0 orderly stop, 70 a bug, 78 an operator must act: a setting is wrong, the login at NATS or at the
    database is refused, or a port is in use.
    """
    never_block(report_dropped)
    settings = load_settings()
    settings.require("buffer_url", "database_url")
    require_nats()
    configure(settings.log_level, settings.log_format)
    return_large_blocks()
    asyncio.run(_write(settings))


async def _write(settings: Settings) -> None:
    from ingestor.service.write import WriteService

    telemetry = Telemetry()
    with stop_on_signals(telemetry.signal_ignored) as request:
        for name in unknown_variables():
            telemetry.warned("unknown_variable", variable=name, note="no setting has this name")
        await WriteService(settings, telemetry=telemetry).run(request)
