"""The command line: one file for each command; the only place that prints."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer

from ingestor import __version__
from ingestor.cli._completion import PROGRAM, Shell, prepare_completion, show_completion
from ingestor.cli._group import Command, Group
from ingestor.cli._output import escape_unknown_characters, flush_output, reports_output_errors
from ingestor.cli.analyst import grant_analyst
from ingestor.cli.backfill import backfill
from ingestor.cli.chart import chart
from ingestor.cli.check import check
from ingestor.cli.demo import demo
from ingestor.cli.gaps import gaps
from ingestor.cli.maintain import maintain
from ingestor.cli.migrate import migrate
from ingestor.cli.reconcile import reconcile
from ingestor.cli.relay import relay
from ingestor.cli.relay_token import relay_token
from ingestor.cli.replay import replay
from ingestor.cli.run import run
from ingestor.cli.simulate import simulate
from ingestor.cli.write import write
from ingestor.errors import EXIT_SOFTWARE, ConfigurationError, IngestorError
from ingestor.redaction import redact
from ingestor.settings import load_settings
from ingestor.telemetry.standard_streams import open_missing
from ingestor.telemetry.unexpected import redact_tracebacks

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 all is well, 1 as the command says, 2 wrong option, 69 the command could not do its work "
    "(for example, the database is unavailable), 70 a bug, 78 an operator must act. "
    "Settings are environment variables that begin with INGESTOR_; see .env.example.",
)
for command in (
    run,
    demo,
    simulate,
    migrate,
    check,
    gaps,
    chart,
    backfill,
    reconcile,
    replay,
    maintain,
    grant_analyst,
    relay,
    relay_token,
    write,
):
    app.command(cls=Command)(reports_output_errors(command))


def _show_version(value: bool) -> None:
    if value:
        print(f"ingestor {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
    completion: Annotated[
        Shell | None,
        typer.Option(
            callback=show_completion,
            is_eager=True,
            help="Print the completion script for this shell.",
        ),
    ] = None,
) -> None:
    """Keep a Financefeast stream alive and store every tick in PostgreSQL exactly once.

    New here? `ingestor demo` shows everything on this machine, without an account.
    """


def main() -> None:
    """Run the command line. An expected error prints one line for each problem and no traceback.

    Status 1 is an answer of a command (gaps are open, bars differ). Every failure, bugs included, has another status.
    """
    open_missing()
    escape_unknown_characters()
    redact_tracebacks()
    with contextlib.suppress(ConfigurationError):  # register every secret before any output
        load_settings()
    try:
        status = _run()
    except IngestorError as error:
        for line in redact(str(error)).splitlines():
            print(f"ingestor: {line}", file=sys.stderr)
        status = error.exit_code
    except Exception:  # noqa: BLE001 - any other error is a bug
        sys.excepthook(*sys.exc_info())
        status = EXIT_SOFTWARE
    sys.exit(status)


def _run() -> str | int | None:
    """Run the command that the arguments name, flush its output, and return its status."""
    prepare_completion()
    try:
        typer.main.get_command(app)(prog_name=PROGRAM)  # `app()` would print its own traceback
    except SystemExit as end:
        flush_output()
        return end.code
    flush_output()
    return 0
