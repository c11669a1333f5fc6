"""`ingestor relay-token`: the tokens of a relay's clients."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Annotated

import typer

from ingestor.cli._options import in_seconds
from ingestor.cli._output import say
from ingestor.errors import NoDataError
from ingestor.settings import load_settings
from ingestor.store.relay_tokens import ListedToken, TokenStore

MAX_NAME = 63


def relay_token(
    name: Annotated[str | None, typer.Argument(help="Name of the client; 1 to 63 printable characters.")] = None,
    list_all: Annotated[bool, typer.Option("--list", help="List the tokens, without the tokens themselves.")] = False,
    revoke: Annotated[str | None, typer.Option(metavar="<name>", help="Revoke the token of this client.")] = None,
    max_streams: Annotated[int, typer.Option(help="Streams of the client at once, at one relay.", min=1)] = 2,
    expires: Annotated[
        str | None,
        typer.Option(metavar="<duration>", help="Time until the token expires, such as 90d; never if left out."),
    ] = None,
) -> None:
    """Make a token for a client of `ingestor relay`, list the tokens, or revoke one.

    A new token is printed once, alone on standard output, as in `ingestor relay-token charts >charts.token`; the
    database keeps only a hash of it. The client sends it in its first message, as it would send the provider's:
    {"type": "authenticate", "data": {"token": "…"}}. The provider's own token is never accepted by a relay.

    `ingestor relay-token --list` shows who has one, and `--revoke NAME` ends the streams of a client within seconds.
    A lost token cannot be shown again: revoke it, and make another. Give each program a token of its own, with
    `--expires 90d` if it is to end by itself.

    Needs **INGESTOR_DATABASE_URL** with the role that owns the tables. Exit status 1: the name has a token already, or
    has none to revoke.
    """
    if [name is not None, list_all, revoke is not None].count(True) != 1:
        raise typer.BadParameter("give a NAME, --list, or --revoke NAME", param_hint="NAME")
    if name is not None and not (1 <= len(name) <= MAX_NAME and name.isprintable() and name.strip() == name):
        raise typer.BadParameter(f"must be 1 to {MAX_NAME} printable characters", param_hint="NAME")
    seconds = None if expires is None else in_seconds(expires, "--expires", least=1)
    store = TokenStore(load_settings().read_database_url())
    if list_all:
        for token in asyncio.run(store.list()):
            say(_line(token))
    elif revoke is not None:
        if not asyncio.run(store.revoke(revoke)):
            raise NoDataError(f"There is no token of {revoke!r}.")
        say(f"The token of {revoke} is revoked.")
    elif name is not None:
        lifetime = None if seconds is None else timedelta(seconds=seconds)
        made = asyncio.run(store.add(name, max_streams=max_streams, lifetime=lifetime))
        if made is None:
            raise NoDataError(f"{name!r} has a token already.", hint="Revoke it first, or choose another name.")
        print(made)


def _line(token: ListedToken) -> str:
    until = "without expiry"
    if token.expires_at is not None:
        until = f"{'expired' if token.is_expired else 'expires'} {token.expires_at:%Y-%m-%d %H:%M} UTC"
    streams = "1 stream" if token.max_streams == 1 else f"{token.max_streams} streams"
    return f"{token.name}: {streams}, made {token.created_at:%Y-%m-%d %H:%M} UTC, {until}"
