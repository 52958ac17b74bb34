"""Send a server nonsense: none of it may be answered by an error of the server's own, or not at all.

In parts: `api`, what schemathesis makes of the OpenAPI document, whose answers must be as it describes them; `plans`
and `jobs`, bodies that are nearly right; `packets`, damaged ones, for the code that reads them. Cases that are right
are computed, for at most some seconds. Ends with an error, and the shortest case that fails.
"""

from __future__ import annotations

import argparse
import copy
import json
import string
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as some

from bench.models import SCENES
from bench.results import add_output_argument, output_directory, write_json
from bench.serving.servers import Running, servers, started
from stages.packet import LatentPacket, PacketError
from stages.plan import STAGES
from stages.spans import Span
from stages.wire import OtherVersion

_TIMEOUT_S = 5.0  # of a request, by the server
_HANG_S = 60.0
_USUAL = 12  # times as often as the unusual
_SHARES = {"api": 0.45, "plans": 0.25, "jobs": 0.1, "packets": 0.2}  # of the cases
_SCHEMATHESIS = """
[phases]
coverage.enabled = true
stateful.enabled = false

[checks]
enabled = false
not_a_server_error = { enabled = true, expected-statuses = ["2xx", "3xx", "4xx", 504] }  # the server's own timeout
status_code_conformance.enabled = true
content_type_conformance.enabled = true
response_schema_conformance.enabled = true
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--cases", type=int, default=10_000, help="of all parts together, about")
    parser.add_argument("--parts", nargs="+", choices=_SHARES, default=list(_SHARES))
    parser.add_argument("--seed", type=int, default=0)
    add_output_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    output = output_directory(arguments)
    server = servers(SCENES)[0]
    config = copy.deepcopy(server.config)
    assert config
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        config["applications"][0]["args"] |= {
            "request_timeout_s": _TIMEOUT_S,
            "max_images": 2,
            "jobs": {"directory": f"{directory}/jobs", "max_unfinished": 200, "timeout_s": _TIMEOUT_S},
        }
        with started(replace(server, config=config), SCENES) as running:
            for part in arguments.parts:
                cases = max(1, round(arguments.cases * _SHARES[part]))
                start = time.monotonic()
                statuses = _PARTS[part](running, cases, arguments.seed)
                report[part] = {"answers": statuses, "seconds": round(time.monotonic() - start, 1)}
                print(part, report[part], flush=True)
            if httpx.get(f"{running.url}/readyz", timeout=_HANG_S).status_code != 200:
                sys.exit("the server is no longer ready")
    write_json(output / "fuzz.json", report)


Statuses = dict[str, int]


def _api(running: Running, cases: int, seed: int) -> Statuses:
    """Run schemathesis on the document that the server gives."""
    document = f"{running.url}/openapi.json"
    operations = sum(len(path) for path in httpx.get(document, timeout=_HANG_S).json()["paths"].values())
    with tempfile.TemporaryDirectory() as directory:
        config, report = Path(directory) / "schemathesis.toml", Path(directory) / "events.ndjson"
        config.write_text(_SCHEMATHESIS)
        command = [
            str(Path(sysconfig.get_path("scripts")) / "schemathesis"), "--config-file", str(config), "run", document,
            "--max-examples", str(max(1, cases // operations)), "--seed", str(seed),
            "--request-timeout", str(_HANG_S), "--report", "ndjson", "--report-ndjson-path", str(report),
        ]  # fmt: skip
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=cases * _HANG_S)
        if done.returncode:
            sys.exit(done.stdout[-20_000:] + done.stderr)
        statuses: Statuses = {}
        for line in report.read_text().splitlines():
            for status in _statuses_in(json.loads(line)):
                statuses[status] = statuses.get(status, 0) + 1
        return statuses


def _statuses_in(event: Any) -> list[str]:
    """List the statuses of the answers that an event of schemathesis' report holds."""
    if isinstance(event, dict):
        own = [str(event["status_code"])] if "status_code" in event and "headers" in event else []
        return own + [status for value in event.values() for status in _statuses_in(value)]
    if isinstance(event, list):
        return [status for value in event for status in _statuses_in(value)]
    return []


_NUMBERS = some.one_of(
    some.floats(0, 1).map(lambda value: round(20 * value) / 20),
    some.floats(),
    some.integers(),
    some.sampled_from([0, 1, -1, 2**31, 2**63, 1e308, -0.0, 1e-320]),
)
_TEXTS = some.one_of(
    some.sampled_from([*STAGES, "distilled", "bridge", "dynamic", "", "\0", "\ud800", "x" * 300]), some.text()
)
_JSON = some.recursive(
    some.none() | some.booleans() | _NUMBERS | _TEXTS,
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(_TEXTS, inner, max_size=3),
    max_leaves=6,
)


def _mostly(usual: some.SearchStrategy[Any], other: some.SearchStrategy[Any]) -> some.SearchStrategy[Any]:
    return some.sampled_from([*[usual] * _USUAL, other]).flatmap(lambda chosen: chosen)


def _fields(**usual: some.SearchStrategy[Any]) -> some.SearchStrategy[dict[str, Any]]:
    """Objects with some of these fields, each as usual or anything, and now and then another field."""
    known = some.fixed_dictionaries({}, optional={name: _mostly(value, _JSON) for name, value in usual.items()})
    others = _mostly(some.just({}), some.dictionaries(_TEXTS, _JSON, max_size=1))
    return some.builds(lambda fields, more: fields | more, known, others)


_CACHES = _fields(
    kind=some.sampled_from(["first_block", "taylorseer", "teacache", "magcache"]), threshold=some.floats(0.01, 10),
    interval=some.integers(2, 50), warmup=some.integers(1, 10), order=some.integers(0, 4),
    ratios=some.lists(_NUMBERS, max_size=4), coefficients=some.lists(_NUMBERS, max_size=9),
    most_skipped=some.integers(1, 100),
)  # fmt: skip
_STAGES = _fields(
    name=some.sampled_from(STAGES), sigma_start=_NUMBERS, sigma_end=_NUMBERS, steps=some.integers(1, 6),
    guidance_scale=some.floats(1, 20), shift=some.one_of(some.just("dynamic"), some.floats(0.1, 100)),
    adapter=some.sampled_from(["distilled", "bridge", "finish"]), adapter_scale=some.floats(0, 2),
    cache=_CACHES, skip_blocks=some.lists(some.integers(0, 5), max_size=4), scale=some.sampled_from([1, 0.5]),
)  # fmt: skip


def _chained(stages: list[dict[str, Any]], sigmas: list[float]) -> dict[str, Any]:
    """Give stages noise levels that fall from 1 to 0, as those of a right plan."""
    levels = [1.0, *sorted({round(sigma, 2) for sigma in sigmas}, reverse=True), 0.0]
    for stage, start, end in zip(stages, levels, levels[1:], strict=False):
        stage |= {"sigma_start": start, "sigma_end": end, "name": STAGES[min(len(STAGES) - 1, stages.index(stage))]}
        stage.setdefault("steps", 1)
    return {"stages": stages}


_PLANS = some.one_of(
    some.builds(_chained, some.lists(_STAGES, min_size=1, max_size=3), some.lists(some.floats(0.1, 0.9), max_size=2)),
    _fields(stages=some.lists(_STAGES, max_size=4), name=_TEXTS),
    _JSON,
)


def _settings(cases: int) -> Callable[..., Any]:
    return hypothesis.settings(
        max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False
    )


def _answered(answer: httpx.Response, statuses: Statuses, *expected: int) -> None:
    """Count an answer; raises AssertionError if it is an error of the server's own or in another shape than errors."""
    status = str(answer.status_code)
    statuses[status] = statuses.get(status, 0) + 1
    assert answer.status_code in expected, (answer.status_code, answer.text[:2000])
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert error["message"], error
        assert error["code"], error
        assert answer.status_code != 504 or error["code"] == "deadline_exceeded", error


def _plans(running: Running, cases: int, seed: int) -> Statuses:
    """Send requests with plans that are nearly right."""
    statuses: Statuses = {}
    with httpx.Client(base_url=running.url, timeout=_HANG_S) as client:

        @hypothesis.seed(seed)
        @_settings(cases)
        @given(plan=_PLANS, negative=some.none() | _TEXTS)
        def send(plan: Any, negative: str | None) -> None:
            body = {"prompt": "a star", "size": "128x128", "plan": plan, "negative_prompt": negative}
            headers = {"Content-Type": "application/json"}
            answer = client.post("/v1/images/generations", content=json.dumps(body).encode(), headers=headers)
            _answered(answer, statuses, 200, 400, 504)

        send()
    return statuses


def _jobs(running: Running, cases: int, seed: int) -> Statuses:
    """Create jobs by bodies and keys that are nearly right, ask for them, cancel and delete them."""
    statuses: Statuses = {}
    bodies = _fields(
        prompt=some.text(min_size=1), n=some.integers(1, 2), size=some.sampled_from(["128x128", "auto", "1x1"]),
        seed=some.integers(-1, 2**64), plan=some.one_of(some.sampled_from(["distilled", "hybrid"]), _PLANS),
        webhook=_fields(url=some.one_of(_TEXTS, some.just("http://127.0.0.1:9/hook"))), timeout_s=_NUMBERS,
        response_format=some.sampled_from(["b64_json", "url"]), output_format=some.sampled_from(["png", "jpeg", "x"]),
    ).map(lambda body: {"prompt": "a star"} | body)  # fmt: skip
    keys = some.text(string.printable.strip(), max_size=300)
    ways = some.lists(some.sampled_from(["get", "result", "cancel", "delete"]), max_size=3)
    path = "/v1/images/jobs"
    with httpx.Client(base_url=running.url, timeout=_HANG_S) as client:

        @hypothesis.seed(seed)
        @_settings(cases)
        @given(body=bodies, key=keys, ways=ways)
        def use(body: dict[str, Any], key: str, ways: list[str]) -> None:
            headers = {"Content-Type": "application/json", "Idempotency-Key": key}
            answer = client.post(path, content=json.dumps(body).encode(), headers=headers)
            _answered(answer, statuses, 200, 400, 409, 429)
            job = answer.json()["id"] if answer.status_code == 200 else "none"
            for way in ways:
                match way:
                    case "get":
                        answer = client.get(f"{path}/{job}")
                    case "result":
                        answer = client.get(f"{path}/{job}/result")
                    case "cancel":
                        answer = client.post(f"{path}/{job}/cancel")
                    case "delete":
                        answer = client.delete(f"{path}/{job}")
                _answered(answer, statuses, 200, 404, 409, 410)
            if answer.status_code == 200 and "delete" not in ways:
                client.post(f"{path}/{job}/cancel")

        use()
    return statuses


def _packets(running: Running, cases: int, seed: int) -> Statuses:
    """Read packets that were damaged, or made up; what is read is then what was sent."""
    statuses: Statuses = {}
    packet = LatentPacket(
        model="scenes", request_id="r", image_index=0, seed=1, grid=(2, 3), sigma=0.5, position=1, step=2,
        text_tokens=3, avoids=True, spans=(Span("base", 0.0, 1.0, 2.0),), latent=torch.ones(6, 4),
        prompt_embeds=torch.ones(5, 8), negative_embeds=torch.ones(4, 8, dtype=torch.bfloat16),
    )  # fmt: skip
    whole = packet.to_bytes()
    places = some.integers(0, len(whole) - 1)
    changed = some.builds(
        lambda changes, end: bytes(changes.get(at, byte) for at, byte in enumerate(whole))[:end],
        some.dictionaries(places, some.integers(0, 255), max_size=3),
        places | some.just(len(whole)),
    )

    @hypothesis.seed(seed)
    @_settings(cases)
    @given(data=some.one_of(changed, some.binary(), some.binary().map(lambda data: whole[:14] + data)))
    def read(data: bytes) -> None:
        try:
            read = LatentPacket.from_bytes(data)
        except (PacketError, OtherVersion) as error:
            outcome = type(error).__name__
        else:
            assert read.to_bytes() == whole
            outcome = "read"
        statuses[outcome] = statuses.get(outcome, 0) + 1

    read()
    return statuses


_PARTS: dict[str, Callable[[Running, int, int], Statuses]] = {
    "api": _api,
    "plans": _plans,
    "jobs": _jobs,
    "packets": _packets,
}
