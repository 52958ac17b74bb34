"""Access through a real server with keys, two replicas of Ingress, jobs, checks, TLS and pages of another origin."""

from __future__ import annotations

import csv
import io
import json
import math
import socket
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
import pytest
import yaml
from openai import OpenAI

from bench.serving.servers import ROOT, Running, Server, colocated, started
from deployments.access.store import AccessStore, Charge

WORD = "zanzibar"  # in every prompt, and in no log
PROMPT = f"a {WORD} ring"
ORIGIN = "https://pages.example"
PIXELS = 128 * 128
JSON = {"Content-Type": "application/json"}


@dataclass
class Site:
    """The server, and what it served to each key as its answers say.

    Attributes:
        running: the server.
        config: its config.
        certificate: its certificate.
        store: its database of keys and of the ledger.
        served: images, pixels and evaluations by the name of the key.
    """

    running: Running
    config: Path
    certificate: Path
    store: AccessStore
    served: dict[str, Counter[str]] = field(default_factory=dict)

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "deployments.access", "--config", str(self.config), *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    def create(self, name: str, *options: str) -> str:
        made = self.command("create", name, *options)
        assert made.returncode == 0, made.stderr
        return made.stdout.strip()

    def http(self, key: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.running.url, headers=headers, timeout=120, verify=self._trust)

    def openai(self, key: str) -> OpenAI:
        client = httpx2.Client(timeout=120, verify=self._trust)  # whose classes that client has
        return OpenAI(base_url=f"{self.running.url}/v1", api_key=key, max_retries=0, http_client=client)

    @contextmanager
    def sending(self, key: str, body: dict[str, Any]) -> Iterator[None]:
        """A client that asks for images and does not wait until they come, but to the end of the block."""
        address = ("127.0.0.1", int(self.running.url.rpartition(":")[2]))
        content = json.dumps(body)
        head = f"Host: 127.0.0.1\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json"
        request = f"POST /v1/images/generations HTTP/1.1\r\n{head}\r\nContent-Length: {len(content)}\r\n\r\n{content}"
        with (
            socket.create_connection(address, timeout=60) as connection,
            self._trust.wrap_socket(connection, server_hostname="127.0.0.1") as encrypted,
        ):
            encrypted.sendall(request.encode())
            yield

    def charges(self) -> list[Charge]:
        """Rows of the ledger."""
        return [charge for charge, _ in self.store.ledger(0.0, math.inf)]

    @property
    def _trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.certificate))

    def note(self, name: str, data: list[Any], size: str = "128x128") -> None:
        width, height = map(int, size.split("x"))
        served = self.served.setdefault(name, Counter())
        served.update(images=len(data), pixels=width * height * len(data))
        served["evaluations"] += sum(entry["nfe"] for entry in data)

    def ledger(self, *options: str) -> list[dict[str, str]]:
        printed = self.command("ledger", *options)
        assert printed.returncode == 0, printed.stderr
        return list(csv.DictReader(io.StringIO(printed.stdout)))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("access")
    certificate, secret = directory / "certificate.pem", directory / "key.pem"
    database = f"sqlite:///{directory}/access.sqlite3"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=images.example",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(secret), "-out", str(certificate)],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    model = ROOT / "configs" / "scenes.yaml"
    config = colocated(yaml.safe_load((ROOT / "serve_config.yaml").read_text()))  # which starts soonest
    config["http_options"].update(ssl_keyfile=str(secret), ssl_certfile=str(certificate))
    (application,) = config["applications"]
    (ingress,) = (each for each in application["deployments"] if each["name"] == "Ingress")
    ingress["num_replicas"] = 2
    application["args"].update(
        model=str(model),
        access={"database": database},
        jobs={"directory": str(directory / "jobs")},
        cors_origins=[ORIGIN],
        moderation={
            "prompt": "tests.access.hooks:check_prompt",
            "image": "tests.access.hooks:check_image",
            "timeout_s": 2.0,
        },
    )
    path = directory / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    command = (sys.executable, "-m", "deployments", "{config}")
    with started(Server("with keys", command, config), model) as running:
        store = AccessStore(database)
        yield Site(running, path, certificate, store)
        store.close()


@pytest.fixture(scope="module")
def shop(site: Site) -> str:
    """A key for everything, without limits."""
    return site.create("shop")


def refused(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def generate(client: httpx.Client, prompt: str = PROMPT, **fields: Any) -> httpx.Response:
    return client.post("/v1/images/generations", json={"prompt": prompt, "plan": "distilled", **fields})


def ended(client: httpx.Client, job_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        job: dict[str, Any] = client.get(f"/v1/images/jobs/{job_id}").json()
        if job["status"] not in ("queued", "in_progress"):
            return job
        time.sleep(0.2)
    raise AssertionError("the job does not end")


def test_openais_client_is_let_in_with_its_key(site: Site, shop: str) -> None:
    with site.openai(shop) as client:
        assert [model.id for model in client.models.list()] == ["scenes"]
        answer = client.images.generate(prompt=PROMPT, n=2, size="128x128", extra_body={"plan": "distilled"})
    site.note("shop", json.loads(answer.model_dump_json())["data"])
    for wrong in ("unused", shop[:-1] + ("a" if shop[-1] != "a" else "b")):
        with site.openai(wrong) as client, pytest.raises(openai.AuthenticationError) as error:
            client.images.generate(prompt=PROMPT)
        assert error.value.code == "invalid_api_key"


def test_every_route_asks_for_a_key_but_probes_descriptions_and_signed_links(site: Site) -> None:
    with site.http() as client:
        for path in ("/healthz", "/readyz", "/docs"):
            assert client.get(path).status_code == 200
        document = client.get("/openapi.json").json()
        assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                concrete = path.replace("{name}", "scenes").replace("{job_id}", "imgjob_1").replace("{token}", "t")
                answer = client.request(method.upper(), concrete)
                if path == "/v1/images/files/{token}":
                    refused(answer, 403, "invalid_link")
                    assert "security" not in operation
                    continue
                refused(answer, 401, "invalid_api_key")
                assert answer.headers["WWW-Authenticate"] == "Bearer"
                assert operation["security"], path
        for header in ("Bearer", "Basic x", "Bearer sk-x", "", "Bearer \u00e9"):
            answer = client.get("/v1/models", headers=[(b"Authorization", header.encode())])
            refused(answer, 401, "invalid_api_key")
        # Before the body, which here is neither JSON nor small.
        answer = client.post("/v1/images/generations", content=b"x" * 3_000_000)
        refused(answer, 401, "invalid_api_key")


def test_a_key_is_for_its_scopes_until_it_is_revoked(site: Site) -> None:
    key = site.create("narrow", "--scope", "images", "--scope", "models")
    assert site.command("create", "narrow").returncode == 1
    listed = site.command("list").stdout
    assert "narrow" in listed
    assert key.rpartition("-")[2] not in listed
    with site.http(key) as client:
        answer = generate(client)
        site.note("narrow", answer.json()["data"])
        error = refused(client.post("/v1/images/jobs", json={"prompt": PROMPT}), 403, "insufficient_scope")
        assert error["message"] == "the key is for images, models, and not for jobs"
        assert site.command("revoke", "narrow").returncode == 0
        refused(generate(client), 401, "invalid_api_key")
        refused(client.get("/v1/models"), 401, "invalid_api_key")
    assert site.command("revoke", "narrow").returncode == 1


def test_limits_hold_over_both_replicas(site: Site) -> None:
    requests = site.create("three requests", "--requests-per-minute", "3")
    with site.http(requests) as client:
        for _ in range(3):
            site.note("three requests", generate(client).json()["data"])
        answer = generate(client)
        assert refused(answer, 429, "rate_limit_exceeded")["message"] == "the key may make 3 requests a minute"
        assert 1 <= int(answer.headers["Retry-After"]) <= 60
        assert client.get("/v1/models").status_code == 200
    with site.openai(requests) as limited, pytest.raises(openai.RateLimitError):
        limited.images.generate(prompt=PROMPT)
    once = site.create("one request", "--requests-per-minute", "1")
    with site.http(once) as client:
        body, headers = {"prompt": PROMPT, "plan": "distilled"}, {"Idempotency-Key": "k"}
        first, again = (client.post("/v1/images/jobs", json=body, headers=headers).json()["id"] for _ in range(2))
        assert first == again  # which is no further request
        assert ended(client, first)["status"] == "completed"
        site.note("one request", client.get(f"/v1/images/jobs/{first}/result").json()["data"])
    pixels = site.create("little room", "--megapixels-per-minute", str(3.5 * PIXELS / 1e6))
    with site.http(pixels) as client:
        refused(generate(client, f"a forbidden {WORD}", n=3), 400, "content_policy_violation")
        until(lambda: all(charge.settled_at for charge in site.charges()))
        site.note("little room", generate(client, n=3).json()["data"])
        refused(generate(client), 429, "rate_limit_exceeded")
        refused(client.post("/v1/images/jobs", json={"prompt": PROMPT}), 429, "rate_limit_exceeded")
        assert "Retry-After" not in generate(client, n=4).headers
        refused(generate(client, n=4), 400, "above_limit")


def test_images_in_the_making_are_counted_until_they_end(site: Site) -> None:
    key = site.create("eight at once", "--concurrent-images", "8")
    with site.http(key) as client:
        refused(generate(client, n=9), 400, "above_limit")
        with site.sending(key, {"prompt": PROMPT, "plan": "base", "n": 8}):
            until(lambda: any(charge.asked_images == 8 for charge in site.charges()))
            answer = generate(client)
            assert refused(answer, 429, "rate_limit_exceeded")["message"] == "the key may have 8 images at once"
            assert answer.headers["Retry-After"] == "1"
        # That client has gone away.
        until(lambda: not any(charge.making_until for charge in site.charges()))
        body = {"prompt": PROMPT, "plan": "base", "stream": True, "partial_images": 3}
        with client.stream("POST", "/v1/images/generations", json=body) as stream:
            events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
        assert [event["type"].rpartition(".")[2] for event in events] == ["partial_image"] * 3 + ["completed"]
        site.note("eight at once", events[-1:])


def test_jobs_wait_for_room_among_the_keys_images(site: Site) -> None:
    key = site.create("one job at once", "--concurrent-images", "1")
    with site.http(key) as client:
        body = {"prompt": PROMPT, "plan": "distilled"}
        jobs = [client.post("/v1/images/jobs", json=body).json()["id"] for _ in range(2)]
        for job_id in jobs:
            assert ended(client, job_id)["status"] == "completed"
            site.note("one job at once", client.get(f"/v1/images/jobs/{job_id}/result").json()["data"])


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_what_fails_costs_nothing(site: Site, shop: str) -> None:
    with site.http(shop) as client:
        refused(generate(client, f"{WORD} " * 3000), 400, "prompt_too_long")
        refused(generate(client, PROMPT, size=f"{WORD}"), 400, "invalid_value")
        refused(client.post("/v1/images/generations", json={"prompt": [WORD]}), 400, "invalid_value")
        refused(
            client.post("/v1/images/generations", content=f'{{"prompt": "{WORD}', headers=JSON), 400, "invalid_json"
        )
        refused(generate(client, timeout_s=0.001), 504, "deadline_exceeded")
        failed = client.post("/v1/images/jobs", json={"prompt": f"{WORD} " * 3000}).json()
        assert ended(client, failed["id"])["error"]["code"] == "prompt_too_long"
        slow = client.post("/v1/images/jobs", json={"prompt": PROMPT, "plan": "base", "n": 4}).json()
        assert client.post(f"/v1/images/jobs/{slow['id']}/cancel").json()["status"] == "cancelled"


def test_what_the_operators_checks_refuse_is_refused(site: Site, shop: str) -> None:
    with site.http(shop) as client:
        error = refused(generate(client, f"a forbidden {WORD}"), 400, "content_policy_violation")
        assert (error["message"], error["param"]) == ("no such things are drawn here", "prompt")
        error = refused(generate(client, f"an unseen {WORD}", n=2), 400, "content_policy_violation")
        assert (error["message"], error["param"]) == ("the image is not for everyone's eyes", None)
        for word in ("faulty", "endless"):
            refused(generate(client, f"a {word} {WORD}"), 503, "moderation_unavailable")
        body = {"prompt": f"a forbidden {WORD}"}
        refused(client.post("/v1/images/jobs", json=body), 400, "content_policy_violation")
        unseen = client.post("/v1/images/jobs", json={"prompt": f"an unseen {WORD}"}).json()
        assert ended(client, unseen["id"])["error"]["code"] == "content_policy_violation"
        asked = {"prompt": f"an unseen {WORD}", "stream": True, "partial_images": 1, "plan": "distilled"}
        with client.stream("POST", "/v1/images/generations", json=asked) as stream:
            events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
        assert [event["error"]["code"] for event in events] == ["content_policy_violation"]


def test_jobs_are_those_of_the_key_that_asked(site: Site, shop: str) -> None:
    rival = site.create("rival")
    with site.http(shop) as ours, site.http(rival) as theirs, site.http() as anyone:
        key = {"Idempotency-Key": "order-7"}
        body = {"prompt": PROMPT, "n": 2, "plan": "distilled", "response_format": "url"}
        job = ours.post("/v1/images/jobs", json=body, headers=key).json()
        assert ours.post("/v1/images/jobs", json=body, headers=key).json()["id"] == job["id"]
        other = theirs.post("/v1/images/jobs", json={**body, "n": 1}, headers=key).json()
        assert other["id"] != job["id"]
        assert ended(ours, job["id"])["status"] == ended(theirs, other["id"])["status"] == "completed"
        for client, mine, not_mine in ((ours, job, other), (theirs, other, job)):
            listed = [each["id"] for each in client.get("/v1/images/jobs").json()["data"]]
            assert mine["id"] in listed
            assert not_mine["id"] not in listed
            path = f"/v1/images/jobs/{not_mine['id']}"
            for answer in (client.get(path), client.get(f"{path}/result"), client.post(f"{path}/cancel")):
                refused(answer, 404, "job_not_found")
            refused(client.delete(path), 404, "job_not_found")
            refused(client.get(f"/v1/images/jobs?after={not_mine['id']}"), 400, "invalid_value")
        result = ours.get(f"/v1/images/jobs/{job['id']}/result").json()
        link = result["data"][0]["url"]
        assert link.startswith(site.running.url)
        assert anyone.get(link).headers["content-type"] == "image/png"
        site.note("shop", result["data"])
        site.note("rival", theirs.get(f"/v1/images/jobs/{other['id']}/result").json()["data"])


def test_pages_of_the_origin_may_call_and_others_not(site: Site, shop: str) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-stainless-os"}
    with site.http() as client:
        allowed = client.options("/v1/images/generations", headers={"Origin": ORIGIN, **asks})
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == ORIGIN
        assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
        other = client.options("/v1/images/generations", headers={"Origin": "https://evil.example", **asks})
        assert "access-control-allow-origin" not in other.headers
        for path, status in (("/v1/models", 401), ("/nothing", 404), ("/readyz", 200)):
            answer = client.get(path, headers={"Origin": ORIGIN})
            assert answer.status_code == status
            assert answer.headers.get_list("access-control-allow-origin") == [ORIGIN]
            assert "access-control-allow-origin" not in client.get(path).headers
    with site.http(shop) as client:
        answer = client.get("/v1/models", headers={"Origin": ORIGIN})
        assert answer.headers.get_list("access-control-allow-origin") == [ORIGIN]
        assert "access-control-allow-credentials" not in answer.headers


def test_the_ledger_adds_up_to_what_was_served(site: Site) -> None:
    until(lambda: all(charge.settled_at for charge in site.charges()))
    totals = {row["key"]: row for row in site.ledger("--totals")}
    assert len(site.served) == 8
    for name, served in site.served.items():
        row = totals[name]
        assert int(row["images"]) == served["images"] > 0
        assert float(row["megapixels"]) == served["pixels"] / 1e6
        assert float(row["evaluations"]) == served["evaluations"] > 0
    rows = site.ledger("--since", "2026-01-01", "--until", "2999-01-01T00:00")
    assert sum(int(row["images"]) for row in rows) == sum(served["images"] for served in site.served.values())
    assert {row["state"] for row in rows} == {"served", "void"}


def test_no_log_has_a_prompt(site: Site) -> None:
    directory = Path(site.running.process.environ()["RAY_TMPDIR"])
    logs = [path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    texts = {path: path.read_bytes() for path in logs}
    assert any(b"by plan distilled" in text for text in texts.values())
    assert any(b"moderation.prompt: ValueError" in text for text in texts.values())
    assert [str(path) for path, text in texts.items() if WORD.encode() in text] == []
