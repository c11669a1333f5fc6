"""Decides whether a request is meant for this server, by the host name that the client asks for.

A page on the internet can let its own name lead to 127.0.0.1, and so read through a browser there what only that
machine may read (DNS rebinding). Its requests carry that name in `Host`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ingestor.settings import ANY_HOST, is_loopback, normal_host, variable

PROBES = frozenset({"/healthz", "/readyz"})
"""Paths that answer whatever the name: a probe may come with any, and learns nothing but whether all is well."""

_AUTHORITY = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::\d*)?", re.ASCII)


class Hosts:
    """Names and addresses that requests may carry: those of loopback, that of the connection itself, and `names`.

    `names` are the address that the server is bound to, and what the operator allows; `*` allows every name.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = frozenset(_normal(name) for name in names)

    def accept(self, scope: Scope) -> bool:
        """Return whether a request carries one of them. Its port does not matter: it may come through a tunnel."""
        if ANY_HOST in self._names:
            return True
        found = [value for name, value in scope["headers"] if name == b"host"]
        match = _AUTHORITY.fullmatch(found[0].decode("latin-1")) if len(found) == 1 else None
        if match is None:
            return False
        host = _normal(match[1])
        own = _normal(scope["server"][0]) if scope["server"] else None  # of the connection: `0.0.0.0` says too little
        return host is not None and (is_loopback(host) or host in self._names or host == own)


def _normal(host: str) -> str | None:
    """Return a host as `normal_host` does, and `*` as it is; None for what is no host."""
    try:
        return host if host == ANY_HOST else normal_host(host)
    except ValueError:
        return None


class HostCheck:
    """Answers 421 (Misdirected Request) where a request is meant for another server; probes are let through."""

    def __init__(self, app: ASGIApp, hosts: Hosts) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["path"] in PROBES or self._hosts.accept(scope):
            await self._app(scope, receive, send)
        else:
            answer = PlainTextResponse(
                f"This host name is not known here. {variable('http_hosts')} can allow it.\n", status_code=421
            )
            await answer(scope, receive, send)
