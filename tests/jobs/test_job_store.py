"""The store of jobs, in SQLite and in a real PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from clock import Clock
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import SQLAlchemyError
from standing import PROMPT, new_job

from deployments.database import OldTables
from deployments.jobs.store import ImageJob, KeyReused, QueueFull, Store

LEASE_S, KEEP_S, ATTEMPTS = 30.0, 100.0, 3
STAGES = [{"stage": "base", "steps": 2, "done": 1}]

Open = Callable[[], Store]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def opened(database: str, clock: Clock) -> Iterator[Open]:
    """Opens the store as another process would."""
    with ExitStack() as stack:

        def open_store() -> Store:
            store = Store(database, clock)
            stack.callback(store.close)
            return store

        yield open_store


@pytest.fixture
def store(opened: Open) -> Store:
    return opened()


def add(store: Store, **fields: object) -> ImageJob:
    return store.create(new_job(**fields), 1000)


def claim(store: Store, owner: str = "a") -> ImageJob | None:
    return store.claim(owner, LEASE_S, ATTEMPTS)


def claimed(store: Store, owner: str = "a") -> ImageJob:
    job = claim(store, owner)
    assert job
    return job


def got(store: Store, job_id: str) -> ImageJob:
    job = store.get(job_id)
    assert job
    return job


def test_a_job_is_the_same_after_the_store_is_opened_again(opened: Open) -> None:
    first = opened()
    job = first.create(new_job(webhook_url="http://x/", idempotency_key="k"), 1)
    first.close()
    again = got(opened(), job.id)
    assert (again.request, again.status, again.idempotency_key) == (job.request, "queued", "k")
    assert claimed(opened()).id == job.id


def test_two_workers_never_claim_one_job(opened: Open) -> None:
    stores = [opened() for _ in range(4)]
    jobs = {add(stores[0], created_at=float(number)).id for number in range(40)}

    def claim_all(number: int) -> list[str]:
        found = []
        while job := claim(stores[number], str(number)):
            found.append(job.id)
        return found

    with ThreadPoolExecutor(len(stores)) as threads:
        found = [job_id for each in threads.map(claim_all, range(len(stores))) for job_id in each]
    assert len(found) == len(jobs)
    assert set(found) == jobs


def test_the_oldest_job_is_claimed_first(store: Store) -> None:
    jobs = [add(store, created_at=float(at)).id for at in (3, 1, 2)]
    assert [claimed(store).id for _ in jobs] == [jobs[1], jobs[2], jobs[0]]


def test_a_job_whose_lease_ended_is_taken_over_and_what_its_owner_says_counts_no_more(
    store: Store, clock: Clock
) -> None:
    job = add(store)
    assert claimed(store, "dead").attempts == 1
    clock.now += LEASE_S - 1
    assert claim(store, "next") is None
    clock.now += 1
    assert claimed(store, "next").attempts == 2
    assert not store.renew(job.id, "dead", LEASE_S, 50, STAGES)
    assert not store.complete(job.id, "dead", {"of": "dead"}, [], KEEP_S)
    assert not store.fail(job.id, "dead", "code", "message", KEEP_S)
    assert not store.release(job.id, "dead", 0.0, counted=True)
    assert store.complete(job.id, "next", {"of": "next"}, STAGES, KEEP_S)
    assert not store.complete(job.id, "next", {"of": "twice"}, [], KEEP_S)
    done = got(store, job.id)
    assert (done.status, done.result, done.progress, done.stages) == ("completed", {"of": "next"}, 100, STAGES)
    assert (done.completed_at, done.expires_at) == (clock.now, clock.now + KEEP_S)
    assert claim(store) is None


def test_a_lease_that_is_renewed_does_not_end(store: Store, clock: Clock) -> None:
    job = add(store)
    claimed(store)
    for progress in (10, 20, 30):
        clock.now += LEASE_S - 1
        assert store.renew(job.id, "a", LEASE_S, progress, STAGES)
        assert claim(store, "b") is None
    now = got(store, job.id)
    assert (now.status, now.progress, now.stages) == ("in_progress", 30, STAGES)


def test_jobs_that_are_given_back_are_there_at_once_and_the_attempt_does_not_count(store: Store) -> None:
    jobs = [add(store).id for _ in range(2)]
    assert {claimed(store).id, claimed(store).id} == set(jobs)
    store.release_all("b")
    assert claim(store, "b") is None
    store.release_all("a")
    assert [got(store, job_id).status for job_id in jobs] == ["queued", "queued"]
    assert claimed(store, "b").attempts == 1


def test_a_job_that_is_to_be_tried_again_waits_and_the_attempt_counts_if_it_is_to(store: Store, clock: Clock) -> None:
    job = add(store)
    claimed(store)
    assert store.release(job.id, "a", 5.0, counted=True)
    assert claim(store) is None
    clock.now += 5
    assert claimed(store).attempts == 2
    assert store.release(job.id, "a", 0.0, counted=False)
    assert claimed(store).attempts == 2


def test_a_job_that_was_lost_at_each_attempt_fails(store: Store, clock: Clock) -> None:
    job = add(store, webhook_url="http://x/")
    for _ in range(ATTEMPTS):
        assert store.fail_lost(ATTEMPTS, "lost", "was lost", KEEP_S) == []
        claimed(store)
        clock.now += LEASE_S
    assert claim(store) is None
    assert store.fail_lost(ATTEMPTS, "lost", "was lost", KEEP_S) == [job.id]
    failed = got(store, job.id)
    assert (failed.status, failed.error_code, failed.webhook_due) == ("failed", "lost", clock.now)


def test_one_key_makes_one_job(store: Store) -> None:
    job = add(store, idempotency_key="k")
    assert add(store, idempotency_key="k").id == job.id
    with pytest.raises(KeyReused):
        add(store, idempotency_key="k", request_hash="other")
    assert add(store, idempotency_key="l").id != job.id
    assert store.create(new_job(idempotency_key="k"), 1).id == job.id  # even if there may be no more jobs


def test_one_key_makes_one_job_of_requests_at_the_same_time(opened: Open) -> None:
    stores = [opened() for _ in range(8)]
    with ThreadPoolExecutor(len(stores)) as threads:
        ids = set(threads.map(lambda store: add(store, idempotency_key="k").id, stores))
    assert len(ids) == 1
    assert len(stores[0].page("", 10, None, ascending=True)) == 1


def test_there_are_no_more_jobs_than_there_may_be(store: Store) -> None:
    jobs = [store.create(new_job(), 2).id for _ in range(2)]
    with pytest.raises(QueueFull):
        store.create(new_job(), 2)
    store.cancel(jobs[0], KEEP_S)
    store.create(new_job(), 2)


def test_pages_follow_each_other_in_both_orders(store: Store) -> None:
    ids = [add(store, id=f"job_{number}", created_at=float(number // 2)).id for number in range(5)]
    for ascending, order in ((True, ids), (False, ids[::-1])):
        first = store.page("", 2, None, ascending=ascending)
        second = store.page("", 2, first[-1], ascending=ascending)
        third = store.page("", 2, second[-1], ascending=ascending)
        assert [job.id for job in (*first, *second, *third)] == order


def test_a_cancelled_job_is_no_longer_its_owners(store: Store) -> None:
    job = add(store)
    claimed(store)
    cancelled = store.cancel(job.id, KEEP_S)
    assert cancelled
    assert cancelled.status == "cancelled"
    assert not store.renew(job.id, "a", LEASE_S, 50, STAGES)
    assert not store.complete(job.id, "a", {}, [], KEEP_S)
    again = store.cancel(job.id, KEEP_S)
    assert again
    assert again.completed_at == cancelled.completed_at
    assert store.cancel("none", KEEP_S) is None


def test_jobs_are_kept_until_they_expire(store: Store, clock: Clock) -> None:
    job, unfinished = add(store).id, add(store).id
    store.cancel(job, KEEP_S)
    clock.now += KEEP_S - 1
    assert store.expired(10) == []
    clock.now += 1
    assert store.expired(10) == [job]
    store.delete(job)
    store.delete(unfinished)
    assert store.get(job) is None
    assert store.get(unfinished)


def test_a_webhook_is_due_again_until_it_was_delivered_or_tried_enough(store: Store, clock: Clock) -> None:
    def due() -> ImageJob | None:
        return store.claim_webhook(lambda attempts: 10.0 * attempts, 3)

    heard, unheard = (add(store, webhook_url="http://x/", created_at=float(at)).id for at in range(2))
    add(store)
    assert due() is None
    for _ in range(3):
        job = claimed(store)
        assert store.complete(job.id, "a", {}, [], KEEP_S)
    assert {job.id for job in (due(), due()) if job} == {heard, unheard}
    store.note_delivered(heard)
    assert due() is None
    clock.now += 10
    second = due()
    assert second
    assert (second.id, second.webhook_attempts) == (unheard, 2)
    clock.now += 20
    assert due()
    clock.now += 1000
    assert due() is None
    assert got(store, heard).webhook_delivered_at == clock.now - 1030
    assert got(store, unheard).webhook_delivered_at is None


def test_all_who_use_a_store_share_its_keys(opened: Open) -> None:
    stores = [opened() for _ in range(4)]
    with ThreadPoolExecutor(len(stores)) as threads:
        keys = set(threads.map(lambda store: store.key("links"), stores))
    assert len(keys) == 1
    assert stores[0].key("other") not in keys


def test_errors_do_not_tell_prompts(store: Store) -> None:
    job = add(store)
    with pytest.raises(SQLAlchemyError) as caught:
        store.create(new_job(id=job.id), 10)
    assert "INSERT" in str(caught.value)
    assert PROMPT not in str(caught.value)


def test_keys_take_turns_and_have_idempotency_keys_of_their_own(store: Store, clock: Clock) -> None:
    many = [add(store, key_id="a", created_at=float(at)).id for at in range(4)]
    few = [add(store, key_id="b", created_at=10.0, idempotency_key="k").id]
    few.append(add(store, key_id="b", created_at=11.0).id)
    others = add(store, key_id="a", created_at=20.0, idempotency_key="k").id
    assert others not in few
    claimed = [claim(store) for _ in range(5)]
    assert [job.id for job in claimed if job] == [many[0], few[0], many[1], few[1], many[2]]
    store.pause("a", 5.0)
    assert claim(store) is None
    clock.now += 5.0
    assert [job.id for job in (claim(store), claim(store)) if job and job.key_id == "a"] == [many[3], others]
    assert {job.id for job in store.page("b", 10, None, ascending=True)} == set(few)
    assert not store.page("", 10, None, ascending=True)


def test_a_store_from_before_keys_is_refused(database: str) -> None:
    parsed = make_url(database)
    engine = create_engine(parsed if "sqlite" in database else parsed.set(drivername="postgresql+psycopg"))
    if parsed.database and "sqlite" in database:
        Path(parsed.database).parent.mkdir()
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE image_jobs (id VARCHAR PRIMARY KEY, created_at FLOAT)"))
    engine.dispose()
    with pytest.raises(OldTables, match=r"image_jobs has no column .*: another version of the server made it"):
        Store(database)
