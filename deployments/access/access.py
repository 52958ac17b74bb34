"""Access as the API knows it: who a request is from, and what is charged for it."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from deployments.access.keys import Presented, new_charge_id
from deployments.access.settings import AccessSettings
from deployments.access.store import (
    AccessStore,
    Charge,
    ChargeEnded,
    LimitExceeded,
    Revoked,
    Served,
)
from deployments.http.errors import RETRY, APIError
from stages.image import parse_size

logger = logging.getLogger("ray.serve")

P = ParamSpec("P")
T = TypeVar("T")

Settle = Callable[[Sequence[float]], Awaitable[None]]

_DEADLINE_S = 5.0  # of a call to the database
_PAUSE_S = 1.0  # before the database is told again what it did not hear
_ATTEMPTS = 100  # to tell it what nobody waits for
_CALLS = 8  # to the database at once
_NOTES = 10_000  # that wait for the database


@dataclass(frozen=True)
class Caller:
    """Whom a request is from.

    Attributes:
        key_id: id of the key; empty where the API is open.
    """

    key_id: str


ANYONE = Caller("")


def served(size: str, evaluations: Sequence[float]) -> Served:
    """Return what images of `WIDTHxHEIGHT` are that took so many network evaluations each."""
    return Served(len(evaluations), _pixels(size, len(evaluations)), sum(evaluations))


def _pixels(size: str, images: int) -> int:
    width, height = parse_size(size)
    return width * height * images


class Access(ABC):
    """Access to an API: `KeyedAccess` or `OpenAccess`."""

    @abstractmethod
    async def identify(self, authorization: str | None, scope: str) -> Caller:
        """Return whom a request is from.

        Args:
            authorization: the header.
            scope: what the key must be for.

        Raises:
            APIError: there is no such key (401), or it is not for this (403).
        """

    @abstractmethod
    async def reserve(
        self, charge_id: str, caller: Caller, request_id: str, images: int, size: str, until: float = 0.0
    ) -> None:
        """Let a request in.

        Args:
            charge_id: the job's id, or a new one.
            caller: whom it is from.
            request_id: its id in logs.
            images: number of images that it asks for.
            size: their size, `WIDTHxHEIGHT`.
            until: when its images are no longer in the making, in seconds since the epoch; 0 for a job that waits.

        Raises:
            APIError: the key may not have that now (429), or never (400).
            ChargeEnded: a charge of this id is another key's, or has ended.
        """

    @abstractmethod
    async def settle(self, charge_id: str, what: Served, until: float) -> None:
        """Charge for what is about to be served; insist until then. Raises APIError if that is in vain."""

    @abstractmethod
    def void(self, charge_id: str) -> None:
        """Charge nothing for a request or a job after all; a task in the background notes that."""

    @asynccontextmanager
    async def charged(
        self, caller: Caller, request_id: str, images: int, size: str, until: float, charge_id: str | None = None
    ) -> AsyncGenerator[Settle]:
        """Let a request in, whose images are in the making within the block; for the rest see `reserve`.

        What is not settled by the end of the block costs nothing. A request that comes again because its replica died
        has the same `charge_id`, and counts once; None for a new one.

        Yields:
            A function to await before the images are served, with the network evaluations of each.
        """
        entered, settled = charge_id or new_charge_id(), False

        async def settle(evaluations: Sequence[float]) -> None:
            nonlocal settled
            await self.settle(entered, served(size, evaluations), until)
            settled = True

        try:
            await self.reserve(entered, caller, request_id, images, size, until)
        except ChargeEnded:
            logger.warning(f"{request_id} is charged anew: a charge {entered} has ended, or is another key's")
            entered = new_charge_id()
            await self.reserve(entered, caller, request_id, images, size, until)
        try:
            yield settle
        finally:
            if not settled:
                self.void(entered)

    @abstractmethod
    def making(self, caller: Caller, charge_id: str, until: float) -> AbstractAsyncContextManager[None]:
        """Note that images of a job are in the making within the block. Raises APIError if the key may not have that.

        Args:
            caller: whose job it is.
            charge_id: the job's id, which was let in before.
            until: when they no longer are, whatever comes.
        """


class OpenAccess(Access):
    """Access for everyone, with nothing charged."""

    async def identify(self, authorization: str | None, scope: str) -> Caller:
        return ANYONE

    async def reserve(
        self, charge_id: str, caller: Caller, request_id: str, images: int, size: str, until: float = 0.0
    ) -> None:
        pass

    async def settle(self, charge_id: str, what: Served, until: float) -> None:
        pass

    def void(self, charge_id: str) -> None:
        pass

    @asynccontextmanager
    async def making(self, caller: Caller, charge_id: str, until: float) -> AsyncGenerator[None]:
        yield


class KeyedAccess(Access):
    """Access for those who have a key; a database that does not answer lets nobody in."""

    def __init__(self, settings: AccessSettings) -> None:
        """Open the database; raises what `AccessStore` raises."""
        self._store = AccessStore(settings.database)
        self._calls = ThreadPoolExecutor(_CALLS, thread_name_prefix="access")
        self._notes: set[asyncio.Task[None]] = set()

    async def identify(self, authorization: str | None, scope: str) -> Caller:
        kind, _, key = (authorization or "").partition(" ")
        presented = Presented.read(key.strip()) if kind.lower() == "bearer" else None
        if presented is None:
            raise _unauthorized("the header must be `Authorization: Bearer KEY`, with a key of this server")
        with _answering():
            try:
                found = await self._call(self._store.find, presented)
            except Revoked:
                raise _unauthorized("there is no such key, or it was revoked") from None
        if scope not in found.scopes:
            raise APIError(403, "insufficient_scope", f"the key is for {', '.join(found.scopes)}, and not for {scope}")
        return Caller(found.id)

    async def reserve(
        self, charge_id: str, caller: Caller, request_id: str, images: int, size: str, until: float = 0.0
    ) -> None:
        charge = partial(
            Charge,
            id=charge_id,
            key_id=caller.key_id,
            request_id=request_id,
            created_at=0.0,  # the store's clock says
            asked_images=images,
            asked_pixels=_pixels(size, images),
            making_until=until,
        )
        with _answering(), _permitting():
            try:
                await self._call(self._store.reserve, charge())
            except (asyncio.CancelledError, SQLAlchemyError, TimeoutError):  # the database may hear it, even later
                self._note(self._store.withdraw, charge())
                raise

    async def settle(self, charge_id: str, what: Served, until: float) -> None:
        while True:
            try:
                with _answering():
                    await self._call(self._store.settle, charge_id, what)
                return
            except APIError:
                if time.time() + _PAUSE_S > until:
                    raise
                await asyncio.sleep(_PAUSE_S)

    def void(self, charge_id: str) -> None:
        self._note(self._store.void, charge_id)

    @asynccontextmanager
    async def making(self, caller: Caller, charge_id: str, until: float) -> AsyncGenerator[None]:
        if caller == ANYONE:  # it was accepted when the API was open
            yield
            return
        begun = self._calls.submit(self._store.begin, charge_id, until)
        try:
            with _answering(), _permitting():
                await self._heard(begun)
            yield
        finally:
            self._note(self._pause, begun, charge_id, until)

    def _pause(self, begun: Future[None], charge_id: str, until: float) -> None:
        """Tell the database that images are no longer in the making, after it heard that they are, however late."""
        if not begun.cancelled():
            wait([begun])
        self._store.pause(charge_id, until)

    def _note(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Tell the database what nobody waits for, in the background and for a while.

        It may be lost with this process: rows that are not settled cost nothing, and end at their deadline.
        """
        if len(self._notes) >= _NOTES:
            logger.error("a note for the database of keys is dropped: too many wait")
            return

        async def tell() -> None:
            for _ in range(_ATTEMPTS):
                try:
                    await self._call(function, *args, **kwargs)
                except (SQLAlchemyError, TimeoutError) as error:
                    logger.warning(f"the database of keys does not answer: {type(error).__name__}")
                    await asyncio.sleep(_PAUSE_S)
                else:
                    return

        task = asyncio.create_task(tell())
        self._notes.add(task)
        task.add_done_callback(self._notes.discard)

    async def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._heard(self._calls.submit(function, *args, **kwargs))

    async def _heard(self, call: Future[T]) -> T:
        """Return what a call to the database does; raises TimeoutError if it does not answer in time."""
        async with asyncio.timeout(_DEADLINE_S):
            return await asyncio.wrap_future(call)


@contextmanager
def _answering() -> Iterator[None]:
    """Turn errors of the database into APIError."""
    try:
        yield
    except (SQLAlchemyError, TimeoutError) as error:
        logger.error("the database of keys does not answer", exc_info=error)
        raise APIError(503, "access_unavailable", "keys cannot be looked up; try again later", headers=RETRY) from error


@contextmanager
def _permitting() -> Iterator[None]:
    """Turn what a key may not have into APIError."""
    try:
        yield
    except Revoked:
        raise _unauthorized("the key was revoked") from None
    except LimitExceeded as error:
        if error.retry_after_s is None:
            raise APIError(400, "above_limit", error.reason) from error
        headers = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
        raise APIError(429, "rate_limit_exceeded", error.reason, headers=headers) from error


def _unauthorized(message: str) -> APIError:
    return APIError(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})
