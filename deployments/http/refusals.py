"""Refusals of what would be late, and how long they hold: a server with too much to do says so without working for it.

The application says with a refusal when there will be room, and how much of that time an image takes. Requests that
differ in their texts and seeds alone would be refused, too, until then, and from then on all but as many as there comes
room for. Its proxies refuse them in its place, and ever fewer of them while the application refuses none.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import NamedTuple, Self

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Scope

from deployments import metrics
from deployments.http.errors import APIError
from deployments.http.replay import Replay

_HEADER = "x-front-refusal"
_CLOSED_S = 1.0  # after a refusal in which none is let through, at most: others may leave, or replicas come
_SPARE = 1.5  # times as many are let through then as there should be room for: the application refuses those too many
_DOUBLES_S = 5.0  # in which it becomes twice as many if the application refuses none: there is more room than it said
_HOLDS_S = 30.0  # after which all are let through
_BURST_S = 1.0  # so late may come at once what was to be let through by and by
_MOST_KINDS = 1024
_BODY_S = 1.0  # in which a body must have come; one that comes later is the application's
_MOST_BYTES = 65536  # of a body; one that has as many or more is not looked at
_FREE = {"prompt", "negative_prompt", "seed", "user", "safety_identifier"}  # fields without influence on the time


@dataclass(frozen=True)
class Refusal:
    """Images of one request that would be done too late.

    Attributes:
        seconds: until they would be done.
        wait_s: seconds until there is room for them if nothing else comes.
        takes_s: seconds that they take of those that follow.
        images: how many they are.
        size: their size.
    """

    seconds: float
    wait_s: float
    takes_s: float
    images: int
    size: str

    @classmethod
    def from_header(cls, value: str) -> Self:
        """Read a header of `error`."""
        return cls(**json.loads(value))

    def error(self) -> APIError:
        """Return the answer, which a proxy's `Refusals` read."""
        return APIError(
            503,
            "overloaded",
            f"the images would be done in about {math.ceil(self.seconds)} s, which is too late; try again later",
            headers={"Retry-After": str(max(1, math.ceil(self.wait_s))), _HEADER: json.dumps(asdict(self))},
        )


@dataclass
class _Held:
    """A kind of requests that is refused.

    Attributes:
        refusal: the application's last one.
        since: when that came.
        next: when the next request is let through.
    """

    refusal: Refusal
    since: float
    next: float

    def holds(self, now: float) -> bool:
        """Whether a request may have to wait until the next one is let through."""
        return now < self.since + _HOLDS_S

    def let_through(self, now: float, share: float) -> None:
        """Say when the next one is let through if one is now, for a share of what there comes room for."""
        spare = _SPARE * 2 ** ((now - self.since) / _DOUBLES_S)
        self.next = max(self.next, now - _BURST_S) + self.refusal.takes_s / (share * spare)


class _Kind(NamedTuple):
    """What requests have in common that are refused alike: hashes of who asks, and of for what."""

    caller: bytes
    asked: bytes


class Refusals:
    """Repeats the application's refusals as long as they hold, and says when to come back.

    What there comes room for is shared among callers alike, and so is what each has among kinds of requests. Whoever is
    refused is told a later time than those before, or all would come at once, and all but a few for nothing.
    """

    def __init__(self) -> None:
        self._held: dict[_Kind, _Held] = {}
        self._next_return = -math.inf  # when the last one that was refused may come back

    @property
    def hold(self) -> bool:
        """Whether any request would be refused now."""
        now = time.monotonic()
        self._held = {kind: held for kind, held in self._held.items() if held.holds(now)}
        return bool(self._held)

    async def repeat(self, scope: Scope, body: Replay) -> APIError | None:
        """Refuse a request as one of its kind was, or return None.

        Args:
            scope: the request.
            body: its body, which can be read as before afterwards.
        """
        try:
            async with asyncio.timeout(_BODY_S):
                await body.read(_MOST_BYTES)
        except TimeoutError:
            return None
        finally:
            body.rewind()
        now = time.monotonic()
        kind = _kind(scope, body)
        if kind is None or not (held := self._held.get(kind)) or not held.holds(now):
            return None
        if held.next <= now:
            held.let_through(now, self._share(kind))
            return None
        refusal = held.refusal
        metrics.REFUSED.add(refusal.images, reason="overloaded", size=refusal.size)
        error = refusal.error()
        error.headers = {"Retry-After": self._retry_after(refusal)}
        return error

    def note(self, scope: Scope, body: Replay, start: Message) -> Message:
        """Take note of the beginning of the application's answer; return what the client is to get."""
        found = Headers(raw=start["headers"]).get(_HEADER)
        if found is None:
            return start
        headers, refusal = MutableHeaders(raw=list(start["headers"])), Refusal.from_header(found)
        kind = _kind(scope, body)
        if kind and (kind in self._held or len(self._held) < _MOST_KINDS):
            now = time.monotonic()
            self._held[kind] = _Held(refusal, now, now + min(refusal.wait_s, _CLOSED_S))
        del headers[_HEADER]
        headers["Retry-After"] = self._retry_after(refusal)
        return {**start, "headers": headers.raw}

    def _share(self, kind: _Kind) -> float:
        callers = Counter(each.caller for each in self._held)
        return 1 / len(callers) / callers[kind.caller]

    def _retry_after(self, refusal: Refusal) -> str:
        now = time.monotonic()
        self._next_return = max(now + refusal.wait_s, self._next_return + refusal.takes_s)
        return str(max(1, math.ceil(self._next_return - now)))


def _kind(scope: Scope, body: Replay) -> _Kind | None:
    """Return what a request has in common with those that differ in texts and seeds alone; None if it is no request."""
    try:
        fields = json.loads(body.content) if len(body.content) < _MOST_BYTES else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    asked = {name: value for name, value in fields.items() if name not in _FREE}
    return _Kind(_hash(sorted(Headers(scope=scope).getlist("authorization"))), _hash([scope["path"], asked]))


def _hash(value: object) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
