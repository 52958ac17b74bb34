"""Access over a database that does not always answer."""

from __future__ import annotations

import asyncio
import math
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from fastapi import Request
from fastapi.security import SecurityScopes

from deployments.access import access as module
from deployments.access.access import ANYONE, Access, Caller, KeyedAccess, OpenAccess, served
from deployments.access.caller import identify
from deployments.access.keys import SCOPES, Limits
from deployments.access.settings import AccessSettings
from deployments.access.store import AccessStore, Charge, Served
from deployments.http.errors import APIError

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DEADLINE_S", 0.3)
    monkeypatch.setattr(module, "_PAUSE_S", 0.1)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "access.sqlite3"


@contextmanager
def silent(file: Path) -> Iterator[None]:
    """A database that somebody else has for themselves within the block."""
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")


@contextmanager
def without_keys(file: Path) -> Iterator[None]:
    """A database that cannot be asked for keys within the block."""
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("ALTER TABLE access_keys RENAME TO elsewhere")
        yield
        connection.execute("ALTER TABLE elsewhere RENAME TO access_keys")


def rows(store: AccessStore) -> list[Charge]:
    return [charge for charge, _ in store.ledger(0.0, math.inf)]


async def until_void(store: AccessStore) -> None:
    async with asyncio.timeout(60):
        while True:
            for row in await asyncio.to_thread(rows, store):
                if row.settled_at and (row.images, row.pixels, row.evaluations, row.making_until) == (0, 0, 0.0, 0.0):
                    return
            await asyncio.sleep(0.05)


async def test_a_database_that_does_not_answer_lets_nobody_in(file: Path) -> None:
    access = KeyedAccess(AccessSettings(database=f"sqlite:///{file}"))
    key = access._store.create("shop", SCOPES, Limits())
    header = f"Bearer {key}"
    caller = await access.identify(header, "images")
    with silent(file):
        assert await access.identify(header, "images") == caller  # who reads waits for nobody
        with pytest.raises(APIError, match="keys cannot be looked up"):
            await access.reserve("r", caller, "r", 1, "128x128", time.time() + 60)
    with without_keys(file):
        with pytest.raises(APIError) as refused:
            await access.identify(header, "images")
        assert (refused.value.status, refused.value.code) == (503, "access_unavailable")
    assert await access.identify(header, "images") == caller
    with pytest.raises(APIError, match="not for webhooks"):
        await access.identify(header, "webhooks")
    access._store.close()


async def test_what_was_made_is_charged_as_soon_as_the_database_answers(file: Path) -> None:
    access = KeyedAccess(AccessSettings(database=f"sqlite:///{file}"))
    caller = Caller(access._store.create("shop", SCOPES, Limits()).key_id)
    async with access.charged(caller, "r", 2, "128x64", time.time() + 60) as settle:
        with silent(file):
            settling = asyncio.ensure_future(settle([7.0, 7.5]))
            await asyncio.sleep(0.5)
            assert not settling.done()
        await settling
    (row,) = rows(access._store)
    assert (row.images, row.pixels, row.evaluations) == (2, 2 * 128 * 64, 14.5)
    access._store.close()


async def test_what_cannot_be_charged_is_not_served_and_costs_nothing(file: Path) -> None:
    access = KeyedAccess(AccessSettings(database=f"sqlite:///{file}"))
    caller = Caller(access._store.create("shop", SCOPES, Limits()).key_id)

    async def serve() -> None:
        async with access.charged(caller, "r", 1, "128x128", time.time() + 0.2) as settle:
            with silent(file):
                await settle([7.0])

    with pytest.raises(APIError, match="try again later"):
        await serve()
    await until_void(access._store)
    access._store.close()


@pytest.mark.parametrize("error", [asyncio.CancelledError, ValueError])
async def test_what_is_cancelled_or_fails_costs_nothing(file: Path, error: type[BaseException]) -> None:
    access = KeyedAccess(AccessSettings(database=f"sqlite:///{file}"))
    caller = Caller(access._store.create("shop", SCOPES, Limits(concurrent_images=1)).key_id)

    async def fail() -> None:
        async with access.charged(caller, "r", 1, "128x128", time.time() + 600):
            (row,) = rows(access._store)
            assert (row.settled_at, row.request_id, row.asked_images) == (None, "r", 1)
            raise error

    with pytest.raises(error):
        await fail()
    await until_void(access._store)
    async with access.charged(caller, "r", 1, "128x128", time.time() + 600):
        pass
    access._store.close()


async def test_a_request_that_the_database_hears_too_late_costs_nothing(file: Path) -> None:
    access = KeyedAccess(AccessSettings(database=f"sqlite:///{file}"))
    caller = Caller(access._store.create("shop", SCOPES, Limits(concurrent_images=1)).key_id)
    with silent(file), pytest.raises(APIError, match="try again later"):  # a call waits for seconds more
        await access.reserve("r", caller, "r", 1, "128x128", time.time() + 600)
    await until_void(access._store)
    await asyncio.to_thread(access._calls.shutdown)  # the call ends, too
    (row,) = rows(access._store)
    assert (row.settled_at is None, row.making_until) == (False, 0.0)
    access._store.close()


async def test_a_job_that_the_database_hears_of_too_late_is_not_in_the_making(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = KeyedAccess(AccessSettings(database=f"sqlite:///{file}"))
    caller = Caller(access._store.create("shop", SCOPES, Limits(concurrent_images=1)).key_id)
    await access.reserve("imgjob_1", caller, "r", 1, "128x128")
    begin = access._store.begin

    def late(charge_id: str, until: float) -> None:
        time.sleep(1.0)
        begin(charge_id, until)

    monkeypatch.setattr(access._store, "begin", late)
    with pytest.raises(APIError, match="try again later"):
        async with access.making(caller, "imgjob_1", time.time() + 600):
            pass
    await asyncio.gather(*access._notes)
    await asyncio.to_thread(access._calls.shutdown)
    (row,) = rows(access._store)
    assert (row.settled_at, row.making_until) == (None, 0.0)
    access._store.close()


async def test_a_request_that_comes_again_counts_once(file: Path) -> None:
    access = KeyedAccess(AccessSettings(database=f"sqlite:///{file}"))
    caller = Caller(access._store.create("shop", SCOPES, Limits(concurrent_images=1)).key_id)
    await access.reserve("imgreq_1", caller, "r", 1, "128x128", time.time() + 600)  # its replica dies
    async with access.charged(caller, "r", 1, "128x128", time.time() + 600, "imgreq_1") as settle:
        await settle([7.0])
    async with access.charged(caller, "r", 1, "128x128", time.time() + 600, "imgreq_1") as settle:
        await settle([7.0])
    assert [(row.id == "imgreq_1", row.images) for row in rows(access._store)] == [(True, 1), (False, 1)]
    access._store.close()


async def test_notes_that_wait_for_the_database_are_bounded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NOTES", 2)
    access = KeyedAccess(AccessSettings(database=f"sqlite:///{file}"))
    for _ in range(3):
        access.void("r")
    assert len(access._notes) == 2
    await asyncio.gather(*access._notes)
    access._store.close()


async def test_a_job_from_when_the_api_was_open_is_made(file: Path) -> None:
    access = KeyedAccess(AccessSettings(database=f"sqlite:///{file}"))
    async with access.making(ANYONE, "imgjob_1", time.time() + 60):
        pass
    with pytest.raises(APIError) as refused:
        async with access.making(Caller("0" * 12), "imgjob_1", time.time() + 60):
            pass
    assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")
    access._store.close()


async def test_two_headers_are_no_key(file: Path) -> None:
    access = KeyedAccess(AccessSettings(database=f"sqlite:///{file}"))
    keys = [f"Bearer {access._store.create(name, SCOPES, Limits())}".encode() for name in ("shop", "rival")]

    async def let_in(*headers: bytes) -> Caller:
        scope = {"type": "http", "headers": [(b"authorization", header) for header in headers]}
        return await identify(SecurityScopes(["images"]), Request(scope), access, None)

    assert await let_in(keys[0], keys[0]) == await let_in(keys[0])
    for headers in (keys, []):
        with pytest.raises(APIError) as refused:
            await let_in(*headers)
        assert refused.value.status == 401
    access._store.close()


async def test_an_open_api_asks_for_nothing() -> None:
    access = OpenAccess()
    caller = await access.identify(None, "images")
    assert caller == ANYONE
    async with access.charged(caller, "r", 1, "128x128", 0.0) as settle:
        await settle([7.0])


def test_access_that_forgets_a_method_lets_nobody_in() -> None:
    class Forgetful(Access):
        async def identify(self, authorization: str | None, scope: str) -> Caller:
            return ANYONE

    with pytest.raises(TypeError, match="reserve"):
        Forgetful()  # type: ignore[abstract]


def test_served_is_what_the_answer_says() -> None:
    assert served("128x64", [7.0, 7.5]) == Served(2, 2 * 128 * 64, 14.5)
