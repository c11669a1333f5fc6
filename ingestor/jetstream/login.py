"""The login at the NATS servers, from one file that is read again at each connection."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nats.aio.client import RawCredentials

from ingestor.errors import ConfigurationError
from ingestor.files import FileTextError, read_text, unquoted
from ingestor.redaction import outside_text, register_secret, system_words
from ingestor.settings import Settings, is_loopback, variable

_SETTING = f"{variable('buffer_credentials_file')}"
_JWT = re.compile(r"-----BEGIN NATS USER JWT-----\s*(\S+)", re.ASCII)
_SEED = re.compile(r"S[UANCOX][A-Z2-7]{56}", re.ASCII)


def login_options(settings: Settings, scheme: str, host: str) -> dict[str, Any]:
    """Return the options of `nats.connect` that log in at a server. Raises ConfigurationError, without the secret."""
    if settings.buffer_credentials_file is None:
        return {}
    text = _read(settings.buffer_credentials_file)
    seeds = _SEED.findall(text)
    for secret in (*seeds, *_JWT.findall(text)):
        register_secret(secret)
    if _JWT.search(text):
        if not seeds:
            raise ConfigurationError(f"{_SETTING}: the .creds file has no NKey seed.")
        return {"user_credentials": RawCredentials(text)}
    if seeds:
        return {"nkeys_seed_str": seeds[0]}
    return _password_options(text, scheme, host)


def _password_options(text: str, scheme: str, host: str) -> dict[str, Any]:
    """Return the options for USER:PASSWORD or a token, which travel as they are."""
    try:
        secret = unquoted(text)
    except FileTextError as error:
        raise ConfigurationError(f"{_SETTING}: {error}") from None
    user, colon, password = secret.partition(":")
    register_secret(password or secret)
    if not secret or len(secret.splitlines()) > 1:
        raise ConfigurationError(
            f"{_SETTING}: the file holds neither credentials of NATS nor one line with an NKey seed, "
            "USER:PASSWORD or a token."
        )
    if scheme == "nats" and not is_loopback(host):
        raise ConfigurationError(
            f"{_SETTING}: the password would travel unencrypted to {host}. Use tls:// in {variable('buffer_url')}, "
            "or a .creds file or an NKey, of which only a signature travels."
        )
    return {"user": user, "password": password} if colon else {"token": secret}


def _read(path: Path) -> str:
    shown = f"{_SETTING}: {outside_text(path)}"
    try:
        return read_text(path.expanduser())
    except FileTextError as error:
        raise ConfigurationError(f"{shown} cannot be used: {error}") from None
    except (OSError, RuntimeError) as error:
        words = system_words(error) if isinstance(error, OSError) else "this user has no home directory"
        raise ConfigurationError(f"{shown} cannot be read: {words}") from None
