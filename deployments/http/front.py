"""Middleware in Serve's HTTP proxy, in front of the application: probes, refusals, lost requests, the format of errors.

If the application answered probes, they would wait in the queue of images. Under more load than it can bear, its work
would go into refusing, so that most of that is done here. A replica of the application that dies takes the requests
along that it has, of which only the proxy still knows. And the proxy's own errors (its queue is full, a timeout) are
plain text or empty, and do not reach the application's handlers. Serve wraps its proxies in what
`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deployments.http.front:middlewares` names.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable
from functools import partial

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments import metrics
from deployments.access.keys import CHARGE_ID, new_charge_id
from deployments.http.errors import REPLICA_DIED, RETRY, error_body
from deployments.http.exchange import Exchange, endpoint_of
from deployments.http.readiness import Watch
from deployments.http.refusals import Refusals
from deployments.http.replay import Replay

logger = logging.getLogger("ray.serve")

_RECEIVED = b"x-front-received"  # header that says when the proxy had the request, in seconds since the epoch
_CHARGE = b"x-front-charge"  # header with the id of the request in the ledger, the same for all attempts at it
_REQUEST_ID = b"x-request-id"  # of clients, which Serve makes the request's name where there is one
_NAME = re.compile(rb"[\w.:-]{1,64}")
_IDEMPOTENCY_KEY = b"idempotency-key"


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


def charge_id(headers: Headers) -> str | None:
    """Return the id that a proxy's `Front` gave a request for the ledger, if there is one."""
    given = headers.get(_CHARGE.decode(), "")
    return given if CHARGE_ID.fullmatch(given) else None


class Front:
    """Answers probes, repeats refusals, sends again what a dead replica had, and gives errors the API's format.

    It also answers what browsers ask before they let pages of other origins call the API, and lets them read whatever
    is answered, errors of every kind among it.
    """

    def __init__(self, app: ASGIApp, *, in_proxy: bool = True) -> None:
        """Start watching the cluster.

        Args:
            app: the wrapped application.
            in_proxy: whether this is in Serve's proxy, where requests are refused while nothing can be served, and sent
                again.
        """
        self._app = app
        self._in_proxy = in_proxy
        self._in_flight = 0
        self._watch = Watch(lambda: self._in_flight)
        self._refusals = Refusals()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Implement ASGI."""
        if scope["type"] != "http" or scope["path"].startswith("/-/") or self._is_behind_another(scope):
            await self._app(scope, receive, send)  # Serve's own paths, and what another front does
        elif self._watch.cors_origins:
            # Keys are in a header that the page sets; nothing that browsers send by themselves lets anyone in.
            shared = CORSMiddleware(
                self._serve,
                allow_origins=self._watch.cors_origins,
                allow_methods=("GET", "POST", "DELETE"),
                allow_headers=("*",),
                expose_headers=("Retry-After", "X-Request-Id"),
            )
            await shared(scope, receive, send)
        else:
            await self._serve(scope, receive, send)

    def _is_behind_another(self, scope: Scope) -> bool:
        return not self._in_proxy and any(name == _RECEIVED for name, _ in scope["headers"])

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/healthz":
            await JSONResponse({"status": "ok"})(scope, receive, send)
        elif scope["path"] == "/readyz":
            await self._ready()(scope, receive, send)
        elif not self._in_proxy:
            await self._forward(scope, receive, send)
        else:
            exchange = Exchange(scope, receive, send)
            self._in_flight += 1
            try:
                await self._admit({**scope, "headers": _marked(scope["headers"])}, exchange.receive, exchange.send)
            finally:
                self._in_flight -= 1
                exchange.count()

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request, unless nothing can be served now."""
        await (self._refusal() or self._forward)(scope, receive, send)

    def _ready(self) -> JSONResponse:
        readiness = self._watch.readiness
        if readiness.reason:
            return _error(503, "not_ready", readiness.reason)
        return JSONResponse({"status": "ready", "replicas": readiness.replicas, "stages": readiness.stages})

    def _refusal(self) -> JSONResponse | None:
        """Return the refusal of a request that could not be served; a request may wait for a stage that restarts."""
        known = self._watch.last_known
        was_ready = self._watch.was_ready or known.reason is None  # the watch may not have looked since
        if was_ready and known.replicas.get("Ingress"):
            return None
        return _error(503, "not_ready", known.reason or "starting")

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send a request to a replica and, if that dies before it answers, once more to whichever is there then.

        Not a third time: the request may be the reason.
        """
        replay, again = Replay(receive), dict(scope)  # which Serve changes on its way
        asks_for_images = scope["method"] == "POST" and endpoint_of(scope["path"]) == "generations"
        if asks_for_images and self._refusals.hold and (refusal := await self._refusals.repeat(scope, replay)):
            await JSONResponse(refusal.body, refusal.status, refusal.headers)(scope, receive, send)
            return
        answer = _Answer(scope, receive, send, partial(self._refusals.note, again, replay))
        await self._attempt(scope, replay, answer)
        if answer.begun is None and self._in_proxy and _is_repeatable(again) and replay.rewind():
            metrics.RESENT.add()
            logger.warning(f"{dict(again['headers'])[_REQUEST_ID].decode()}: sent again, for its replica died")
            await self._attempt(again, replay, answer)
        if not replay.has_left:
            await answer.end()

    async def _attempt(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        try:
            await self._app(scope, receive, answer)
        except UnicodeDecodeError:  # of Serve's, which reads some
            if answer.begun:
                raise
            await answer.replace(_error(400, "invalid_value", "headers must be in UTF-8"))


class _Answer:
    """An answer on its way to the client; the first message of it waits for the second, until which it may be lost.

    Attributes:
        begun: the message that began what the client gets, or None as long as that is nothing.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, note: Callable[[Message], Message]) -> None:
        """Wait for messages.

        Args:
            scope: the request.
            receive: receives from the client.
            send: sends to the client.
            note: takes the message that begins the application's answer, and returns what the client is to get.
        """
        self.begun: Message | None = None
        self._scope, self._receive, self._send, self._note = scope, receive, send, note
        self._start: Message | None = None
        self._done = False

    async def __call__(self, message: Message) -> None:
        """Take a message of the proxy's; an error that is not the application's gets the API's format, or is lost."""
        if message["type"] == "http.response.start":
            self._start = None if _is_lost(message) else self._note(message)
            if self._start and message["status"] >= 400 and not _is_json(message):
                await self.replace(_proxy_error(message))
        elif self._start and not self._done:
            if not self.begun:
                self.begun = self._start
                await self._send(self._start)
            self._done = message["type"] == "http.response.body" and not message.get("more_body", False)
            await self._send(message)

    async def replace(self, answer: JSONResponse) -> None:
        """Give the client this answer, and nothing that comes."""
        self.begun, self._done = {"type": "http.response.start", "status": answer.status_code}, True
        await answer(self._scope, self._receive, self._send)

    async def end(self) -> None:
        """Say that a replica died if the client has no answer yet, or an unfinished stream."""
        if self.begun is None:
            await self.replace(_error(503, "replica_died", REPLICA_DIED))
        elif not self._done and Headers(raw=self.begun["headers"]).get("content-type", "").startswith(
            "text/event-stream"
        ):
            body = error_body(503, "replica_died", REPLICA_DIED)
            event = f"event: error\ndata: {json.dumps(body)}\n\n".encode()
            await self._send({"type": "http.response.body", "body": event, "more_body": False})


def _is_repeatable(scope: Scope) -> bool:
    """Whether a request of the API may be worked on twice: it reads, makes images or has a key."""
    endpoint = endpoint_of(scope["path"])
    has_key = any(name.lower() == _IDEMPOTENCY_KEY for name, _ in scope["headers"])
    return endpoint != "other" and (scope["method"] == "GET" or endpoint == "generations" or has_key)


def _marked(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return headers with the time, a request id, the client's if it is a plain name, and an id for the ledger.

    Serve writes the request's id into logs. An attempt that is made after another one is charged for in its place.
    """
    names = [value for name, value in headers if name.lower() == _REQUEST_ID and _NAME.fullmatch(value)]
    kept = [(name, value) for name, value in headers if name.lower() not in (_RECEIVED, _REQUEST_ID, _CHARGE)]
    return [
        *kept,
        (_REQUEST_ID, names[0] if names else str(uuid.uuid4()).encode()),
        (_RECEIVED, repr(time.time()).encode()),
        (_CHARGE, new_charge_id().encode()),
    ]


def _is_lost(start: Message) -> bool:
    """Whether an answer is the proxy's that the replica failed; the application's own failures are in JSON."""
    return start["status"] == 500 and not _is_json(start)


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
