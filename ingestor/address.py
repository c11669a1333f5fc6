"""Addresses of databases and proxies, which may hold a password. Pure.

User and password end at the last `@`: a pasted password works, and Azure's `user@server` is a user. Libraries
disagree (asyncpg splits at the first `@`, `urllib` at the last one before a `/`, `?` or `#`), and their errors quote
the supposed host or port. So a library receives only an address that was parsed here and percent-encoded again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from urllib.parse import quote, quote_plus, unquote, unquote_plus, urlencode

from ingestor.libpq import KEYWORDS

HIDDEN = "[hidden]"
"""Replaces a secret."""

_SCHEME = re.compile(r"postgres(?:ql)?(?:\+asyncpg)?://")
_DATABASE = re.compile(
    r"postgres(?:ql)?(?:\+asyncpg)?://(?P<authority>[^/?#]*)(?P<path>/[^?#]*)?(?:\?(?P<query>.*))?", re.DOTALL
)
_PROXY = re.compile(
    r"(?P<scheme>https?|socks(?:4a?|5h?)?)://(?:(?P<userinfo>.*)@)?(?P<host>[^@]*?)/?", re.DOTALL | re.IGNORECASE
)
_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[^\[\]:/?#@\s]*)(?::(?P<port>[0-9]{0,5}))?")
_PARAMETER = re.compile(r"(?P<name>[A-Za-z0-9_.%-]+)=(?P<value>.*)", re.DOTALL)

TEMPLATE_USERINFO = "USER:PASSWORD"
"""User and password of the templates in messages of ours."""
TEMPLATE_HOSTS = ("HOST:PORT", "HOST/DATABASE")
"""Host and more of these templates."""

FORM = f"postgresql://{TEMPLATE_USERINFO}@{TEMPLATE_HOSTS[0]}/DATABASE"
ENCODE = "the password must be percent-encoded: / as %2F, ? as %3F, # as %23"


class AddressError(ValueError):
    """An address cannot be parsed. The message quotes none of it, because any part may be the password."""


@dataclass(frozen=True)
class DatabaseAddress:
    """The parts of a PostgreSQL address, as written.

    `password` is None if missing. `hosts` are pairs of name and port. `repr` and `shown` hold no password.
    """

    user: str
    password: str | None = field(repr=False)
    hosts: tuple[tuple[str, str], ...]
    path: str
    parameters: tuple[tuple[str, str], ...] = field(repr=False)

    @property
    def shown(self) -> str:
        """The address without its passwords, for logs and output."""
        password = "" if self.password is None else f":{HIDDEN}"
        at = "@" if self.user or self.password is not None else ""
        query = "&".join(f"{name}={HIDDEN if _is_secret(name) else value}" for name, value in self.parameters)
        return f"postgresql://{self.user}{password}{at}{self._netloc()}{self.path}{'?' if query else ''}{query}"

    @property
    def driver_url(self) -> str:
        """The address for the driver, in an unambiguous form. Holds the password."""
        password = "" if self.password is None else f":{_encoded(self.password)}"
        at = "@" if self.user or self.password is not None else ""
        hosts = ",".join(_host(name, port) for name, port in self.hosts)
        path = self.path and f"/{_encoded(self.path[1:])}"
        pairs = [(unquote_plus(name), unquote_plus(value)) for name, value in self.parameters if value]
        query = urlencode(pairs, safe="/,:", errors="surrogateescape")
        return f"postgresql://{_encoded(self.user)}{password}{at}{hosts}{path}{'?' if query else ''}{query}"

    @property
    def secrets(self) -> Iterator[str]:
        """The passwords, each as written and decoded."""
        if self.password:
            yield self.password
            yield unquote(self.password)
        for name, value in self.parameters:
            if _is_secret(name):
                yield value
                yield unquote_plus(value)

    def parameter(self, name: str) -> str | None:
        """Return the value of a parameter, or None. The last of equal names counts, as in the driver."""
        found = [value for each, value in self.parameters if unquote_plus(each) == name]
        return unquote_plus(found[-1]) if found else None

    def each_host(self) -> list[DatabaseAddress]:
        """Return an address for each host, in order.

        The driver can try several hosts itself, but a hanging host would use up the time of all of them, and any
        refusal except "starting up" would end the attempts.
        """
        if len(self.hosts) > 1:
            return [replace(self, hosts=(host,)) for host in self.hosts]
        names = (self.parameter("host") or "").split(",")
        ports = (self.parameter("port") or "").split(",")
        if self.hosts != (("", ""),) or len(names) == 1 or len(ports) not in {1, len(names)}:
            return [self]
        if len(ports) == 1:
            ports *= len(names)
        others = tuple(each for each in self.parameters if unquote_plus(each[0]) not in {"host", "port"})
        return [
            replace(self, parameters=(*others, ("host", quote_plus(name)), ("port", quote_plus(port))))
            for name, port in zip(names, ports, strict=True)
        ]

    def _netloc(self) -> str:
        return ",".join(f"{name}:{port}" if port else name for name, port in self.hosts)


def parse_database_address(text: str) -> DatabaseAddress:
    """Parse a database URL. Raises AddressError, also if a part of a password could be taken for another part."""
    match = _DATABASE.fullmatch(text)
    if match is None:
        raise AddressError(ENCODE if _SCHEME.match(text) else f"not a PostgreSQL address; write {FORM}")
    authority, path, query = match["authority"], match["path"] or "", match["query"] or ""
    userinfo, _, netloc = authority.rpartition("@")
    user, colon, password = userinfo.partition(":")
    parameters = _parameters(query)
    if "@" in path:
        raise AddressError(f"{ENCODE}; an @ in the name of the database as %40")
    hosts = tuple(map(_read_host, netloc.split(",")))
    # An @ in a value is one, unless the `?` stands in a password, and the value ends with the address itself.
    if "@" in query and ((authority and not path) or re.search(r"@[^&]*/", query)):
        raise AddressError(f"{ENCODE}; an @ in a parameter as %40")
    return DatabaseAddress(user, password if colon else None, hosts, path, parameters)


def proxy_url(text: str) -> str:
    """Return the address of a proxy in an unambiguous form. Raises AddressError. Holds the password."""
    match = _PROXY.fullmatch(text if "://" in text else f"http://{text}")
    host = _HOST.fullmatch(match["host"]) if match else None
    if match is None or host is None or not host["name"] or int(host["port"] or 0) > 65_535:
        raise AddressError(f"not the address of a proxy; write http://{TEMPLATE_USERINFO}@{TEMPLATE_HOSTS[0]}")
    userinfo, port = "", f":{host['port']}" if host["port"] else ""
    if match["userinfo"] is not None:
        user, _, password = match["userinfo"].partition(":")
        userinfo = f"{_encoded(user)}:{_encoded(password)}@"
    try:
        name = host["name"] if host["name"].isascii() else host["name"].encode("idna").decode("ascii")
    except UnicodeError:
        name = ""
    if not re.fullmatch(r"[A-Za-z0-9._-]+|\[.+\]", name):  # some letters become a slash
        raise AddressError("its host is not a valid host name")
    return f"{match['scheme'].lower()}://{userinfo}{name}{port}"


def secrets_of(text: str) -> list[str]:
    """Return every possible password in an address, also a malformed one; the longest first."""
    try:
        found = list(parse_database_address(text).secrets)
    except AddressError:
        rest = without_scheme(text)
        userinfo, at, tail = rest.rpartition("@")
        user, colon, password = (userinfo if at else tail).partition(":")
        found = [password or user] if at or colon else []
        found += [match[2] for match in re.finditer(r"([?&;\s][^=&]*pass[^=&]*=)([^&\s]*)", rest, re.IGNORECASE)]
        found += [unquote(each) for each in found]
    return sorted({each for each in found if each}, key=len, reverse=True)


def without_scheme(text: str) -> str:
    """Return an address without its scheme."""
    return re.sub(r"^[A-Za-z][A-Za-z0-9+.-]*://", "", text)


def redact_url(text: str) -> str:
    """Return a database URL, also a malformed one, without its passwords, for logs and output."""
    try:
        return parse_database_address(text).shown
    except AddressError:
        head, at, tail = without_scheme(text).rpartition("@")
    # After the last @ there is no part of a password, unless a parameter holds one.
    if not at or "?" in tail or _is_secret(text) or not _SCHEME.match(text):
        return f"postgresql://{HIDDEN}"
    user, colon, _ = head.partition(":")
    return f"postgresql://{user}:{HIDDEN}@{tail}" if colon else f"postgresql://{HIDDEN}@{tail}"


def _read_host(text: str) -> tuple[str, str]:
    match = _HOST.fullmatch(text)
    if match is None:
        # `user:pa/ss@host` ends at the slash, and its head looks like a host whose port is no number.
        raise AddressError(ENCODE if ":" in text and "[" not in text else f"its host cannot be read; write {FORM}")
    if int(match["port"] or 0) > 65_535:
        raise AddressError("its port is not one: 1 to 65535")
    return match["name"], match["port"] or ""


def _parameters(query: str) -> tuple[tuple[str, str], ...]:
    found: list[tuple[str, str]] = []
    for each in filter(None, query.split("&")):
        match = _PARAMETER.fullmatch(each)
        if match is None:
            raise AddressError(f"{ENCODE}; in a parameter also & as %26")
        found.append((match["name"], match["value"]))
    names = {unquote_plus(name) for name, _ in found}
    if any(map(_is_secret, names)) and names - KEYWORDS:
        raise AddressError("it has a password and an unknown parameter; write an & in the password as %26")
    return tuple(found)


def _is_secret(name: str) -> bool:
    return re.search("pass|secret|scram_(client|server)_key", unquote_plus(name).lower()) is not None


def _encoded(text: str) -> str:
    """Return a part percent-encoded, whether or not it was before."""
    return quote(unquote(text), safe="", errors="surrogateescape")


def _host(name: str, port: str) -> str:
    encoded = name if name.startswith("[") else _encoded(name)
    return f"{encoded}:{port}" if port else encoded
