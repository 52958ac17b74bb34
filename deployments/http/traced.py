"""Middleware that makes a span of each request to the API, in the client's trace if it has one."""

from __future__ import annotations

from opentelemetry.trace import SpanKind, StatusCode
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments import tracing
from deployments.http.front import received


class Traced:
    """Makes spans by OpenTelemetry's conventions for HTTP servers; they begin when Serve's proxy had the request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Implement ASGI."""
        if scope["type"] != "http" or "/v1/" not in scope["path"]:
            await self._app(scope, receive, send)
            return
        headers, method = Headers(scope=scope), scope["method"]
        # Without the path, which may hold the token of a link to a file.
        attributes = {"http.request.method": method, "request.id": headers.get("x-request-id", "")}
        with tracing.span(
            method,
            attributes,
            kind=SpanKind.SERVER,
            parent=tracing.context_of(headers),
            start=received(headers),
        ) as span:

            async def observed(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        span.set_status(StatusCode.ERROR)
                await send(message)

            try:
                await self._app(scope, receive, observed)
            finally:
                if route := scope.get("route"):
                    span.update_name(f"{method} {route.path}")
                    span.set_attribute("http.route", route.path)
