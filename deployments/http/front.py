"""Middleware in Serve's HTTP proxy, in front of the application: probes, and errors in the API's format.

If the application answered probes, they would wait in the queue of images. And the proxy's own errors (its queue is
full, a replica died, a timeout) are plain text or empty, and do not reach the application's handlers. Serve wraps its
proxies in what `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deployments.http.front:middlewares` names.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.http.errors import REPLICA_DIED, RETRY, error_body
from deployments.http.exchange import Exchange
from deployments.http.readiness import Watch

_RECEIVED = b"x-front-received"  # header that says when the proxy had the request, in seconds since the epoch
_REQUEST_ID = b"x-request-id"  # of clients, which Serve makes the request's name where there is one
_NAME = re.compile(rb"[\w.:-]{1,64}")


def middlewares() -> list[Middleware]:
    """Return the middlewares for Serve's HTTP proxies."""
    return [Middleware(Front)]


def received(headers: Headers) -> float:
    """Return when a proxy's `Front` had the request, in seconds since the epoch, or now if there is none."""
    now = time.time()
    try:
        start = float(headers.get(_RECEIVED.decode(), now))
    except ValueError:
        return now
    return start if start < now else now


class Front:
    """Answers probes at once, refuses requests while nothing can be served, and gives errors the API's format."""

    def __init__(self, app: ASGIApp, *, refuses: bool = True) -> None:
        """Start watching the cluster.

        Args:
            app: the wrapped application.
            refuses: whether to refuse requests while nothing can be served; one front per request should.
        """
        self._app = app
        self._refuses = refuses
        self._in_flight = 0
        self._watch = Watch(lambda: self._in_flight)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Implement ASGI."""
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # Serve's own paths
            await self._app(scope, receive, send)
        elif scope["path"] == "/healthz":
            await JSONResponse({"status": "ok"})(scope, receive, send)
        elif scope["path"] == "/readyz":
            await self._ready()(scope, receive, send)
        elif not self._refuses:
            await self._answer(scope, receive, send)
        else:
            exchange = Exchange(scope, receive, send)
            try:
                await self._answer(scope, exchange.receive, exchange.send)
            finally:
                exchange.count()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if refusal := self._refusal():
            await refusal(scope, receive, send)
            return
        self._in_flight += 1
        if self._refuses:
            scope = {**scope, "headers": _marked(scope["headers"])}
        try:
            await self._forward(scope, receive, send)
        finally:
            self._in_flight -= 1

    def _ready(self) -> JSONResponse:
        readiness = self._watch.readiness
        if readiness.reason:
            return _error(503, "not_ready", readiness.reason)
        return JSONResponse({"status": "ready", "replicas": readiness.replicas, "stages": readiness.stages})

    def _refusal(self) -> JSONResponse | None:
        """Return the refusal of a request that could not be served; a request may wait for a stage that restarts."""
        readiness = self._watch.readiness
        was_ready = self._watch.was_ready or readiness.reason is None  # the watch may not have looked since
        if not self._refuses or (was_ready and readiness.replicas.get("Ingress")):
            return None
        return _error(503, "not_ready", readiness.reason or "starting")

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message | None = None
        done = False

        async def shaped(message: Message) -> None:
            nonlocal start, done
            if message["type"] == "http.response.start":
                start = message
                if message["status"] >= 400 and not _is_json(message):
                    await _proxy_error(message)(scope, receive, send)
                    done = True
                    return
            if not done:
                done = message["type"] == "http.response.body" and not message.get("more_body", False)
                await send(message)

        try:
            await self._app(scope, receive, shaped)
        except UnicodeDecodeError:  # of Serve's, which reads some
            if start is None:
                await _error(400, "invalid_value", "headers must be in UTF-8")(scope, receive, send)
                return
            raise
        if start is None:
            await _error(503, "replica_died", REPLICA_DIED)(scope, receive, send)
        elif not done and Headers(raw=start["headers"]).get("content-type", "").startswith("text/event-stream"):
            body = error_body(503, "replica_died", REPLICA_DIED)
            event = f"event: error\ndata: {json.dumps(body)}\n\n".encode()
            await send({"type": "http.response.body", "body": event, "more_body": False})


def _marked(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return headers with the time, and without a request id that is no plain name: Serve writes it into its logs."""
    kept = [
        (name, value)
        for name, value in headers
        if name.lower() != _RECEIVED and (name.lower() != _REQUEST_ID or _NAME.fullmatch(value))
    ]
    return [*kept, (_RECEIVED, repr(time.time()).encode())]


def _is_json(start: Message) -> bool:
    return Headers(raw=start["headers"]).get("content-type", "").startswith("application/json")


def _proxy_error(start: Message) -> JSONResponse:
    """Turn an error of the proxy's own into the API's format."""
    match start["status"]:
        case 503 | 429:
            return _error(503, "overloaded", "all queues are full; try again later")
        case 408:
            return _error(504, "deadline_exceeded", "not done in the time that a request may take")
        case 404:
            return _error(404, "not_found", "no application is served at this path")
        case status:
            return _error(status, "internal_error", "the request failed; the server's log has the reason")


def _error(status: int, code: str, message: str) -> JSONResponse:
    return JSONResponse(error_body(status, code, message), status, RETRY if status == 503 else None)
