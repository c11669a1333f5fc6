"""`ingestor run`: the daemon."""

from __future__ import annotations

import asyncio

from ingestor.service.daemon import Daemon
from ingestor.service.process import return_large_blocks, stop_on_signals
from ingestor.settings import Settings, load_settings, unknown_variables
from ingestor.telemetry.events import Telemetry
from ingestor.telemetry.log import configure, report_dropped
from ingestor.telemetry.standard_streams import never_block


def run() -> None:
    """Record the stream until SIGTERM, SIGHUP, SIGQUIT or Ctrl-C.

    Needs **INGESTOR_TOKEN** and **INGESTOR_DATABASE_URL** (or each as a file: …_FILE), and a database that
    `ingestor migrate` has prepared. While the database is unavailable, ticks wait on disk (**INGESTOR_SPOOL_DIR**),
    also across a restart. While the stream is unavailable, the daemon reconnects.

    On a stop the daemon writes the waiting ticks to the database, else to disk; a second signal skips the database.
    SIGHUP stops it too (unless `nohup` started the process): no signal reloads the settings. SIGUSR1 and other
    signals without a meaning are logged and ignored.

    Exit status: 0 orderly stop, 1 ticks could be kept neither in the database nor on disk, 2 wrong option, 69 the
    daemon could not go on for a reason outside of it, 70 a bug, 78 an operator must act: a setting is wrong, the token
    or the database's login is refused, or another ingestor uses the same directory or port, 134 the watchdog ended a
    process that hung.
    """
    never_block(report_dropped)
    settings = load_settings()
    settings.require("token", "database_url")
    configure(settings.log_level, settings.log_format)
    return_large_blocks()
    asyncio.run(_run(settings))


async def _run(settings: Settings) -> None:
    telemetry = Telemetry()
    with stop_on_signals(telemetry.signal_ignored) as request:
        daemon = Daemon(settings, telemetry=telemetry)
        for name in unknown_variables():
            daemon.telemetry.warned("unknown_variable", variable=name, note="no setting has this name")
        await daemon.run(request)
