"""The routes of jobs over a real store, files, worker and webhooks; what makes the images stands in for stages."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import math
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI
from openai.types import Video
from standing import PROMPT, Deployments

from deployments.access.access import Access, KeyedAccess, OpenAccess
from deployments.access.caller import access_here
from deployments.access.keys import SCOPES, Limits
from deployments.access.settings import AccessSettings
from deployments.access.store import AccessStore, Charge
from deployments.http import ingress, readiness
from deployments.http.errors import APIError
from deployments.http.moderation import Moderation
from deployments.http.resolve import Offer, resolve
from deployments.http.schemas import ImagesRequest
from deployments.jobs import worker
from deployments.jobs.jobs import Jobs
from deployments.jobs.routes import jobs_here, max_body_bytes, router
from deployments.jobs.settings import JobsSettings
from deployments.moderation import ModerationSettings
from deployments.settings import SERVED_STAGES, ServedStage
from stages.config import ModelConfig

pytestmark = pytest.mark.anyio

BODY = {"prompt": PROMPT, "n": 2}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waits, and without a cluster that may drain."""
    for name in ("_POLL_S", "_BEAT_S", "_PAUSE_S"):
        monkeypatch.setattr(worker, name, 0.02)
    monkeypatch.setattr(readiness, "hold", lambda: None)
    monkeypatch.setattr(readiness, "let_go", lambda: None)
    monkeypatch.setattr(readiness, "is_draining", lambda: False)


@pytest.fixture
def offer(config: ModelConfig) -> Offer:
    pools: dict[ServedStage, tuple[str, ...]] = dict.fromkeys(SERVED_STAGES, ("cpu",))
    return Offer(config, blocks=6, default_plan="hybrid", max_images=10, max_timeout_s=120.0, pools=pools)


@pytest.fixture
def deployments() -> Deployments:
    return Deployments()


Served = Callable[..., Any]


@pytest.fixture
def served(offer: Offer, deployments: Deployments, tmp_path: Path) -> Served:
    """Serves the routes within a `with` block, as a replica of Ingress; several may, over one store."""

    @asynccontextmanager
    async def serve(access: Access | None = None, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
        access, moderation = access or OpenAccess(), Moderation(ModerationSettings())
        jobs = Jobs(JobsSettings(directory=tmp_path, **settings), offer, deployments.make, access, moderation)
        app = FastAPI()
        app.exception_handlers = ingress.app.exception_handlers
        app.include_router(router)
        app.dependency_overrides = {
            access_here: lambda: access, jobs_here: lambda: jobs, max_body_bytes: lambda: 2000
        }  # fmt: skip
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here/v1/images/", timeout=60) as client:
            yield client
        jobs.check_health()
        await jobs.stop()

    return serve


async def create(
    client: httpx.AsyncClient, body: dict[str, Any] | None = None, key: str | None = None
) -> dict[str, Any]:
    headers = {"Idempotency-Key": key} if key else {}
    answer = await client.post("jobs", json=body or BODY, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def ended(client: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while True:
            job = (await client.get(f"jobs/{job_id}")).json()
            if job["status"] not in ("queued", "in_progress"):
                return job
            await asyncio.sleep(0.02)


def refused(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    return answer.json()["error"]


async def test_a_job_is_accepted_made_and_fetched(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with served() as client:
        job = await create(client)
        assert set(Video.model_fields) - {"prompt", "remixed_from_video_id", "seconds"} <= set(job)
        assert (job["status"], job["progress"], job["object"]) == ("queued", 0, "image.job")
        assert (job["model"], job["size"], job["n"], job["plan"]) == ("scenes", "128x128", 2, "hybrid")
        done = await ended(client, job["id"])
        assert (done["status"], done["progress"], done["error"]) == ("completed", 100, None)
        assert done["completed_at"] >= done["created_at"]
        assert done["expires_at"] == pytest.approx(done["completed_at"] + 86400, abs=1)
        assert [(stage["stage"], stage["steps"]) for stage in done["stages"]] == [
            ("encode", 2), ("base", 8), ("bridge", 2), ("distilled", 2), ("decode", 2)
        ]  # fmt: skip
        assert all(stage["steps"] == stage["done"] for stage in done["stages"])
        result = (await client.get(f"jobs/{job['id']}/result")).json()
        seeds = [job["seed"], job["seed"] + 1]
        assert [image["seed"] for image in result["data"]] == seeds
        assert [base64.b64decode(image["b64_json"]) for image in result["data"]] == [
            f"128x128 of seed {seed}".encode() for seed in seeds
        ]
        assert (result["plan"], result["output_format"], result["usage"]["output_tokens"]) == ("hybrid", "png", 128)
    assert PROMPT not in caplog.text
    assert job["id"] in caplog.text


async def test_links_lead_to_the_images(served: Served) -> None:
    async with served(public_url="https://images.example/api/", links_s=60) as client:
        job = await create(client, {**BODY, "response_format": "url", "output_format": "webp"})
        await ended(client, job["id"])
        result = (await client.get(f"jobs/{job['id']}/result")).json()
        assert 0 < result["expires_at"] - time.time() <= 60
        for image in result["data"]:
            assert "b64_json" not in image
            prefix, _, token = image["url"].rpartition("/")
            assert prefix == "https://images.example/api/v1/images/files"
            answer = await client.get(f"files/{token}")
            assert answer.content == f"128x128 of seed {image['seed']}".encode()
            assert answer.headers["content-type"] == "image/webp"
            refused(await client.get(f"files/{token[:-2]}"), 403, "invalid_link")
        assert (await client.delete(f"jobs/{job['id']}")).json()["deleted"]
        refused(await client.get(f"files/{token}"), 404, "image_not_found")


async def test_links_begin_as_the_request_did(served: Served) -> None:
    async with served() as client:
        job = await create(client, {"prompt": PROMPT, "response_format": "url"})
        await ended(client, job["id"])
        (image,) = (await client.get(f"jobs/{job['id']}/result")).json()["data"]
        assert image["url"].startswith("http://here/v1/images/files/")
        assert (await client.get(image["url"])).status_code == 200


async def test_the_same_key_and_body_are_the_same_job(served: Served, deployments: Deployments) -> None:
    async with served() as client, served() as other:
        key = {"Idempotency-Key": "order-7"}
        jobs = await asyncio.gather(*(create(each, key="order-7") for each in (client, other) * 4))
        assert len({job["id"] for job in jobs}) == 1
        await ended(client, jobs[0]["id"])
        spelled = '{"n":2,"size":null,  "prompt":' + json.dumps(PROMPT) + "}"
        headers = {**key, "Content-Type": "application/json"}
        assert (await other.post("jobs", content=spelled, headers=headers)).json()["id"] == jobs[0]["id"]
        refused(await other.post("jobs", json={**BODY, "n": 1}, headers=key), 409, "idempotency_key_reused")
        assert deployments.began == [jobs[0]["id"]]


@pytest.fixture
def charged(tmp_path: Path) -> Callable[[], list[Charge]]:
    """Returns rows of the ledger of the database that `keyed` makes."""

    def read() -> list[Charge]:
        store = AccessStore(f"sqlite:///{tmp_path}/access.sqlite3")
        rows = [charge for charge, _ in store.ledger(0.0, math.inf)]
        store.close()
        return rows

    return read


def keyed(directory: Path, limits: Limits) -> tuple[KeyedAccess, dict[str, str]]:
    """Make an access that one key has; return it, and the header with the key."""
    url = f"sqlite:///{directory}/access.sqlite3"
    store = AccessStore(url)
    key = store.create("shop", SCOPES, limits)
    store.close()
    return KeyedAccess(AccessSettings(database=url)), {"Authorization": f"Bearer {key}"}


async def test_a_job_that_is_asked_for_again_is_no_request(
    served: Served, tmp_path: Path, charged: Callable[[], list[Charge]]
) -> None:
    access, header = keyed(tmp_path, Limits(requests_per_minute=1))
    async with served(access) as client:
        client.headers.update(header)
        job = await create(client, key="order-7")
        assert (await create(client, key="order-7"))["id"] == job["id"]
        answer = await client.post("jobs", json={**BODY, "n": 1}, headers={"Idempotency-Key": "order-7"})
        refused(answer, 409, "idempotency_key_reused")
        refused(await client.post("jobs", json=BODY), 429, "rate_limit_exceeded")
        await ended(client, job["id"])
    assert [row.id for row in charged()] == [job["id"]]


async def test_a_job_that_cannot_be_kept_costs_nothing(
    served: Served, tmp_path: Path, charged: Callable[[], list[Charge]]
) -> None:
    access, header = keyed(tmp_path, Limits(megapixels_per_minute=0.04))
    async with served(access) as client:
        client.headers.update(header)
        with closing(sqlite3.connect(tmp_path / "jobs.sqlite3", isolation_level=None)) as connection:
            connection.execute(
                "CREATE TRIGGER full BEFORE INSERT ON image_jobs BEGIN SELECT RAISE(ABORT, 'disk full'); END"
            )
            refused(await client.post("jobs", json=BODY), 503, "jobs_unavailable")
            connection.execute("DROP TRIGGER full")
        async with asyncio.timeout(60):
            while charged()[0].settled_at is None:
                await asyncio.sleep(0.02)
        await ended(client, (await create(client))["id"])
    assert sorted(row.images for row in charged()) == [0, 2]


@pytest.mark.parametrize("key", ["", " ", "a b", "x" * 256, "é"])
async def test_a_key_is_short_and_printable(served: Served, key: str) -> None:
    async with served() as client:
        answer = await client.post("jobs", json=BODY, headers={"Idempotency-Key": key.encode()})
        assert refused(answer, 400, "invalid_value")["param"] == "idempotency-key"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 11}, "n"),
        ({"size": "1x1"}, "size"),
        ({"stream": True}, "stream"),
        ({"partial_images": 1}, "partial_images"),
        ({"response_format": "png"}, "response_format"),
        ({"timeout_s": 601}, "timeout_s"),
        ({"webhook": {"url": "http://1.1.1.1/"}}, "webhook"),
        ({"webhook": "http://1.1.1.1/"}, "webhook"),
    ],
)
async def test_what_cannot_be_done_is_refused_at_once(served: Served, body: dict[str, Any], param: str) -> None:
    async with served() as client:
        answer = await client.post("jobs", json={**BODY, **body})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
        assert (await client.get("jobs")).json()["data"] == []


async def test_bodies_and_queues_are_bounded(served: Served, deployments: Deployments) -> None:
    async with served(max_unfinished=1, concurrent=1) as client:
        refused(await client.post("jobs", json={**BODY, "prompt": "x" * 2000}), 413, "body_too_large")
        deployments.errors = [APIError(503, "overloaded", "full")] * 7
        job = await create(client)
        answer = await client.post("jobs", json=BODY)
        refused(answer, 429, "too_many_jobs")
        assert answer.headers["retry-after"] == "1"
        assert (await ended(client, job["id"]))["status"] == "completed"  # an attempt that found no room does not count
        assert len(deployments.began) == 8


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (APIError(400, "prompt_too_long", "the prompt is too long", "prompt"), 1),
        (APIError(500, "not_finite", "not finite"), 1),
        (APIError(504, "deadline_exceeded", "too late"), 2),
    ],
)
async def test_a_job_fails_with_the_error_that_a_request_would_have(
    served: Served, deployments: Deployments, error: APIError, attempts: int
) -> None:
    deployments.errors = [error] * attempts
    async with served(attempts=2) as client:
        job = await ended(client, (await create(client))["id"])
        assert (job["status"], job["error"]["code"], job["error"]["message"]) == ("failed", error.code, str(error))
        refused(await client.get(f"jobs/{job['id']}/result"), 409, "job_failed")
        assert len(deployments.began) == attempts


async def test_a_job_is_cancelled_while_it_is_made(
    served: Served, deployments: Deployments, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, stopped = asyncio.Event(), asyncio.Event()

    async def never(*args: object) -> Any:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    monkeypatch.setattr(deployments, "make", never)
    async with served() as client, asyncio.timeout(60):
        job = await create(client)
        await begun.wait()
        answer = await client.get(f"jobs/{job['id']}/result")
        refused(answer, 409, "job_not_completed")
        refused(await client.delete(f"jobs/{job['id']}"), 409, "job_not_finished")
        for _ in range(2):
            assert (await client.post(f"jobs/{job['id']}/cancel")).json()["status"] == "cancelled"
        await stopped.wait()
        refused(await client.get(f"jobs/{job['id']}/result"), 409, "job_cancelled")


async def test_a_replica_that_ends_gives_its_jobs_back_at_once(
    served: Served, deployments: Deployments, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = asyncio.Event()
    make = deployments.make

    async def never(*args: object) -> Any:
        begun.set()
        await asyncio.Event().wait()

    async with asyncio.timeout(60):
        monkeypatch.setattr(deployments, "make", never)
        async with served(lease_s=3600.0) as client:
            job = await create(client)
            await begun.wait()
        monkeypatch.setattr(deployments, "make", make)
        async with served() as client:
            done = await ended(client, job["id"])
            assert (done["status"], done["seed"]) == ("completed", job["seed"])


async def test_what_is_over_cannot_be_cancelled_but_deleted(served: Served) -> None:
    async with served() as client:
        job = await ended(client, (await create(client))["id"])
        refused(await client.post(f"jobs/{job['id']}/cancel"), 409, "job_finished")
        assert (await client.delete(f"jobs/{job['id']}")).json() == {
            "id": job["id"], "object": "image.job.deleted", "deleted": True
        }  # fmt: skip
        for answer in (
            await client.get(f"jobs/{job['id']}"),
            await client.get(f"jobs/{job['id']}/result"),
            await client.post(f"jobs/{job['id']}/cancel"),
            await client.delete(f"jobs/{job['id']}"),
        ):
            refused(answer, 404, "job_not_found")


async def test_jobs_are_listed_page_by_page(served: Served) -> None:
    async with served() as client:
        ids = [(await create(client))["id"] for _ in range(5)]
        for order, expected in (("asc", ids), ("desc", ids[::-1])):
            found: list[str] = []
            after: dict[str, str] = {}
            while True:
                page = (await client.get("jobs", params={"limit": 2, "order": order, **after})).json()
                found += [job["id"] for job in page["data"]]
                assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
                if not page["has_more"]:
                    break
                after = {"after": page["last_id"]}
            assert found == expected
        for params in ({"limit": 101}, {"limit": 0}, {"order": "up"}, {"after": "nothing"}):
            error = refused(await client.get("jobs", params=params), 400, "invalid_value")
            assert error["param"] == next(iter(params))


def test_a_server_without_jobs_says_so_and_all_routes_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    class Context:
        class servable_object:  # noqa: N801 (an attribute of Serve's)
            jobs = None

    monkeypatch.setattr("ray.serve.get_replica_context", lambda: Context)
    with pytest.raises(APIError, match=r"no args\.jobs") as caught:
        jobs_here()
    assert caught.value.status == 404
    document = ingress.app.openapi()
    create_job = document["paths"]["/v1/images/jobs"]["post"]
    assert {"webhook", "response_format", "prompt"} <= set(
        create_job["requestBody"]["content"]["application/json"]["schema"]["properties"]
    )
    assert "422" not in json.dumps(document["paths"]["/v1/images/jobs"])
    for path in ("", "/{job_id}", "/{job_id}/result", "/{job_id}/cancel"):
        assert f"/v1/images/jobs{path}" in document["paths"]
    assert urlsplit("/v1/images/files/{token}").path in document["paths"]


async def test_prompts_are_logged_if_that_is_asked_for(offer: Offer) -> None:
    asked = resolve(ImagesRequest(prompt=PROMPT), offer)
    assert PROMPT in asked.summary(with_prompt=True)
    assert PROMPT not in asked.summary(with_prompt=False)
