"""Combines a URL, a service file and the PG… variables as PostgreSQL's own client does."""

from __future__ import annotations

import configparser
import getpass
import os
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote_plus, unquote, unquote_plus

from ingestor.address import DatabaseAddress
from ingestor.libpq import DRIVER, ParameterError, settled
from ingestor.redaction import register_password_file, register_secret

SERVICE_FILE = ".pg_service.conf"
PASSWORD_FILE = ".pgpass"  # noqa: S105 - a name


@dataclass(frozen=True, slots=True)
class Host:
    """One host of a URL: its `address` for the driver, and where it is. `name` is empty for the usual sockets.

    `pinned` is its address of `hostaddr`, or empty.
    """

    address: DatabaseAddress
    name: str
    port: int
    pinned: str


@dataclass(frozen=True, slots=True)
class Target:
    """The hosts in the order in which they are tried, and what is asked of a connection.

    `limit` is `connect_timeout` in seconds, None without one.
    """

    hosts: tuple[Host, ...]
    parameters: Mapping[str, str]
    limit: float | None


def target_of(address: DatabaseAddress) -> Target:
    """Read everything that says how to connect. Raises ParameterError."""
    given = {unquote_plus(name): unquote_plus(value) for name, value in address.parameters if value}
    environment = os.environ
    service = given.get("service") or environment.get("PGSERVICE")
    parameters = settled(given, _service(service, given) if service else {}, environment)
    if passfile := parameters.get("passfile"):
        register_password_file(Path(passfile))
    hosts = _hosts(_completed(address, parameters), parameters)
    seconds = int(parameters.get("connect_timeout") or 0)
    if parameters.get("load_balance_hosts") == "random":
        random.shuffle(hosts)
    return Target(tuple(hosts), parameters, float(seconds) if seconds > 0 else None)


def password_of(host: Host, parameters: Mapping[str, str]) -> str | None:
    """Return the password of the password file for a host by its name, where none is given otherwise."""
    address = host.address
    if address.password or parameters.get("password"):
        return None  # the driver has it
    user = unquote(address.user) or parameters.get("user") or getpass.getuser()
    database = unquote(address.path[1:]) or parameters.get("dbname") or parameters.get("database") or user
    asked = (host.name, str(host.port), database, user)
    path = Path(parameters.get("passfile") or _home() / PASSWORD_FILE)
    try:
        if path.stat().st_mode & 0o077:
            return None
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except (OSError, ValueError):
        return None
    for line in lines:
        fields = [re.sub(r"\\(.)", r"\1", each) for each in re.split(r"(?<!\\):", line, maxsplit=4)]
        if len(fields) == 5 and all(field in {"*", each} for field, each in zip(fields, asked, strict=False)):
            return fields[4]
    return None


def _completed(address: DatabaseAddress, parameters: Mapping[str, str]) -> DatabaseAddress:
    """Return the address with everything that the driver is to know, in the place where it reads it."""
    has = {"user": address.user, "password": address.password, "host": address.hosts != (("", ""),)}
    pairs = [
        (quote_plus(name), quote_plus(value))
        for name, value in parameters.items()
        if name in DRIVER and value and not has.get(name) and not (name == "port" and has["host"])
    ]
    if address.path[1:]:
        pairs = [pair for pair in pairs if pair[0] not in {"dbname", "database"}]
    if not has["host"] and not parameters.get("host") and parameters.get("hostaddr"):
        pairs.append(("host", quote_plus(parameters["hostaddr"])))
    return replace(address, parameters=tuple(pairs))


def _hosts(address: DatabaseAddress, parameters: Mapping[str, str]) -> list[Host]:
    each = address.each_host()
    pinned = parameters.get("hostaddr", "").split(",") if parameters.get("hostaddr") else [""] * len(each)
    if len(pinned) != len(each):
        raise ParameterError("hostaddr must have as many addresses as host has names")
    return [Host(one, *_place(one, parameters), where) for one, where in zip(each, pinned, strict=True)]


def _place(address: DatabaseAddress, parameters: Mapping[str, str]) -> tuple[str, int]:
    ((name, port),) = address.hosts if len(address.hosts) == 1 else (("", ""),)
    name = unquote(name).strip("[]") or address.parameter("host") or ""
    text = port or address.parameter("port") or parameters.get("port") or "5432"
    if not text.isdecimal() or not 0 < int(text) <= 65_535:
        raise ParameterError("port must be a number from 1 to 65535, and of several one for each host")
    return name, int(text)


def _service(name: str, given: Mapping[str, str]) -> dict[str, str]:
    """Return the parameters of a service. Raises ParameterError where no file has it."""
    own = Path(given.get("servicefile") or os.environ.get("PGSERVICEFILE") or _home() / SERVICE_FILE)
    system = os.environ.get("PGSYSCONFDIR")
    for path in (own, *([Path(system) / "pg_service.conf"] if system else [])):
        register_password_file(path)
        reader = configparser.RawConfigParser(strict=False, delimiters=("=",), comment_prefixes=("#",))
        try:
            reader.read_string(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, configparser.Error):
            raise ParameterError(f"the service file {path} cannot be read") from None
        if reader.has_section(name):
            found = dict(reader[name])
            register_secret(found.get("password", ""))
            return found
    raise ParameterError("service names a service that no service file has: set PGSERVICEFILE, or remove it")


def _home() -> Path:
    return Path(os.environ.get("HOME") or "/nonexistent")
