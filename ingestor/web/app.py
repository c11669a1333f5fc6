"""The HTTP application: liveness, readiness, metrics, and the status page with its events. It is read-only.

Every client that can reach the port may read these answers; by default only this machine can. They hold no secret.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.resources import files
from typing import Any, Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ingestor.chart.palette import palette
from ingestor.redaction import redact_values
from ingestor.web.hosts import HostCheck, Hosts

EVENT_INTERVAL = 1.0
"""Seconds between two events of the page."""

MAX_WATCHERS = 32
"""Pages with live updates at once; each costs some memory and a little work every second."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

_TYPES = {".css": "text/css", ".js": "text/javascript", ".html": "text/html"}


class HealthSource(Protocol):
    """Provides liveness and readiness."""

    def loops(self) -> dict[str, bool]:
        """Return whether each loop advances, by its name."""
        ...

    def readiness(self) -> dict[str, Any]:
        """Return whether the process is ready, and its problems."""
        ...


class Source(HealthSource, Protocol):
    """Provides the data behind the HTTP endpoints."""

    def status(self) -> dict[str, Any]:
        """Return the data of the status page."""
        ...


def make_app(
    source: Source, registry: CollectorRegistry, closing: asyncio.Event, hosts: Hosts | None = None
) -> Starlette:
    """Return the application. It accepts the names of `hosts`; setting `closing` ends its event streams."""
    hosts = hosts or Hosts()
    pages = _Pages(source, registry, closing, hosts)
    routes = [
        Route("/healthz", pages.healthz),
        Route("/readyz", pages.readyz),
        Route("/metrics", pages.metrics),
        Route("/status", pages.status),
        Route("/events", pages.events),
        *(Route(path, _constant(content, kind)) for path, content, kind in _assets()),
    ]
    errors: dict[int | type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {404: _not_found}
    return Starlette(
        routes=routes,
        middleware=[Middleware(_Headers), Middleware(HostCheck, hosts=hosts)],
        exception_handlers=dict(errors),
    )


def make_health_app(source: HealthSource, registry: CollectorRegistry, hosts: Hosts) -> Starlette:
    """Return an application with liveness, readiness and metrics only, for a process without a page."""
    health = _Health(source, registry, hosts)
    routes = [
        Route("/healthz", health.healthz),
        Route("/readyz", health.readyz),
        Route("/metrics", health.metrics),
    ]
    return Starlette(routes=routes, middleware=[Middleware(_Headers), Middleware(HostCheck, hosts=hosts)])


class _Health:
    """The endpoints that every process has."""

    def __init__(self, source: HealthSource, registry: CollectorRegistry, hosts: Hosts) -> None:
        self._source = source
        self._registry = registry
        self._hosts = hosts

    async def healthz(self, _: Request) -> Response:
        """Answer whether the loops advance. If not, a restart may help."""
        loops = self._source.loops()
        alive = all(loops.values())
        return JSONResponse(
            {"alive": alive, "loops": {name: "ok" if well else "stuck" for name, well in loops.items()}},
            status_code=200 if alive else 503,
        )

    async def readyz(self, request: Request) -> Response:
        """Answer whether ticks are received and written now. If not, a restart hardly helps.

        The details may name machines, so only requests that `Hosts` accepts get them.
        """
        readiness = self._source.readiness()
        shown = readiness if self._hosts.accept(request.scope) else {"ready": readiness["ready"]}
        return JSONResponse(redact_values(shown), status_code=200 if readiness["ready"] else 503)

    async def metrics(self, request: Request) -> Response:
        """Answer with all metrics, in the format that the scraper requests."""
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self._registry), headers={"Content-Type": kind})


class _Pages(_Health):
    """The endpoints with changing answers."""

    def __init__(self, source: Source, registry: CollectorRegistry, closing: asyncio.Event, hosts: Hosts) -> None:
        super().__init__(source, registry, hosts)
        self._page = source
        self._closing = closing
        self._watchers = 0
        self._event = ""
        self._event_made_at = -EVENT_INTERVAL

    async def status(self, _: Request) -> Response:
        """Answer with the data of the status page."""
        return JSONResponse(redact_values(self._page.status()))

    async def events(self, _: Request) -> Response:
        """Stream the status as server-sent events."""
        if self._watchers >= MAX_WATCHERS:
            return PlainTextResponse("Too many pages are open.\n", status_code=503, headers={"Retry-After": "60"})
        return StreamingResponse(self._stream(), media_type="text/event-stream")

    async def _stream(self) -> AsyncIterator[str]:
        if self._watchers >= MAX_WATCHERS:  # several requests passed the first check at the same moment
            return
        self._watchers += 1
        try:
            yield "retry: 2000\n\n"
            while not self._closing.is_set():
                yield self._newest()
                await self._pause()
        finally:
            self._watchers -= 1

    def _newest(self) -> str:
        """Return the current event, which all pages share."""
        now = asyncio.get_running_loop().time()
        if now - self._event_made_at >= EVENT_INTERVAL / 2:
            status = redact_values(self._page.status())
            self._event = f"data: {json.dumps(status, separators=(',', ':'))}\n\n"
            self._event_made_at = now
        return self._event

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(EVENT_INTERVAL):
                await self._closing.wait()
        except TimeoutError:
            return


def _assets() -> list[tuple[str, str, str]]:
    """Return the path, the text and the media type of each static file."""
    found = []
    for file in files(__package__).joinpath("static").iterdir():
        kind = _TYPES.get(f".{file.name.rpartition('.')[2]}")
        if kind is not None:
            text = file.read_text(encoding="utf-8")
            if kind == "text/css":
                text = f"{palette()}\n{text}"
            found.append(("/" if file.name == "page.html" else f"/{file.name}", text, kind))
    return found


def _constant(content: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    async def answer(_: Request) -> Response:
        return Response(content, media_type=kind)

    return answer


async def _not_found(_: Request, __: Exception) -> Response:
    return PlainTextResponse("There are /, /healthz, /readyz, /metrics, /status and /events.\n", status_code=404)


class _Headers:
    """Adds the security headers to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, with_headers)
