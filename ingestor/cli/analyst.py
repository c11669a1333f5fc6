"""`ingestor grant-analyst`: make a login that reads the market."""

from __future__ import annotations

import asyncio
import re
import secrets
import sys
from pathlib import Path
from typing import Annotated

import typer

from ingestor.cli._options import in_seconds
from ingestor.cli._output import say
from ingestor.redaction import register_secret
from ingestor.settings import load_settings


def grant_analyst(
    name: Annotated[str, typer.Argument(help="Name of the login.")],
    password_file: Annotated[
        Path | None, typer.Option(help="File with the password: 12 or more visible ASCII characters.")
    ] = None,
    no_password: Annotated[
        bool,
        typer.Option("--no-password", help="Set no password: the login authenticates by certificate, peer or LDAP."),
    ] = False,
    statement_timeout: Annotated[str, typer.Option(metavar="<duration>", help="Time limit of a query.")] = "1m",
) -> None:
    """Make a login for an analyst, or renew its password and limits. It can read the schema `market` and nothing else.

    The login is a member of the role `market_read`. Its sessions in this database are read-only and cancel queries
    that exceed the statement timeout. Without a password option, on a terminal, the command generates a password and
    shows it once. The server receives only the verifier that it stores, never the password.

    Needs **INGESTOR_DATABASE_URL** with a role that may create roles. `DROP ROLE` removes the login.
    """
    seconds = in_seconds(statement_timeout, "--statement-timeout", least=0.1)
    if password_file is not None and no_password:
        raise typer.BadParameter("one of --password-file and --no-password, not both", param_hint="--password-file")
    settings = load_settings()
    from ingestor.admin.roles import grant_analyst as grant

    password = None if no_password else _password(password_file)
    asyncio.run(
        grant(
            settings.read_database_url(),
            name,
            password=password,
            statement_timeout=seconds,
            report=say,
        )
    )
    if password_file is None and password is not None:
        print(f"Its password, shown only now: {password}")


def _password(file: Path | None) -> str:
    """Return the password of a file, or a new one if output is a terminal. Raises BadParameter."""
    if file is None:
        if not sys.stdout.isatty():
            raise typer.BadParameter(
                "this is no terminal, where a new password could be shown: use it, or --no-password",
                param_hint="--password-file",
            )
        password = secrets.token_urlsafe(18)
        register_secret(password)
        return password
    try:
        password = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise typer.BadParameter(f"{file} cannot be read: {why}", param_hint="--password-file") from None
    if not re.fullmatch(r"[\x21-\x7e]{12,256}", password):
        raise typer.BadParameter(
            f"{file} must hold 12 to 256 visible ASCII characters, and nothing else", param_hint="--password-file"
        )
    register_secret(password)
    return password
