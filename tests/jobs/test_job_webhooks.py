"""Webhooks, received by a real HTTP server and verified by OpenAI's client."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from clock import Clock
from openai import InvalidWebhookSignatureError, OpenAI
from standing import PROMPT, new_job

from deployments.jobs.settings import WebhookSettings
from deployments.jobs.store import ImageJob, Store
from deployments.jobs.webhook import Webhooks, check_url, read_secret

SECRET = f"whsec_{base64.b64encode(b'k' * 32).decode()}"


@dataclass
class Receiver:
    """What a receiver of webhooks got, and the statuses with which it answers; None for never."""

    url: str = ""
    answers: list[int | None] = field(default_factory=list)
    got: list[tuple[str, Message, bytes]] = field(default_factory=list)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    told = Receiver()
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            told.got.append((self.path, self.headers, body))
            status = told.answers.pop(0)
            if status is None:
                over.wait(60)
                return
            self.send_response(status)
            if status in (302, 307):
                self.send_header("location", f"{told.url}/elsewhere")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        told.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield told
        over.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path}/jobs.sqlite3", clock)
    yield store
    store.close()


def ended(store: Store, url: str) -> str:
    job = store.create(new_job(webhook_url=url), 100)
    assert store.claim("a", 30.0, 1)
    assert store.complete(job.id, "a", {}, [], 1e9)
    return job.id


def webhooks(store: Store, *, allow_private: bool = True, timeout_s: float = 10.0) -> Webhooks:
    settings = WebhookSettings(
        secret_file=Path("unused"), allow_private=allow_private, attempts=3, timeout_s=timeout_s
    )  # fmt: skip
    return Webhooks(store, settings, SECRET)


def got(store: Store, job_id: str) -> ImageJob:
    job = store.get(job_id)
    assert job
    return job


def test_the_end_of_a_job_is_told_once_and_signed(store: Store, clock: Clock, receiver: Receiver) -> None:
    job_id = ended(store, f"{receiver.url}/hook?for=us")
    receiver.answers = [204]
    assert asyncio.run(webhooks(store).deliver()) == 1
    assert asyncio.run(webhooks(store).deliver()) == 0
    ((path, headers, body),) = receiver.got
    assert path == "/hook?for=us"
    assert json.loads(body) == {
        "id": f"evt_{job_id}",
        "object": "event",
        "created_at": int(clock.now),
        "type": "image.job.completed",
        "data": {"id": job_id},
    }
    assert headers["webhook-id"] == f"evt_{job_id}"
    client = OpenAI(api_key="unused", webhook_secret=SECRET)
    client.webhooks.verify_signature(body, dict(headers))
    with pytest.raises(InvalidWebhookSignatureError):
        client.webhooks.verify_signature(body + b" ", dict(headers))
    assert got(store, job_id).webhook_delivered_at == clock.now


@pytest.mark.parametrize("answer", [500, 404, 302, 307, None])
def test_what_was_not_heard_is_told_again_also_after_a_restart(
    store: Store, clock: Clock, receiver: Receiver, answer: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = ended(store, receiver.url)
    receiver.answers = [answer, 200]
    with caplog.at_level(logging.INFO, "ray.serve"):
        assert asyncio.run(webhooks(store, timeout_s=2.0).deliver()) == 1
    assert f"{job_id}: attempt 1 at its webhook" in caplog.text
    assert PROMPT not in caplog.text
    assert asyncio.run(webhooks(store).deliver()) == 0
    clock.now += 60
    assert asyncio.run(webhooks(store).deliver()) == 1
    first, second = receiver.got
    assert [path for path, _, _ in receiver.got] == ["/", "/"]  # a redirection is not followed
    assert first[1]["webhook-id"] == second[1]["webhook-id"]
    assert got(store, job_id).webhook_delivered_at == clock.now


def test_attempts_come_later_and_later_and_end(store: Store, clock: Clock, receiver: Receiver) -> None:
    job_id = ended(store, receiver.url)
    receiver.answers = [500] * 3
    waits = []
    for _ in range(3):
        assert asyncio.run(webhooks(store).deliver()) == 1
        due = got(store, job_id).webhook_due
        if due:
            waits.append(due - clock.now)
            clock.now = due
    assert waits == [15.0, 30.0]
    clock.now += 1e6
    assert asyncio.run(webhooks(store).deliver()) == 0
    assert len(receiver.got) == 3


def test_nobody_is_told_at_a_private_address_whatever_its_name(
    store: Store, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    port = receiver.url.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", "2130706433"):
        ended(store, f"http://{host}:{port}/")
    with caplog.at_level(logging.INFO, "ray.serve"):
        assert asyncio.run(webhooks(store, allow_private=False).deliver()) == 3
    assert receiver.got == []
    assert len(caplog.records) == 3


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("ftp://example.com/", "http://"),
        ("file:///etc/passwd", "http://"),
        ("example.com", "http://"),
        ("http://", "name a host"),
        ("http://[1", "must be a URL"),
        ("http://example.com:99999/", "must be a URL"),
        ("http://user:password@example.com/", "user"),
        ("http://127.0.0.1/", "public internet"),
        ("http://169.254.169.254/latest", "public internet"),
        ("http://10.0.0.1/", "public internet"),
        ("http://[::1]/", "public internet"),
        ("http://[::ffff:127.0.0.1]/", "public internet"),
        ("http://[fe80::1]/", "public internet"),
        ("http://224.0.0.1/", "public internet"),
        ("http://0.0.0.0/", "public internet"),
    ],
)
def test_urls_that_are_not_called_are_refused(url: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_url(url, allow_private=False)


@pytest.mark.parametrize("url", ["http://example.com/hook", "https://example.com:8443/", "http://1.1.1.1/"])
def test_others_are_called(url: str) -> None:
    check_url(url, allow_private=False)
    check_url("http://127.0.0.1:9000/", allow_private=True)


def test_a_secret_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(f"{SECRET}\n")
    assert read_secret(path) == SECRET
    for wrong in ("", "whsec_", "whsec_c2hvcnQ=", SECRET.removeprefix("whsec_"), "whsec_!!!"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="must hold whsec_"):
            read_secret(path)
