"""How many replicas a stage gets by the wait that its requests must expect."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from bench.serving.load import closed_loop
from bench.serving.servers import ROOT, servers, started
from deployments.autoscaling import SECONDS_PER_CALL, ExpectedWait, WorkMeter
from deployments.check import StartError, read_config
from stages.pulse import Pulse

MODEL = ROOT / "configs" / "scenes.yaml"
POLICY = {"policy_function": "deployments.autoscaling:ExpectedWait", "policy_kwargs": {"target_wait_s": 2.0}}


def context(
    requests: float, seconds: dict[str, float] | None, replicas: int = 1, target: int | None = None
) -> AutoscalingContext:
    """What Serve tells a policy: the requests that run or wait, and what a call takes in each replica."""
    return AutoscalingContext(
        deployment_id=None,
        deployment_name="Base",
        app_name="images",
        current_num_replicas=replicas,
        target_num_replicas=target or replicas,
        running_replicas=[],
        total_num_requests=requests,
        total_queued_requests=0.0,
        aggregated_metrics=None if seconds is None else {SECONDS_PER_CALL: seconds},
        raw_metrics={},
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=10,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=AutoscalingConfig(target_ongoing_requests=4),
    )


def test_of_two_stages_with_equal_queues_the_slow_one_grows_and_the_fast_one_does_not() -> None:
    policy = ExpectedWait(target_wait_s=2.0)
    slow, fast = context(16, {"a": 0.5}), context(16, {"a": 0.01})
    assert policy(slow) == (4.0, {})
    replicas, _ = policy(fast)
    assert 0 < replicas < 1  # of which Serve makes one
    assert {replica_queue_length_autoscaling_policy(each)[0] for each in (slow, fast)} == {4.0}  # Serve's own


def test_the_wait_is_that_of_all_requests_among_all_replicas() -> None:
    policy = ExpectedWait(target_wait_s=2.0)
    assert policy(context(16, {"a": 0.4, "b": 0.6}, replicas=4))[0] == 4.0
    assert policy(context(16, {"a": 0.5}, replicas=2))[0] == 4.0  # one of which has not ended a call yet
    assert policy(context(0, {"a": 0.5}))[0] == 0.0


@pytest.mark.parametrize("seconds", [None, {}])
def test_nothing_changes_while_nobody_knows_what_a_call_takes(seconds: dict[str, float] | None) -> None:
    assert ExpectedWait(2.0)(context(100, seconds, replicas=2, target=3)) == (3, {})


def test_calls_in_a_batch_share_its_seconds_and_old_ones_are_forgotten() -> None:
    meter = WorkMeter()
    assert meter.stats == {}
    for _ in range(8):
        meter.end_call(4.0)
    assert meter.stats == {SECONDS_PER_CALL: 0.5}
    for number in range(64):
        meter.end_call(4.0 + 2.0 * (number + 1))
    assert meter.stats == {SECONDS_PER_CALL: 2.0}


def test_a_pulse_counts_what_its_device_did(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def work(seconds: float) -> None:
        now[0] += seconds
        if seconds == 3:
            raise ValueError

    pulse = Pulse()
    pulse.during(work)(2)
    now[0] += 10
    with pytest.raises(ValueError):  # noqa: PT011
        pulse.during(work)(3)
    assert pulse.busy == 5


def scaled(policy: object) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["applications"][0]["deployments"][2]["autoscaling_config"] = {"max_replicas": 2, "policy": policy}
    return config


def test_the_check_before_the_start_knows_the_policy(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(scaled(POLICY)))
    read_config(path)


def changed(**keys: object) -> dict[str, object]:
    return {**POLICY, **keys}


@pytest.mark.parametrize(
    ("policy", "complaint"),
    [
        (changed(policy_kwargs={"target_wait": 2.0}), r"policy\.policy_kwargs: .*'target_wait'"),
        (
            changed(policy_kwargs={"target_wait_s": 0}),
            r"policy\.policy_kwargs: target_wait_s must be .* above 0, not 0",
        ),
        (changed(policy_kwargs={"target_wait_s": "2"}), r"policy\.policy_kwargs: target_wait_s must be .*, not '2'"),
        (changed(policy_kwargs=[2]), r"policy: policy_kwargs: Input should be an object"),
        (changed(kwargs={}), r"policy\.kwargs: Ray Serve has no such key"),
        ("deployments.autoscaling:ExpectedWait", r"autoscaling_config: policy: Input should be an object"),
        (changed(policy_function="deployments.autoscaling:Wait"), r"policy_function .*no attribute 'Wait'"),
        (
            changed(policy_function="deployments.scaling:Wait"),
            r"policy_function .*No module named 'deployments.scaling'",
        ),
        (changed(policy_function="wait"), r"policy_function"),
    ],
)
def test_a_wrong_policy_is_refused_by_the_key(tmp_path: Path, policy: object, complaint: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(scaled(policy)))
    with pytest.raises(StartError, match=rf"^{path}: .*{complaint}"):
        read_config(path)


@contextmanager
def loaded(url: str, body: dict[str, Any], clients: int) -> Iterator[None]:
    """Let clients send one request after the other within the block."""
    ended = threading.Event()

    def send() -> None:
        while not ended.is_set():
            sent = asyncio.run(closed_loop(url, [body], clients, clients))
            assert not [request.error for request in sent if request.error]

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.slow
def test_under_load_the_slow_stage_gets_a_replica_and_the_fast_ones_do_not() -> None:
    """Base takes fifty guided steps, and the others at most one evaluation; all have the same policy."""
    server = servers(MODEL)[0]
    config = copy.deepcopy(server.config)
    assert config
    for deployment in config["applications"][0]["deployments"]:
        deployment["ray_actor_options"] = {"num_cpus": 0.1}
        if deployment["name"] in ("TextEncoder", "Base", "VAEDecoder"):
            deployment.pop("num_replicas", None)
            deployment["autoscaling_config"] = {
                "min_replicas": 1, "max_replicas": 2, "upscale_delay_s": 1.0, "look_back_period_s": 5.0,
                "policy": POLICY,
            }  # fmt: skip

    def replicas(url: str) -> dict[str, int]:
        answer = httpx.get(f"{url}/readyz", timeout=10).json()
        return answer.get("replicas", {})

    with started(replace(server, config=config), MODEL) as running:
        assert replicas(running.url)["Base"] == 1
        with loaded(running.url, {"prompt": "a ring", "plan": "base"}, clients=8):
            deadline = time.monotonic() + 600
            while (now := replicas(running.url)).get("Base") != 2:
                assert time.monotonic() < deadline, now
                time.sleep(1)
        assert (now["TextEncoder"], now["VAEDecoder"]) == (1, 1)
