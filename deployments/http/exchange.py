"""A request and its answer on their way through a proxy, counted by what the client got."""

from __future__ import annotations

import json
import re
import time

from starlette.types import Message, Receive, Scope, Send

from deployments import metrics

_ENDPOINT = re.compile(r"/v1/(?:images/)?(generations|jobs|files|models|plans)(?:/|$)")
_ERROR_EVENT = b"event: error\ndata: "
_LONGEST_ERROR = 16384  # bytes
_REFUSALS = {"not_ready", "overloaded", "rate_limit_exceeded", "too_many_jobs"}  # of what might be served later


def endpoint_of(path: str) -> str:
    """Return the endpoint of the API that a path is of, or `other`."""
    found = _ENDPOINT.search(path)
    return found[1] if found else "other"


class Exchange:
    """Passes the messages of ASGI on, and looks at them."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._endpoint = endpoint_of(scope["path"])
        self._started = time.monotonic()
        self._status = 0
        self._error = b""  # a JSON error, or what has come of one
        self._left = self._done = False

    async def receive(self) -> Message:
        """Receive from the client."""
        message = await self._receive()
        self._left |= message["type"] == "http.disconnect" and not self._done
        return message

    async def send(self, message: Message) -> None:
        """Send to the client."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif message["type"] == "http.response.body":
            body = message.get("body", b"")
            if self._status >= 400 and len(self._error) < _LONGEST_ERROR:
                self._error += body
            elif body.startswith(_ERROR_EVENT):
                self._error = body.removeprefix(_ERROR_EVENT)
            self._done = not message.get("more_body", False)
        await self._send(message)

    def count(self) -> None:
        """Count the exchange, which has ended."""
        outcome, reason = self._end()
        metrics.REQUESTS.add(endpoint=self._endpoint, outcome=outcome, reason=reason)
        metrics.REQUEST_SECONDS.observe(time.monotonic() - self._started, endpoint=self._endpoint, outcome=outcome)

    def _end(self) -> tuple[str, str]:
        """Return how it ended: the outcome and the reason."""
        if self._left or not self._done:
            return "cancelled", ""
        if self._status < 400 and not self._error:
            return "ok", ""
        kind, code = _read(self._error)
        if code in _REFUSALS:
            return "refused", code
        return "invalid" if kind == "invalid_request_error" or 400 <= self._status < 500 else "failed", code


def _read(error: bytes) -> tuple[str, str]:
    """Return the type and the code of an error's body; that of another application may have neither."""
    try:
        content = json.loads(error)["error"]
        kind, code = content["type"], content["code"]
    except (ValueError, KeyError, TypeError):
        return "", "other"
    return kind, code if isinstance(code, str) and code in metrics.REASONS else "other"
