"""`ingestor grant-analyst`: makes a login that reads the market."""

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
    name: Annotated[str, typer.Argument(help="The login's name.")],
    password_file: Annotated[
        Path | None, typer.Option(help="File with its password: 12 visible ASCII characters or more.")
    ] = None,
    no_password: Annotated[
        bool, typer.Option("--no-password", help="It is let in by another way (certificate, peer, LDAP).")
    ] = False,
    statement_timeout: Annotated[
        str, typer.Option(metavar="<duration>", help="A query that takes longer is ended.")
    ] = "1m",
) -> None:
    """Make a login for an analyst, or renew its password and limits: it reads the schema `market`, and nothing else.

    It is a member of the role `market_read`; its sessions in this database are read-only, and end what takes longer
    than the statement timeout. Without an option for the password, on a terminal, one is made up and shown once. The
    server is sent what it stores of a password, never the password itself.

    Needs **INGESTOR_DATABASE_URL** with a role that may create roles. `DROP ROLE` takes it away again.
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
    """Return the password of a file, or a new one where a person reads it."""
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
