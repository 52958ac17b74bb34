"""The front, before an application that behaves as Serve's proxy does when replicas die."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal

import httpx
import pytest
from clock import Clock
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.http import front, refusals
from deployments.http.front import Front, charge_id
from deployments.http.readiness import Readiness
from deployments.http.refusals import Refusal

pytestmark = pytest.mark.anyio

GENERATIONS, JOBS = "/v1/images/generations", "/v1/images/jobs"
Behaviour = Literal["answers", "dies", "ends", "streams", "dies in its stream", "refuses"]
REFUSAL = Refusal(seconds=24.2, wait_s=4.2, takes_s=3.0, images=2, size="128x128")
STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]


class Replicas:
    """An application whose replicas behave in turn as they are told to; it keeps the requests that they got."""

    def __init__(self, *behaviours: Behaviour) -> None:
        self.requests: list[tuple[dict[bytes, bytes], bytes]] = []
        self._behaviours = iter(behaviours)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message.get("more_body", False)
        self.requests.append((dict(scope["headers"]), body))

        async def start(status: int, headers: list[tuple[bytes, bytes]]) -> None:
            await send({"type": "http.response.start", "status": status, "headers": headers})

        async def put(body: bytes, more: bool = False) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more})

        match next(self._behaviours):
            case "answers":
                await start(200, [(b"content-type", b"application/json")])
                await put(b"{}")
            case "dies":  # Serve's proxy says so in plain text
                await start(500, [(b"content-type", b"text/plain")])
                await put(b"The actor died unexpectedly before finishing this task.")
            case "ends":  # or begins no answer
                pass
            case "refuses":
                error = REFUSAL.error()
                await JSONResponse(error.body, error.status, error.headers)({"type": "http"}, receive, send)
            case "streams":
                await start(200, STREAM)
                await put(b"data: 1\n\n", more=True)
                await put(b"data: 2\n\n")
            case "dies in its stream":
                await start(200, STREAM)
                await put(b"data: 1\n\n", more=True)


class Ready:
    was_ready = True
    cors_origins = ()
    readiness = last_known = Readiness({"Ingress": 2}, None)

    def __init__(self, *_: object) -> None:
        pass


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster is there to watch."""
    monkeypatch.setattr(front, "Watch", Ready)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(refusals, "time", SimpleNamespace(monotonic=clock))  # and not the event loop's
    return clock


async def send(app: ASGIApp, path: str = GENERATIONS, method: str = "POST", **options: Any) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.request(method, path, **options)


def code_of(answer: httpx.Response) -> str:
    return answer.json()["error"]["code"]


@pytest.mark.parametrize("death", ["dies", "ends"])
async def test_what_a_dead_replica_had_is_sent_to_another_one(death: Behaviour) -> None:
    replicas = Replicas(death, "answers")
    answer = await send(Front(replicas), content=iter_bytes(b'{"prompt":', b'"a star"}'))
    assert (answer.status_code, answer.content) == (200, b"{}")
    (first, body), (second, again) = replicas.requests
    assert body == again == b'{"prompt":"a star"}'
    assert first[b"x-request-id"] == second[b"x-request-id"]
    assert first[b"x-front-charge"] == second[b"x-front-charge"]
    assert first[b"x-front-received"] == second[b"x-front-received"]  # the time that it may take is not longer


async def test_requests_are_served_while_the_cluster_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ready, "readiness", Readiness({}, "the cluster does not answer"))
    app = Front(Replicas("answers"))
    assert (await send(app)).status_code == 200
    ready = await send(app, "/readyz", "GET")
    assert (ready.status_code, ready.json()["error"]["message"]) == (503, "the cluster does not answer")
    monkeypatch.setattr(Ready, "last_known", Readiness({}, "draining"))
    assert code_of(await send(app)) == "not_ready"


async def iter_bytes(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def test_nothing_is_sent_again_for_a_client_that_has_left() -> None:
    """Serve's proxy then ends without an answer, too."""
    calls = 0

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal calls
        calls += 1
        while (await receive())["type"] != "http.disconnect":
            pass

    messages: list[Message] = [
        {"type": "http.request", "body": b"{}", "more_body": False},
        {"type": "http.disconnect"},
    ]
    sent: list[Message] = []

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": GENERATIONS, "headers": []}
    await Front(proxy)(scope, receive, send)
    assert (calls, sent) == (1, [])


@pytest.mark.parametrize("path", ["/", "/other/v2", "/v2/images/generations"])
async def test_what_is_not_of_the_api_is_sent_once(path: str) -> None:
    replicas = Replicas("dies", "answers")
    await send(Front(replicas), path, "GET")
    assert len(replicas.requests) == 1


async def test_a_stream_is_sent_again_before_its_first_event_alone() -> None:
    class Begins(Replicas):
        """Ends between its status and its first event."""

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            async def headless(message: Message) -> None:
                if self.requests[1:] or message["type"] == "http.response.start":
                    await send(message)

            await super().__call__(scope, receive, headless)

    answer = await send(Front(Begins("streams", "streams")))
    assert answer.text == "data: 1\n\ndata: 2\n\n"
    replicas = Replicas("dies in its stream", "streams")
    answer = await send(Front(replicas))
    assert len(replicas.requests) == 1
    (first, last) = answer.text.strip().split("\n\n")
    assert first == "data: 1"
    event, data = last.split("\n")
    assert event == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == "replica_died"


async def test_a_request_is_sent_twice_at_most() -> None:
    replicas = Replicas("dies", "ends", "answers")
    answer = await send(Front(replicas))
    assert (answer.status_code, code_of(answer), answer.headers["retry-after"]) == (503, "replica_died", "1")
    assert len(replicas.requests) == 2


@pytest.mark.parametrize(
    ("method", "headers", "times"), [("POST", {}, 1), ("POST", {"Idempotency-Key": "k"}, 2), ("GET", {}, 2)]
)
async def test_what_would_be_done_twice_is_not_sent_again(method: str, headers: dict[str, str], times: int) -> None:
    replicas = Replicas("dies", "answers")
    answer = await send(Front(replicas), JOBS, method, headers=headers)
    assert len(replicas.requests) == times
    assert answer.status_code == (200 if times == 2 else 503)


async def test_a_body_that_is_too_long_to_keep_is_sent_once() -> None:
    replicas = Replicas("dies", "answers")
    answer = await send(Front(replicas), content=iter_bytes(*([b"x" * 2**20] * 9)))
    assert code_of(answer) == "replica_died"
    assert [len(body) for _, body in replicas.requests] == [9 * 2**20]


def asking(**fields: Any) -> dict[str, Any]:
    return {"json": {"prompt": "a star", "size": "128x128", "timeout_s": 20, **fields}}


async def test_requests_are_refused_as_one_of_their_kind_was_until_there_may_be_room(clock: Clock) -> None:
    replicas = Replicas("refuses", "answers")
    front = Front(replicas)
    answers = [await send(front, **asking(prompt=f"{seed} stars", seed=seed)) for seed in range(3)]
    assert len(replicas.requests) == 1
    assert [answer.status_code for answer in answers] == [503] * 3
    assert len({answer.content for answer in answers}) == 1
    assert code_of(answers[0]) == "overloaded"
    assert [answer.headers["retry-after"] for answer in answers] == ["5", "8", "11"]  # each in its turn
    assert not any("x-front-refusal" in answer.headers for answer in answers)
    clock.now += 0.9
    assert (await send(front, **asking())).headers["retry-after"] == "13"
    clock.now += 0.1  # after a second it may be otherwise
    assert (await send(front, **asking())).status_code == 200


async def test_as_many_are_let_through_as_there_comes_room_for_and_some_more(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "REFUSAL", replace(REFUSAL, wait_s=0.25, takes_s=0.3))
    answering: list[Behaviour] = ["answers"] * 41
    replicas = Replicas("refuses", *answering, "refuses")
    front = Front(replicas)

    async def statuses(count: int, every_s: float = 0.0) -> list[int]:
        answers = []
        for _ in range(count):
            clock.now += every_s
            answers.append((await send(front, **asking())).status_code)
        return answers

    assert await statuses(3) == [503] * 3
    assert await statuses(1, every_s=0.24) == [503]
    assert (await statuses(100, every_s=0.01)).count(200) == 6  # in a second that has room for three, it says
    clock.now += 9.0
    assert await statuses(24) == [200] * 21 + [503] * 3  # what is left of a second may come at once
    assert (await statuses(100, every_s=0.005)).count(200) == 11  # ever more while it refuses none
    clock.now += 20.0
    assert await statuses(3) == [200] * 3  # and all in the end
    assert await statuses(3) == [503] * 3


async def test_callers_have_equal_shares_of_what_is_let_through(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "REFUSAL", replace(REFUSAL, wait_s=0.0, takes_s=0.03))
    answering: list[Behaviour] = ["answers"] * 60
    front = Front(Replicas("refuses", "refuses", "refuses", *answering))
    kinds = [
        {"headers": {"Authorization": f"Bearer {caller}"}, **asking(plan=plan)}
        for caller, plan in (("a", "hybrid"), ("b", "hybrid"), ("b", "base"))
    ]
    for kind in kinds:
        await send(front, **kind)
    let_through = [0] * len(kinds)
    for _ in range(200):
        clock.now += 0.005
        for number, kind in enumerate(kinds):
            let_through[number] += (await send(front, **kind)).status_code == 200
    assert let_through == [27, 14, 14]


@pytest.mark.parametrize(
    "other",
    [
        asking(size="256x256"),
        asking(timeout_s=60),
        asking(priority="batch"),
        asking(plan="distilled"),
        {"headers": {"Authorization": "Bearer another"}, **asking()},
        {"content": b"{"},
        {"content": b"[1]"},
        {"content": b"[" * 60000},
        {"content": json.dumps({"prompt": "x" * 70000, "size": "128x128", "timeout_s": 20})},
    ],
    ids=str,
)
async def test_other_requests_are_asked_about(other: dict[str, Any], clock: Clock) -> None:
    replicas = Replicas("refuses", "answers")
    front = Front(replicas)
    await send(front, **asking())
    assert (await send(front, **other)).status_code == 200
    (_, body) = replicas.requests[1]
    assert not other.get("content") or body == other["content"] or body.decode() == other["content"]


async def test_what_is_read_to_look_at_it_still_comes_whole(clock: Clock) -> None:
    replicas = Replicas("refuses", "answers")
    front = Front(replicas)
    await send(front, **asking())
    await send(front, content=iter_bytes(*([b"x" * 2**20] * 9)))
    assert [len(body) for _, body in replicas.requests[1:]] == [9 * 2**20]


async def test_in_the_application_nothing_is_sent_again() -> None:
    replicas = Replicas("dies", "answers")
    assert code_of(await send(Front(replicas, in_proxy=False))) == "replica_died"
    assert len(replicas.requests) == 1


@pytest.mark.parametrize("name", ["two words", "first\tsecond", "x" * 65, ""])
async def test_a_request_without_a_plain_id_gets_one(name: str) -> None:
    replicas = Replicas("answers")
    await send(Front(replicas), headers={"X-Request-ID": name} if name else {})
    ((headers, _),) = replicas.requests
    assert 0 < len(headers[b"x-request-id"]) <= 64
    assert headers[b"x-request-id"] != name.encode()


async def test_a_plain_request_id_is_kept() -> None:
    replicas = Replicas("answers")
    await send(Front(replicas), headers={"X-Request-ID": "mine-1"})
    assert replicas.requests[0][0][b"x-request-id"] == b"mine-1"


@pytest.mark.parametrize("given", ["", "imgreq_", "imgreq_" + "g" * 32, "imgjob_" + "0" * 32, "imgreq_" + "0" * 33])
async def test_the_ledgers_ids_are_no_clients_text(given: str) -> None:
    assert charge_id(Headers({"x-front-charge": given})) is None
    replicas = Replicas("answers")
    await send(Front(replicas), headers={"X-Front-Charge": "imgreq_" + "0" * 32})
    ((headers, _),) = replicas.requests
    made = headers[b"x-front-charge"].decode()
    assert made != "imgreq_" + "0" * 32
    assert charge_id(Headers({"x-front-charge": made})) == made
