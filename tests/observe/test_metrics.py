"""Which metrics there are, and that the dashboard, the alerts and the documentation know them."""

from __future__ import annotations

import ast
import asyncio
import json
import re
import subprocess
from typing import Any

import pytest
import yaml
from scraping import DIRECTORY, program
from starlette.types import Message

from bench.serving.servers import ROOT
from cluster.observability.dashboard import ROWS, build
from deployments import metrics
from deployments.http.exchange import Exchange
from deployments.metrics import ALL, REASONS, TAGS, Counter, Histogram, Metric
from stages.batching import StepBatcher, StepReport
from stages.pipeline import Pipeline, Prompted

PROMETHEUS_NAME = re.compile(r"ray_images_\w+")


def exported(metric: Metric) -> set[str]:
    """Names of a metric's series."""
    if isinstance(metric, Histogram):
        return {f"{metric.exported}_{part}" for part in ("bucket", "count", "sum")}
    return {metric.exported}


SERIES = set().union(*(exported(metric) for metric in ALL))


def test_names_are_as_prometheus_has_them() -> None:
    declared = [value for value in vars(metrics).values() if isinstance(value, Metric)]
    assert sorted(metric.name for metric in declared) == sorted(metric.name for metric in ALL)
    for metric in ALL:
        assert re.fullmatch(r"images_[a-z_]+", metric.name)
        assert metric.name.endswith("_total") == isinstance(metric, Counter)
        assert set(metric.tags) <= TAGS.keys(), metric.name
        assert metric.help.endswith(".")
        if isinstance(metric, Histogram):
            assert list(metric.bounds) == sorted(metric.bounds)
    assert {tag for metric in ALL for tag in metric.tags} == TAGS.keys()


def codes() -> set[str]:
    """Codes of errors in the source."""
    found: set[str] = set()
    for path in (ROOT / "deployments").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
                code = node.args[1]
                if node.func.id in ("APIError", "cls", "_error", "error_body") and isinstance(code, ast.Constant):
                    found.add(str(code.value))
    return found


def test_every_code_of_an_error_is_a_reason() -> None:
    assert len(codes()) > 20
    assert codes() <= REASONS


def error(code: str, kind: str = "server_error") -> bytes:
    return json.dumps({"error": {"message": "m", "type": kind, "param": None, "code": code}}).encode()


def ended(*messages: Message, left: bool = False) -> tuple[str, str]:
    """Outcome and reason of a request whose client gets these messages."""

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def run() -> tuple[str, str]:
        exchange = Exchange({"type": "http", "path": "/v1/images/generations"}, receive, send)
        if left:
            await exchange.receive()
        for message in messages:
            await exchange.send(message)
        if not left:
            await exchange.receive()  # the server's own, when the answer is out
        return exchange._end()

    outcome = asyncio.run(run())
    assert sent == list(messages)
    return outcome


def start(status: int) -> Message:
    return {"type": "http.response.start", "status": status, "headers": []}


def body(data: bytes, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


def test_requests_are_counted_by_what_the_client_got() -> None:
    event = b"event: error\ndata: "
    refused = error("overloaded")
    assert ended(start(200), body(b"{}")) == ("ok", "")
    assert ended(start(503), body(refused[:20], more=True), body(refused[20:])) == ("refused", "overloaded")
    assert ended(start(429), body(error("too_many_jobs", "invalid_request_error"))) == ("refused", "too_many_jobs")
    assert ended(start(400), body(error("invalid_value", "invalid_request_error"))) == ("invalid", "invalid_value")
    assert ended(start(503), body(error("replica_lost"))) == ("failed", "replica_lost")
    assert ended(start(504), body(error("deadline_exceeded"))) == ("failed", "deadline_exceeded")
    assert ended(start(500), body(b"Internal Server Error")) == ("failed", "other")
    assert ended(start(404), body(error("what a client wrote"))) == ("invalid", "other")
    assert ended(start(404), body(b'{"error": "text"}')) == ("invalid", "other")
    assert ended(start(200), body(b"event: x\ndata: {}\n\n", more=True), body(b"")) == ("ok", "")
    failed = body(event + error("replica_died") + b"\n\n", more=True)
    assert ended(start(200), failed, body(b"")) == ("failed", "replica_died")
    long = body(event + error("prompt_too_long", "invalid_request_error") + b"\n\n", more=True)
    assert ended(start(200), long, body(b"")) == ("invalid", "prompt_too_long")
    assert ended(start(200), body(b"x", more=True)) == ("cancelled", "")
    assert ended(start(503), body(error("replica_died")), left=True) == ("cancelled", "")
    assert ended() == ("cancelled", "")


def test_steps_are_reported_with_what_caches_spared(pipeline: Pipeline) -> None:
    reports: list[StepReport] = []
    batcher = StepBatcher(pipeline.denoiser, 1024, reports.append)
    plans = [pipeline.config.plan(name, "128x128") for name in ("cached", "distilled")]
    futures = []
    for plan in plans:
        (packet,) = pipeline.enter(plan, [Prompted("a ring")], "128x128")
        futures.append(batcher.submit(packet, plan))
    full = pipeline.config.grid("128x128")
    assert batcher.census() == {("base", full): 1, ("distilled", full): 1}
    while batcher.step():
        pass
    assert batcher.census() == {}
    assert len(reports[0].shares) == 2
    assert all(report.seconds > 0 for report in reports)
    for plan, future in zip(plans, futures, strict=True):
        stage = plan.stages[0]
        done = sum(share[1] for report in reports for share in report.shares if share[0] == stage.name)
        spared = sum(share[2] for report in reports for share in report.shares if share[0] == stage.name)
        assert done == pytest.approx(sum(span.nfe for span in future.result().spans))
        assert done + spared == pytest.approx(stage.nfe)
        assert (spared > 0) == (stage.cache is not None)


def test_a_stage_at_half_the_size_counts_as_the_whole_size(pipeline: Pipeline) -> None:
    plan = pipeline.config.plan("hybrid", "256x256")
    assert plan.stages[0].scale == 0.5
    batcher = StepBatcher(pipeline.denoiser, 1024)
    (packet,) = pipeline.enter(plan, [Prompted("a ring")], "256x256")
    batcher.submit(packet, plan)
    assert batcher.census() == {("base", pipeline.config.grid("256x256")): 1}


def test_the_dashboard_is_what_its_program_makes_and_shows_every_metric() -> None:
    committed = json.loads((DIRECTORY / "dashboard.json").read_text())
    assert committed == build(), "python -m cluster.observability.dashboard > cluster/observability/dashboard.json"
    named = set().union(*(set(PROMETHEUS_NAME.findall(line)) for line in lines()))
    assert named <= SERIES
    assert all(exported(metric) & named for metric in ALL)
    places = [tuple(panel["gridPos"][key] for key in "xy") for panel in committed["panels"]]
    assert len(set(places)) == len(places)


def lines() -> list[str]:
    """Queries of the dashboard's panels."""
    return [line for row in ROWS.values() for panel in row for line in panel.lines.values()]


def test_the_alerts_know_the_metrics_and_do_as_their_tests_say() -> None:
    rules = yaml.safe_load((DIRECTORY / "alerts.yaml").read_text())
    named = {
        name for group in rules["groups"] for rule in group["rules"] for name in PROMETHEUS_NAME.findall(rule["expr"])
    }
    assert named
    assert named <= SERIES
    tested: Any = yaml.safe_load((DIRECTORY / "alerts_test.yaml").read_text())
    fired = {test["alertname"] for each in tested["tests"] for test in each["alert_rule_test"] if "exp_alerts" in test}
    assert fired == {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    for command in (["check", "config", "prometheus.yaml"], ["test", "rules", "alerts_test.yaml"]):
        checked = subprocess.run(
            [program("promtool"), *command], cwd=DIRECTORY, capture_output=True, text=True, timeout=60
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_documentation_lists_every_metric() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    rows = dict(re.findall(r"^\| `(ray_images_\w+)` \| (.*) \|$", text, re.MULTILINE))
    assert rows == {
        metric.exported: f"{metric.kind} | {', '.join(f'`{tag}`' for tag in metric.tags)} | {metric.help}"
        for metric in ALL
    }
    assert dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|$", text, re.MULTILINE)) == TAGS
