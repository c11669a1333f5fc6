"""Decides by the `Host` header whether a request is meant for this server.

A web site can resolve its own name to 127.0.0.1 and read local pages through a browser there (DNS rebinding). Its
requests carry that name in `Host`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ingestor.settings import ANY_HOST, is_loopback, normal_host, variable

PROBES = frozenset({"/healthz", "/readyz"})
"""Paths that accept any name: a probe may use any, and learns only whether all is well."""

_AUTHORITY = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::\d*)?", re.ASCII)


class Hosts:
    """The accepted names and addresses: those of loopback, the address of the connection itself, and `names`.

    `names` are the address that the server is bound to and the names that the operator allows; `*` allows every name.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = frozenset(_normal(name) for name in names)

    def accept(self, scope: Scope) -> bool:
        """Return whether a request carries an accepted name. The port is ignored, since a tunnel changes it."""
        if ANY_HOST in self._names:
            return True
        found = [value for name, value in scope["headers"] if name == b"host"]
        match = _AUTHORITY.fullmatch(found[0].decode("latin-1")) if len(found) == 1 else None
        if match is None:
            return False
        host = _normal(match[1])
        # The address of the connection, since the server may be bound to `0.0.0.0`.
        own = _normal(scope["server"][0]) if scope["server"] else None
        return host is not None and (is_loopback(host) or host in self._names or host == own)


def _normal(host: str) -> str | None:
    """Return a host as `normal_host` does, and `*` unchanged; None if it is no host."""
    try:
        return host if host == ANY_HOST else normal_host(host)
    except ValueError:
        return None


class HostCheck:
    """Answers 421 (Misdirected Request) to a request meant for another server; probes pass."""

    def __init__(self, app: ASGIApp, hosts: Hosts) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["path"] in PROBES or self._hosts.accept(scope):
            await self._app(scope, receive, send)
        else:
            answer = PlainTextResponse(
                f"This host name is not accepted. {variable('http_hosts')} can allow it.\n", status_code=421
            )
            await answer(scope, receive, send)
