"""The database of keys and of the ledger, in SQLite and in a real PostgreSQL."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from clock import Clock
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import IntegrityError

from deployments.access.keys import SCOPES, Limits, Presented, new_charge_id
from deployments.access.store import (
    AccessStore,
    Charge,
    ChargeEnded,
    LimitExceeded,
    NameTaken,
    Revoked,
    Served,
)
from deployments.database import OldTables

MEGAPIXEL = 1_000_000
Open = Callable[[], AccessStore]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def opened(database: str, clock: Clock) -> Iterator[Open]:
    """Opens the database as another process would."""
    with ExitStack() as stack:

        def open_store() -> AccessStore:
            store = AccessStore(database, clock)
            stack.callback(store.close)
            return store

        yield open_store


@pytest.fixture
def store(opened: Open) -> AccessStore:
    return opened()


def make(store: AccessStore, name: str = "shop", **limits: float) -> str:
    """Make a key; return its id."""
    return store.create(name, SCOPES, Limits(**limits)).key_id  # type: ignore[arg-type]


def entry(key_id: str, images: int = 1, pixels: int = MEGAPIXEL, until: float = 0.0, charge_id: str = "") -> Charge:
    return Charge(
        id=charge_id or new_charge_id(),
        key_id=key_id,
        request_id="r",
        created_at=0.0,
        asked_images=images,
        asked_pixels=pixels * images,
        making_until=until,
    )


def reserve(store: AccessStore, key_id: str, images: int = 1, pixels: int = MEGAPIXEL, until: float = 0.0) -> str:
    charge = entry(key_id, images, pixels, until)
    store.reserve(charge)
    return charge.id


def refusal(store: AccessStore, key_id: str, images: int = 1, until: float = 0.0) -> tuple[str, float | None]:
    with pytest.raises(LimitExceeded) as refused:
        reserve(store, key_id, images, until=until)
    return refused.value.reason, refused.value.retry_after_s


def sums(store: AccessStore) -> dict[str, tuple[int, int, float]]:
    """Images, pixels and evaluations of each key, as the ledger's rows add up."""
    total: dict[str, tuple[int, int, float]] = {}
    for charge, name in store.ledger(0.0, math.inf):
        images, pixels, evaluations = total.get(name, (0, 0, 0.0))
        total[name] = (images + charge.images, pixels + charge.pixels, evaluations + charge.evaluations)
    return total


def test_a_key_is_found_by_its_secret_alone(store: AccessStore, opened: Open) -> None:
    key = store.create("shop", ["images"], Limits(5, 2.5, 3))
    shown = str(key)
    assert Presented.read(shown) == key
    found = opened().find(key)
    assert (found.name, found.scopes) == ("shop", ["images"])
    assert (found.requests_per_minute, found.megapixels_per_minute, found.concurrent_images) == (5, 2.5, 3)
    assert key.secret not in repr(vars(found))
    other = Presented.draw()
    for wrong in (Presented(key.key_id, other.secret), Presented(other.key_id, key.secret), other):
        with pytest.raises(Revoked):
            store.find(wrong)
    for text_ in ("", "sk-", shown[:-1], f"{shown}a", shown.upper(), shown.removeprefix("sk-"), f" {shown}"):
        assert Presented.read(text_) is None


def test_the_database_has_no_secret(store: AccessStore, database: str) -> None:
    key = store.create("shop", SCOPES, Limits())
    parsed = make_url(database)
    engine = create_engine(parsed if "sqlite" in database else parsed.set(drivername="postgresql+psycopg"))
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT * FROM access_keys")).all()
    engine.dispose()
    assert key.digest in str(rows)
    assert key.secret not in str(rows)


def test_an_unknown_key_is_compared_as_one_with_a_wrong_secret(
    store: AccessStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str | None] = []
    matches = Presented.matches

    def observed(presented: Presented, digest: str | None) -> bool:
        compared.append(digest)
        return matches(presented, digest)

    monkeypatch.setattr(Presented, "matches", observed)
    with pytest.raises(Revoked):
        store.find(Presented.draw())
    assert compared == [None]
    assert not Presented("0" * 12, "").matches("0" * 64)


def test_a_revoked_key_is_refused_at_once_elsewhere(store: AccessStore, opened: Open) -> None:
    key = store.create("shop", SCOPES, Limits())
    elsewhere = opened()
    charge = reserve(elsewhere, key.key_id)
    assert elsewhere.find(key)
    assert store.revoke("shop")
    assert not store.revoke("shop")
    assert not store.revoke("nobody")
    for use in (
        lambda: elsewhere.find(key),
        lambda: reserve(elsewhere, key.key_id),
        lambda: elsewhere.begin(charge, 2e9),
        lambda: elsewhere.begin("imgjob_unknown", 2e9),
    ):
        with pytest.raises(Revoked):
            use()
    with pytest.raises(NameTaken):
        store.create("shop", SCOPES, Limits())
    assert [(each.name, each.revoked_at is None) for each in store.all_keys()] == [("shop", False)]


def test_requests_are_counted_over_any_minute(store: AccessStore, opened: Open, clock: Clock) -> None:
    key, free = make(store, requests_per_minute=3), make(store, "free")
    for seconds in (0, 10, 10):
        clock.now += seconds
        store.void(reserve(opened(), key))  # refused or not, it was a request
    clock.now += 1
    assert refusal(store, key) == ("the key may make 3 requests a minute", 39.0)
    for _ in range(5):
        reserve(store, free)
    clock.now += 38.9
    assert refusal(store, key)[1] == pytest.approx(0.1, abs=1e-3)
    clock.now += 0.2
    reserve(store, key)
    assert refusal(store, key)[1] == pytest.approx(9.9, abs=1e-3)


def test_megapixels_are_those_asked_for_until_it_is_known_what_was_served(store: AccessStore, clock: Clock) -> None:
    key = make(store, megapixels_per_minute=4.0)
    first = reserve(store, key, images=3)
    clock.now += 5
    second = reserve(store, key)
    assert refusal(store, key) == ("the key may have 4 megapixels a minute", 55.0)
    store.void(second)
    third = reserve(store, key)
    store.settle(first, Served(1, MEGAPIXEL, 7.0))
    reserve(store, key, images=2)
    assert refusal(store, key, images=3) == ("the key may have 4 megapixels a minute", 60.0)
    assert refusal(store, key, images=5) == ("the key may have 4 megapixels a minute, and the request asks for 5", None)
    store.settle(third, Served(1, MEGAPIXEL, 7.0))
    assert sums(store) == {"shop": (2, 2 * MEGAPIXEL, 14.0)}


def test_images_in_the_making_are_bounded_until_their_deadline(store: AccessStore, opened: Open, clock: Clock) -> None:
    key = make(store, concurrent_images=3)
    first = reserve(store, key, images=2, until=clock.now + 30)
    assert refusal(store, key, images=2, until=clock.now + 30) == ("the key may have 3 images at once", 1.0)
    assert refusal(store, key, images=4)[1] is None
    job = reserve(store, key, images=2)  # waits
    with pytest.raises(LimitExceeded):
        opened().begin(job, clock.now + 60)
    store.settle(first, Served(2, 2 * MEGAPIXEL, 14.0))
    opened().begin(job, clock.now + 60)
    opened().begin(job, clock.now + 61)  # taken over
    assert refusal(store, key, images=2, until=clock.now + 30)[1] == 1.0
    store.pause(job, clock.now + 60)  # says a worker that lost it
    assert refusal(store, key, images=2, until=clock.now + 30)[1] == 1.0
    store.pause(job, clock.now + 61)
    lost = reserve(store, key, images=3, until=clock.now + 30)  # whose replica dies
    clock.now += 29
    assert refusal(store, key, until=clock.now + 30)[1] == 1.0
    clock.now += 1
    reserve(store, key, until=clock.now + 30)
    (row,) = [charge for charge, _ in store.ledger(0.0, math.inf) if charge.id == lost]
    assert (row.settled_at, row.images, row.pixels) == (None, 0, 0)


def test_what_is_void_stays_void_and_is_charged_once(store: AccessStore) -> None:
    key, served = make(store), Served(2, 2 * MEGAPIXEL, 14.5)
    twice, cancelled, late = (reserve(store, key, images=2) for _ in range(3))
    store.settle(twice, served)
    store.settle(twice, Served(1, 1, 1.0))
    store.settle(cancelled, served)
    store.void(cancelled)
    store.void(late)
    store.settle(late, served)
    assert sums(store) == {"shop": (2, 2 * MEGAPIXEL, 14.5)}


def test_a_request_that_comes_again_counts_once(store: AccessStore, opened: Open, clock: Clock) -> None:
    key = make(store, requests_per_minute=1, megapixels_per_minute=1.0, concurrent_images=1)
    lost = reserve(store, key, until=clock.now + 30)
    clock.now += 10
    opened().reserve(entry(key, until=clock.now + 30, charge_id=lost))
    assert refusal(store, key) == ("the key may make 1 request a minute", 50.0)
    clock.now += 29.5  # the first attempt's row would have ended
    assert refusal(opened(), key, until=clock.now + 30)
    store.settle(lost, Served(1, MEGAPIXEL, 7.0))
    assert sums(store) == {"shop": (1, MEGAPIXEL, 7.0)}
    with pytest.raises(ChargeEnded):
        store.reserve(entry(key, charge_id=lost))


def test_another_keys_charge_is_not_taken_over(store: AccessStore, clock: Clock) -> None:
    key, other = make(store), make(store, "other")
    charge = reserve(store, key, until=clock.now + 30)
    with pytest.raises(ChargeEnded):
        store.reserve(entry(other, charge_id=charge))
    ((row, name),) = store.ledger(0.0, math.inf)
    assert (row.id, name, row.settled_at) == (charge, "shop", None)


def test_what_is_withdrawn_is_void_and_enters_no_more(store: AccessStore, opened: Open, clock: Clock) -> None:
    key = make(store, concurrent_images=1)
    there = reserve(store, key, until=clock.now + 30)
    store.withdraw(entry(key, until=clock.now + 30, charge_id=there))
    late = entry(key, until=clock.now + 30)
    store.withdraw(entry(key, until=clock.now + 30, charge_id=late.id))
    with pytest.raises(ChargeEnded):
        opened().reserve(late)
    reserve(store, key, until=clock.now + 30)
    rows = {row.id: row for row, _ in store.ledger(0.0, math.inf)}
    for void in (there, late.id):
        assert (rows[void].settled_at, rows[void].making_until, rows[void].images) == (clock.now, 0.0, 0)


def test_a_withdrawal_waits_for_what_it_withdraws(store: AccessStore, opened: Open, clock: Clock) -> None:
    key = make(store)
    with ThreadPoolExecutor(8) as threads:
        for _ in range(10):
            charge = entry(key, until=clock.now + 30)
            again = entry(key, until=clock.now + 30, charge_id=charge.id)
            entering, withdrawing = threads.submit(store.reserve, charge), threads.submit(opened().withdraw, again)
            assert isinstance(entering.exception(), ChargeEnded | IntegrityError | None)
            if isinstance(withdrawing.exception(), IntegrityError):
                store.withdraw(entry(key, charge_id=charge.id))
    assert all(row.settled_at for row, _ in store.ledger(0.0, math.inf))


def test_limits_hold_among_replicas_that_ask_at_once(store: AccessStore, opened: Open, clock: Clock) -> None:
    key = make(store, requests_per_minute=20, megapixels_per_minute=17.0, concurrent_images=11)
    stores = [store, *(opened() for _ in range(3))]

    def attempt(number: int) -> bool:
        try:
            reserve(stores[number % 4], key, until=clock.now + 30)
        except LimitExceeded:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(attempt, range(60))) == 11
    for charge, _ in list(store.ledger(0.0, math.inf)):
        store.settle(charge.id, Served(1, MEGAPIXEL, 7.0))
    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(attempt, range(60))) == 17 - 11
    assert sums(store)["shop"][0] == 11


def test_the_ledger_is_read_in_pages_and_between_times(
    store: AccessStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.access.store._PAGE", 2)
    key = make(store)
    charges = []
    for seconds in (0, 0, 0, 1, 1):
        clock.now += seconds
        charges.append(reserve(store, key))
    assert {charge.id for charge, _ in store.ledger(0.0, math.inf)} == set(charges)
    assert [charge.id for charge, _ in store.ledger(clock.now - 1, clock.now)] == [charges[3]]
    assert len(list(store.ledger(0.0, clock.now - 1))) == 3


def test_rows_are_pruned_that_ended_long_ago(store: AccessStore, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.access.store._PAGE", 2)
    key = make(store, requests_per_minute=2)
    served, void, _, made, waits = (
        reserve(store, make(store, name), until=clock.now + until)
        for name, until in (("a", 9), ("b", 9), ("c", 9), ("d", 900), ("e", -clock.now))
    )
    store.settle(served, Served(1, MEGAPIXEL, 7.0))
    store.void(void)
    clock.now += 100.0
    recent = reserve(store, key)
    store.void(recent)
    assert store.prune(clock.now - 100.0) == 0
    assert store.prune(clock.now + 1.0) == 3
    assert {charge.id for charge, _ in store.ledger(0.0, math.inf)} == {waits, made, recent}
    reserve(store, key)
    refusal(store, key)


def test_tables_of_another_version_are_refused(database: str) -> None:
    AccessStore(database).close()
    parsed = make_url(database)
    engine = create_engine(parsed if "sqlite" in database else parsed.set(drivername="postgresql+psycopg"))
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE access_keys DROP COLUMN scopes"))
    engine.dispose()
    with pytest.raises(OldTables, match="table access_keys has no column scopes: another version"):
        AccessStore(database)
