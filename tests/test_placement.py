"""Pools as their file describes them, and deployments that are placed on them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from served import pixels

from backends import get_backend
from bench.serving.servers import free_ports, servers, started
from cluster.nodes import LiveNode, find_lack
from cluster.pools import Pool, read_pools
from deployments.app import build
from deployments.check import Config, StartError, check, read_config
from deployments.settings import Settings
from stages.pipeline import Pipeline
from stages.yaml_file import ConfigError

ROOT = Path(__file__).parent.parent
TWO: dict[str, dict[str, Any]] = {"cpu": {"backend": "cpu"}, "h100": {"backend": "cuda", "labels": {"pool": "h100"}}}

Change = Callable[[dict[str, Any]], object]


def written(directory: Path, pools: dict[str, Any], change: Change = lambda application: None) -> Path:
    """The shipped config on other pools, its application changed."""
    (directory / "pools.yaml").write_text(yaml.safe_dump(pools))
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    (application,) = config["applications"]
    application["args"]["pools"] = str(directory / "pools.yaml")
    change(application)
    path = directory / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def on_free_port(config: Path) -> Path:
    """The config, changed."""
    content = yaml.safe_load(config.read_text())
    content["http_options"]["port"], content["applications"][0]["args"]["metrics_port"] = free_ports(2)
    config.write_text(yaml.safe_dump(content))
    return config


def base_on(pool: str, **options: Any) -> Change:
    """Place the stage base on a pool, with options of its deployment."""

    def change(application: dict[str, Any]) -> None:
        application["args"]["placement"]["Base"]["pool"] = pool
        application["deployments"][2].update(options)

    return change


def refusal(directory: Path, pools: dict[str, Any], change: Change) -> str:
    with pytest.raises(StartError) as refused:
        read_config(written(directory, pools, change))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_pool_is_what_its_backend_says_unless_it_says_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "pools.yaml"
    path.write_text("a: {backend: cuda}\nb: {backend: cuda, resources: {GPU: 2, x: 1}, labels: {pool: b}, replicas: 3}")
    default, other = read_pools(path).values()
    assert default.resources == dict(get_backend("cuda").resources) == {"GPU": 1}
    assert default.labels == {}
    assert default.actor_options == {"num_gpus": 1}
    assert other.actor_options == {"num_gpus": 2, "resources": {"x": 1}, "label_selector": {"pool": "b"}}
    assert (default.replicas.min, other.replicas.min, other.replicas.max) == (1, 3, 3)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("cpu: {backend: abacus}", r"cpu\.backend: backend must be one of .*'cpu'.*, not 'abacus'"),
        ("cpu: {}", r"cpu\.backend: Field required"),
        ("cpu: {backend: cpu, prize: 3}", r"cpu\.prize: Extra"),
        ("cpu: {backend: cpu, price: -1}", r"cpu\.price: .* greater than or equal to 0"),
        ("cpu: {backend: cpu, price: .nan}", r"cpu\.price: "),
        ("cpu: {backend: cpu, resources: {CPU: 0}}", r"cpu\.resources\.CPU: .* greater than 0"),
        ("cpu: {backend: cpu, labels: {pool: in(a)}}", r"cpu\.labels\.pool: .*pattern"),
        ("cpu: {backend: cpu, replicas: {min: 3, max: 2}}", r"cpu\.replicas: min must be at most max, 2, not 3"),
        ("cpu: {backend: cpu, replicas: 0}", r"cpu\.replicas\.max: .* greater than or equal to 1"),
        ("cpu: {backend: cpu, replicas: true}", r"cpu\.replicas\.min: .* integer"),
        ("cpu: {backend: cpu, environment: {python: /x}}", r"cpu\.environment\.python: Extra"),
        ("cpu: {backend: cpu, environment: {compilation_cache: a/b}}", r".*compilation_cache: must begin with /"),
        ("cpu: {backend: cpu, node: {cpus: 0.5}}", r"cpu\.node\.cpus: "),
        ("CPU: {backend: cpu}", r"CPU.*pattern"),
        ("cpu: cpu", r"cpu: .*object|cpu: .*dictionary"),
        ("{}", "must name at least one pool"),
    ],
)
def test_a_wrong_key_of_a_pool_is_named(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "pools.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"(?s)^{path}: {complaint}"):
        read_pools(path)


def test_placement_names_pools_of_the_file(tmp_path: Path) -> None:
    placed = read_config(written(tmp_path, TWO, base_on("h100"))).settings.placement
    assert (placed["Base"].backend, placed["Bridge"].backend) == ("cuda", "cpu")
    assert refusal(tmp_path, TWO, base_on("h200")) == (
        f"{tmp_path}/serve.yaml: applications.images.args: placement: Base.pool must be one of ['cpu', 'h100'] of "
        f"{tmp_path}/pools.yaml, not 'h200'"
    )

    def old(application: dict[str, Any]) -> None:
        application["args"]["placement"]["Base"] = {"stages": ["base"], "backend": "cpu"}

    assert "placement: Base.backend is the pool's: name a pool in place of it" in refusal(tmp_path, TWO, old)

    def own_cache(application: dict[str, Any]) -> None:
        application["args"]["placement"]["Base"] = {"stages": ["base"], "compilation_cache": "/var/cache"}

    assert "placement: Base.compilation_cache is the pool's" in refusal(tmp_path, TWO, own_cache)
    with pytest.raises(StartError, match=rf"args\.pools: {tmp_path}/other\.yaml: No such file"):
        read_config(written(tmp_path, TWO, lambda app: app["args"].update(pools=str(tmp_path / "other.yaml"))))
    wrong = {"cpu": {"backend": "cpu", "colour": "red"}}
    assert refusal(tmp_path, wrong, lambda app: None).startswith(f"{tmp_path}/pools.yaml: cpu.colour: Extra")


def test_several_deployments_of_a_stage_stand_on_several_pools(tmp_path: Path) -> None:
    def change(application: dict[str, Any]) -> None:
        application["args"]["placement"]["Fast"] = {"stages": ["base"], "pool": "h100"}
        application["deployments"].append({"name": "Fast", "num_replicas": 1})

    config = read_config(written(tmp_path, TWO, change))
    assert list(config.pools) == ["cpu", "h100"]
    assert [name for name, placed in config.settings.placement.items() if "base" in placed.stages] == ["Base", "Fast"]


def test_an_order_of_deployments_is_one_of_those_that_run_the_same_stage(tmp_path: Path) -> None:
    def second(application: dict[str, Any], **options: Any) -> None:
        application["args"]["placement"]["Fast"] = {"stages": ["base"], "pool": "h100", "preference": 1, **options}
        application["deployments"].append({"name": "Fast", "num_replicas": 1})

    def change(application: dict[str, Any]) -> None:
        second(application)
        application["args"]["overflow_wait_s"] = 10.0

    settings = read_config(written(tmp_path, TWO, change)).settings
    assert (settings.placement["Fast"].preference, settings.overflow_wait_s) == (1, 10.0)

    assert "placement.Fast.preference: Input should be greater than or equal to 0" in refusal(
        tmp_path, TWO, lambda application: second(application, preference=-1)
    )
    assert "placement.Fast.preference: Input should be a valid integer" in refusal(
        tmp_path, TWO, lambda application: second(application, preference=True)
    )
    assert "placement.Base.preference must be 0, not 3: no deployment of a lower one runs base" in refusal(
        tmp_path, TWO, lambda application: application["args"]["placement"]["Base"].update(preference=3)
    )
    assert "overflow_wait_s must go with a preference above 0" in refusal(
        tmp_path, TWO, lambda application: application["args"].update(overflow_wait_s=3.0)
    )
    assert "args: overflow_wait_s: Input should be greater than or equal to 0" in refusal(
        tmp_path, TWO, lambda application: application["args"].update(overflow_wait_s=-1.0)
    )


def test_replicas_ask_for_what_their_pool_says(tmp_path: Path) -> None:
    environment = {"py_executable": "/opt/gpu/bin/python", "env_vars": {"A": "1"}}
    pools = {**TWO, "h100": {**TWO["h100"], "resources": {"GPU": 1, "CPU": 2, "x": 0.5}, "environment": environment}}
    application = build(read_config(written(tmp_path, pools, base_on("h100"))).settings)
    _, replicas = application._bound_deployment.init_args
    options = replicas["Base"]._bound_deployment.ray_actor_options
    assert options["num_gpus"] == 1
    assert options["num_cpus"] == 2
    assert options["resources"] == {"x": 0.5}
    assert options["label_selector"] == {"pool": "h100"}
    assert options["runtime_env"] == environment


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, r"asks for no GPU, of which a device of pool h100 is 1"),
        ({"num_gpus": 1}, r"selects no pool=h100, a label of pool h100"),
        ({"num_gpus": 1, "label_selector": {"pool": "mi300"}}, r"selects no pool=h100"),
        (
            {"num_gpus": 1, "label_selector": {"pool": "h100"}, "resources": {"HPU": 1}},
            r"asks for HPU, which is no resource of pool h100",
        ),
        (
            {"num_gpus": 1, "label_selector": {"pool": "h100"}, "runtime_env": {"py_executable": "python3"}},
            r"has the py_executable 'python3', and pool h100 has None",
        ),
    ],
)
def test_options_that_contradict_the_pool_are_refused(tmp_path: Path, options: dict[str, Any], complaint: str) -> None:
    message = refusal(tmp_path, TWO, base_on("h100", ray_actor_options=options))
    key = "applications.images.deployments.Base.ray_actor_options"
    assert message.startswith(f"{tmp_path}/serve.yaml: {key}: ")
    assert message.removeprefix(f"{tmp_path}/serve.yaml: {key}: ").startswith(complaint)
    assert message.endswith(f"of {tmp_path}/pools.yaml; without this key the deployment has the pool's")


def test_options_must_have_the_environment_of_the_pool(tmp_path: Path) -> None:
    pools = {
        **TWO,
        "h100": {"backend": "cuda", "environment": {"py_executable": "/opt/python", "env_vars": {"A": "1"}}},
    }
    assert "has the py_executable None, and pool h100 has '/opt/python'" in refusal(
        tmp_path, pools, base_on("h100", ray_actor_options={"num_gpus": 1})
    )
    runtime_env: dict[str, Any] = {"py_executable": "/opt/python"}
    assert "does not set A=1, an environment variable of pool h100" in refusal(
        tmp_path, pools, base_on("h100", ray_actor_options={"num_gpus": 1, "runtime_env": runtime_env})
    )
    runtime_env["env_vars"] = {"A": "1", "B": "2"}
    read_config(
        written(tmp_path, pools, base_on("h100", ray_actor_options={"num_gpus": 0.5, "runtime_env": runtime_env}))
    )


def test_more_replicas_than_a_pool_has_room_for_are_refused(tmp_path: Path) -> None:
    def change(application: dict[str, Any]) -> None:
        for deployment, name in zip(application["deployments"][2:4], ("Base", "Bridge"), strict=True):
            application["args"]["placement"][name]["pool"] = "h100"
            deployment.pop("autoscaling_config", None)
            deployment["num_replicas"] = 2

    pools = {**TWO, "h100": {**TWO["h100"], "replicas": {"min": 0, "max": 3}}}
    assert refusal(tmp_path, pools, change) == (
        f"{tmp_path}/serve.yaml: applications.images.deployments: those on pool h100 ask for 4 GPU together, and its "
        f"3 replicas at most have 3 in {tmp_path}/pools.yaml"
    )
    pools["h100"]["replicas"]["max"] = 4
    read_config(written(tmp_path, pools, change))


def test_weights_that_do_not_fit_a_device_are_refused(tmp_path: Path) -> None:
    def checked(pools: dict[str, Any]) -> Config:
        return check(on_free_port(written(tmp_path, pools)))

    with pytest.raises(
        StartError,
        match=r"placement\.Base\.pool: its weights take 0\.\d+ GiB, and a device of cpu has 0\.01, memory_gib",
    ):
        checked({"cpu": {"backend": "cpu", "memory_gib": 0.01, "replicas": 5}})
    checked({"cpu": {"backend": "cpu", "memory_gib": 1, "replicas": 5}})


def test_replicas_keep_what_they_compile_where_their_pool_says(tmp_path: Path) -> None:
    def checked(directory: Path) -> Config:
        pools = {"cpu": {"backend": "cpu", "environment": {"compilation_cache": str(directory)}}}
        return check(on_free_port(written(tmp_path, pools)))

    settings = checked(tmp_path / "made" / "here").settings
    assert {placed.compilation_cache for placed in settings.placement.values()} == {tmp_path / "made" / "here"}
    (tmp_path / "file").touch()
    for directory, reason in ((tmp_path / "file" / "below", "Not a directory"), (Path("/proc/cache"), "No such file")):
        with pytest.raises(StartError) as refused:
            checked(directory)
        assert str(refused.value).startswith(
            f"{tmp_path}/pools.yaml: cpu.environment.compilation_cache: {directory} cannot be written: {reason}"
        )


def test_a_pools_python_must_be_here_where_this_machine_is_the_cluster(tmp_path: Path) -> None:
    pools = {"cpu": {"backend": "cpu", "environment": {"py_executable": f"{tmp_path}/bin/python -u"}}}
    config = written(tmp_path, pools)
    with pytest.raises(StartError) as refused:
        check(on_free_port(config))
    complaint = (
        f"{tmp_path}/pools.yaml: cpu.environment.py_executable: this machine has no program {tmp_path}/bin/python"
    )
    assert str(refused.value) == complaint
    command = [sys.executable, "-m", "cluster", "local", str(config)]
    local = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (local.returncode, local.stderr.splitlines()[-1]) == (1, complaint)


def test_what_a_cluster_lacks_is_a_sentence() -> None:
    def node(resources: dict[str, float], **labels: str) -> LiveNode:
        return LiveNode("0", labels, {"CPU": 8.0, **resources})

    pool = Pool.model_validate({**TWO["h100"], "replicas": {"min": 3, "max": 8}})
    assert find_lack(pool, [node({"GPU": 8.0})]) == ("no node of the cluster, which has 1, has the labels pool=h100")
    assert find_lack(pool, [node({"GPU": 2.0}, pool="h100"), node({"GPU": 8.0}, pool="mi300")]) == (
        "its nodes have room for 2 replicas of 1 CPU, 1 GPU each, and replicas.min is 3"
    )
    assert find_lack(pool, [node({"GPU": 2.0}, pool="h100"), node({"GPU": 1.0}, pool="h100", zone="a")]) is None
    assert find_lack(pool.model_copy(update={"replicas": pool.replicas.model_copy(update={"min": 0})}), []) is None
    thirds = Pool.model_validate({"backend": "cpu", "resources": {"CPU": 0.1}, "replicas": 80})
    assert find_lack(thirds, [node({})]) is None


def test_the_documentation_shows_pools_and_a_placement(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "pools.md").read_text()
    pool, placement = (yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S))
    (tmp_path / "pools.yaml").write_text(yaml.safe_dump(pool))
    assert list(read_pools(tmp_path / "pools.yaml")) == ["h100"]
    settings = Settings.model_validate(
        {"model": "configs/scenes.yaml", **placement, "pools": "cluster/example-pools.yaml"}
    )
    assert list(settings.read_pools()) == ["cpu", "h100", "mi300", "gaudi2"]


def test_a_stage_that_no_deployment_runs_stands_on_no_pool() -> None:
    """So that a plan with it is refused, in place of an image that finds no deployment."""
    config = read_config(ROOT / "cluster" / "h100" / "serve.yaml")
    assert config.settings.pools_by_stage == dict.fromkeys(("encode", "base", "distilled", "decode"), ("h100",))


def test_settings_have_the_shipped_pools_by_default() -> None:
    settings = Settings.model_validate({"model": "configs/scenes.yaml"})
    assert {placed.backend for placed in settings.placement.values()} == {"cpu"}
    assert list(settings.read_pools()) == ["cpu"]


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.slow
def test_a_stage_runs_in_its_pools_own_python(tmp_path: Path, pipeline: Pipeline) -> None:
    """By a command that leaves a trace and starts this Python, so that what it serves can be compared."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nSTARTED_BY="$0" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    environment = {"py_executable": str(python), "env_vars": {"POOL": "other"}}
    pools: dict[str, dict[str, Any]] = {
        name: {"backend": "cpu", "resources": {"CPU": 0.3}, "replicas": 5} for name in ("cpu", "other")
    }
    pools["other"]["environment"] = environment
    config = yaml.safe_load(written(tmp_path, pools, base_on("other")).read_text())
    model = ROOT / "configs" / "scenes.yaml"
    with started(replace(servers(model)[0], config=config), model) as running:
        answer = httpx.post(
            f"{running.url}/v1/images/generations", json={"prompt": "a striped heart", "seed": 4}, timeout=120
        )
        environments = {
            title.split(":")[-1]: process.environ()
            for process in running.processes()
            if (title := " ".join(process.cmdline()[:1]).partition(".")[0]).startswith("ray::ServeReplica:")
        }
    assert len(environments) == 6
    by = {name: variables["STARTED_BY"] for name, variables in environments.items() if "STARTED_BY" in variables}
    assert by == {"Base": str(python)}
    assert environments["Base"]["POOL"] == "other"
    assert "POOL" not in environments["Bridge"]
    (local,) = pipeline.run("hybrid", "a striped heart", seeds=(4,), size="128x128")
    served = pixels(answer.raise_for_status().json()["data"][0])
    assert np.abs(served - np.asarray(local.image).astype(int)).max() <= 3
