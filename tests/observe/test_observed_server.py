"""What operators see of a running server: a real Prometheus scrapes it, traces are received, and logs are JSON."""

from __future__ import annotations

import copy
import json
import re
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from receiving import Received, Receiver, receiver
from scraping import DIRECTORY, eventually, prometheus, query
from test_metrics import lines

from bench.serving.servers import ROOT, Running, servers, started
from deployments import metrics
from deployments.metrics import ALL, REASONS, RESENT, RESUMED, Histogram
from deployments.settings import SERVED_STAGES
from stages.config import ModelConfig

MODEL = ROOT / "configs" / "scenes.yaml"
PLACEMENT = {
    "First": {"stages": ["encode", "base"], "pool": "cpu", "max_batch_tokens": 1024},
    "Last": {"stages": ["bridge", "distilled", "decode"], "pool": "cpu", "max_batch_tokens": 1024},
}
CANARY = "canary"  # of prompts, which nothing here may tell
CACHED = {
    "stages": [
        {
            "name": "base", "sigma_start": 1, "sigma_end": 0, "steps": 8,
            "cache": {"kind": "first_block", "threshold": 0.5},
        }
    ]
}  # fmt: skip
ROTATED_BYTES = 16384
OF_LOSSES = (RESUMED, RESENT)  # nothing is lost here
OTHER_TAGS = {  # of Ray, Serve and Prometheus
    "Component", "NodeAddress", "SessionName", "Version", "WorkerId", "JobId", "application", "deployment", "replica",
    "otel_scope_name", "otel_scope_schema_url", "otel_scope_version", "instance", "job", "le", "__name__",
}  # fmt: skip


@dataclass(frozen=True)
class Observed:
    """A server, and where its traces go."""

    running: Running
    traces: Receiver

    def post(self, path: str = "generations", *, trace: str = "", **body: Any) -> httpx.Response:
        headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"} if trace else {}
        body = {"prompt": f"a ring, {CANARY}", "size": "128x128", **body}
        return httpx.post(f"{self.running.url}/v1/images/{path}", json=body, headers=headers, timeout=120)

    def logs(self) -> list[Path]:
        """Files of Serve's logs, those that were rotated among them."""
        directory = Path(self.running.process.environ()["RAY_TMPDIR"])
        return list(directory.glob("*/session_latest/logs/serve/*.log*"))

    def metrics_url(self) -> str:
        """Address of the metrics, as the server tells it when it is ready."""
        return eventually(lambda: re.findall(r"metrics at (http://\S+/metrics)", self.running.log.read_text()))[0]


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    server = servers(MODEL)[0]
    config = copy.deepcopy(server.config)
    assert config
    config["logging_config"] = {"encoding": "JSON"}
    (application,) = config["applications"]
    jobs = {"directory": str(tmp_path_factory.mktemp("jobs"))}
    application["args"] |= {"placement": PLACEMENT, "jobs": jobs}
    ingress, *_ = application["deployments"]
    application["deployments"] = [ingress, *({"name": name, "num_replicas": 1} for name in PLACEMENT)]
    with pytest.MonkeyPatch.context() as patch, receiver() as traces:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", traces.url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        patch.setenv("RAY_metrics_report_interval_ms", "3000")
        patch.setenv("RAY_ROTATION_MAX_BYTES", str(ROTATED_BYTES))
        with started(replace(server, config=config), MODEL) as running:
            yield Observed(running, traces)


def end_of(span: Received, spans: list[Received], *names: str) -> list[Received]:
    """Spans at the end of a way of children, the root's children first."""
    children = [each for each in spans if each.parent == span.id and each.name == names[0]]
    return [last for child in children for last in end_of(child, spans, *names[1:])] if names[1:] else children


def test_a_request_is_one_trace_of_its_hops_and_stages(observed: Observed) -> None:
    trace = secrets.token_hex(16)
    answer = observed.post(trace=trace, plan="hybrid", n=2).raise_for_status().json()
    request = eventually(lambda: [span for span in observed.traces.of(trace) if span.name.startswith("POST")])[0]
    spans = observed.traces.of(trace)
    assert (request.name, request.parent, request.service) == (
        "POST /v1/images/generations",
        "00f067aa0ba902b7",
        "images",
    )
    assert request.attributes["http.response.status_code"] == 200
    assert len(end_of(request, spans, "wait")) == 2, [(span.name, span.parent, span.id) for span in spans]
    images = end_of(request, spans, "image")
    assert [image.attributes["image.plan"] for image in images] == ["hybrid"] * 2
    assert {image.attributes["image.index"] for image in images} == {0, 1}
    for image in images:
        entry = answer["data"][image.attributes["image.index"]]
        assert image.attributes["image.seed"] == entry["seed"]
        (first,) = end_of(image, spans, "hop First")
        (last,) = end_of(image, spans, "hop Last")
        done = [span for hop in (first, last) for span in spans if span.parent == hop.id]
        assert [span.name for span in done] == [timing["stage"] for timing in entry["timings"]]
        assert [span.attributes["stage.evaluations"] for span in done] == [timing["nfe"] for timing in entry["timings"]]
        assert {span.name for span in spans if span.parent == last.id} == {"bridge", "distilled", "decode"}
        for parent, child in ((request, image), (image, first), (image, last), *((first, span) for span in done[:2])):
            assert parent.start <= child.start <= child.end <= parent.end
    assert not any(span.failed or span.has_events for span in spans)


def test_an_error_fails_its_spans_and_quotes_nothing(observed: Observed) -> None:
    trace = secrets.token_hex(16)
    answer = observed.post(trace=trace, prompt=f"{CANARY} " * 200)
    assert answer.json()["error"]["code"] == "prompt_too_long"
    eventually(lambda: [span for span in observed.traces.of(trace) if span.name.startswith("POST")])
    spans = {span.name: span for span in observed.traces.of(trace)}
    assert spans["POST /v1/images/generations"].attributes["http.response.status_code"] == 400
    assert spans["image"].failed
    assert spans["hop First"].failed
    assert not any(CANARY.encode() in body for body in observed.traces.bodies)


def test_a_job_goes_on_in_the_trace_of_its_request(observed: Observed) -> None:
    trace = secrets.token_hex(16)
    job = observed.post("jobs", trace=trace, plan="distilled").raise_for_status().json()
    spans = eventually(
        lambda: (found := observed.traces.of(trace)) and {"job", "image"} <= {span.name for span in found} and found
    )
    (request,) = [span for span in spans if span.name == "POST /v1/images/jobs"]
    (made,) = end_of(request, spans, "job")
    assert made.attributes["job.id"] == job["id"]
    assert [span.name for span in end_of(made, spans, "image", "hop Last", "distilled")] == ["distilled"]
    assert len(end_of(made, spans, "image", "hop First", "encode")) == 1


def test_logs_are_json_with_the_ids_of_requests_and_traces_and_rotated(observed: Observed) -> None:
    trace = secrets.token_hex(16)
    answer = observed.post(trace=trace, plan="hybrid")
    request_id = answer.headers["x-request-id"]

    def told() -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for path in (path for path in observed.logs() if path.name.startswith("replica")):
            for line in map(json.loads, path.read_text().splitlines()):
                if (line.get("request_id"), line.get("trace_id")) == (request_id, trace):
                    found.setdefault(line["deployment"].removeprefix("images_"), set()).add(line["message"])
        return found

    eventually(lambda: told().keys() == {"Ingress", *PLACEMENT})
    assert any(f"of {request_id}: 128x128, plan hybrid" in message for message in told()["Ingress"])

    def printed() -> list[dict[str, Any]]:
        log = [json.loads(line) for line in observed.running.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in log if line.get("request_id") == request_id]

    (line,) = eventually(printed)
    assert (line["trace_id"], line["deployment"], line["levelname"]) == (trace, "images_Ingress", "INFO")
    for _ in range(40):
        observed.post("nothing")
    eventually(
        lambda: any(path.name.startswith("replica_images_Ingress") and path.suffix == ".1" for path in observed.logs())
    )
    assert all(path.stat().st_size <= ROTATED_BYTES for path in observed.logs() if "replica" in path.name)
    assert not [path for path in observed.logs() if CANARY in path.read_text()]
    assert CANARY not in observed.running.log.read_text()


def scraping(observed: Observed, directory: Path) -> Path:
    """The shipped config of Prometheus, for this server, and faster."""
    config = yaml.safe_load((DIRECTORY / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DIRECTORY / "alerts.yaml")]
    address = observed.metrics_url().removeprefix("http://").removesuffix("/metrics")
    config["scrape_configs"][0]["static_configs"] = [{"targets": [address]}]
    path = directory / "prometheus.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def load(observed: Observed) -> None:
    """Requests of all kinds of outcomes."""
    with ThreadPoolExecutor(2) as pool:
        for answer in [pool.submit(observed.post, plan=plan, n=2) for plan in ("hybrid", CACHED)]:
            answer.result().raise_for_status()
    assert observed.post(size="1x1").status_code == 400
    assert observed.post(plan="base", timeout_s=0.01).status_code == 504
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{observed.running.url}/v1/images/generations",
            json={"prompt": "a ring", "plan": "base", "size": "256x256", "n": 4},
            timeout=0.5,
        )


def test_prometheus_finds_what_the_dashboard_and_the_alerts_ask_for(observed: Observed, tmp_path: Path) -> None:
    with prometheus(scraping(observed, tmp_path), tmp_path) as client:
        for _ in range(2):
            load(observed)
        silent = set(lines())

        def answered() -> bool:
            for line in list(silent):
                if query(client, line.replace("$__rate_interval", "2m")):
                    silent.discard(line)
            return all(any(metric.exported in line for metric in OF_LOSSES) for line in silent)

        try:
            eventually(answered)
        except AssertionError:
            pytest.fail(f"nothing is told by {sorted(silent)}")
        eventually(
            lambda: all(
                rule["health"] != "unknown" for rule in client.get("/api/v1/rules").json()["data"]["groups"][0]["rules"]
            )
        )
        (rules,) = client.get("/api/v1/rules").json()["data"]["groups"]
        assert [(rule["name"], rule.get("lastError")) for rule in rules["rules"] if rule["health"] != "ok"] == []
        assert [rule["name"] for rule in rules["rules"] if rule["state"] == "firing"] == []
        assert_closed(query(client, '{__name__=~"ray_images_.*"}'))
        assert_sums(client)


def assert_closed(samples: list[dict[str, Any]]) -> None:
    """Every tag has one of the values that it may have."""
    model = ModelConfig.read(MODEL)
    values: dict[str, set[str]] = {
        "adapter": set(model.adapters),
        "component": {"encoder", "transformer", "decoder"},
        "direction": {"sent", "received"},
        "endpoint": {"generations", "jobs", "files", "models", "plans", "other"},
        "lost_in": set(PLACEMENT),
        "outcome": {
            "done", "refused", "cancelled", "not_finite", "failed", "ok", "invalid",
        },
        "plan": {*model.plans, "inline"},
        "priority": {"interactive", "batch"},
        "reason": {*REASONS, "other", "", "too_short"},
        "size": {*model.sizes, "other"},
        "stage": set(SERVED_STAGES),
        "target": set(PLACEMENT),
    }  # fmt: skip
    assert values.keys() == metrics.TAGS.keys()
    known = {metric.exported: metric for metric in ALL}
    seen = set()
    for sample in samples:
        labels = sample["metric"]
        name = labels["__name__"]
        metric = known.get(name) or known[re.sub("_(bucket|count|sum)$", "", name)]
        assert isinstance(metric, Histogram) == (name not in known)
        seen.add(metric.name)
        assert labels.keys() - OTHER_TAGS <= set(metric.tags), labels
        for tag in metric.tags:
            assert labels.get(tag, "") in values[tag], labels
    assert seen == {metric.name for metric in ALL if metric not in OF_LOSSES}


def assert_sums(client: httpx.Client) -> None:
    """Counters add up to each other."""
    (images,) = query(client, 'sum(ray_images_total{outcome="done", size="128x128"})')
    (megapixels,) = query(client, 'sum(ray_images_megapixels_total{size="128x128"})')
    assert float(megapixels["value"][1]) == pytest.approx(float(images["value"][1]) * 128 * 128 / 1e6)
    assert query(client, 'sum(ray_images_total{outcome="cancelled"}) > 0')
    assert query(client, 'sum(ray_images_refused_total{reason="too_short"}) > 0')
    assert query(client, 'sum(ray_images_requests_total{outcome="invalid", reason="invalid_value"}) > 0')
