"""A live Ray cluster beside the pools that a config is placed on, and plans of how many replicas they need."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.cluster_utils import Cluster

from cluster.check import examine
from cluster.nodes import live_nodes
from cluster.plan import read_scenarios
from cluster.pools import Pool
from stages.yaml_file import ConfigError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two nodes, of which one has the label pool=h100 and says that it has a GPU."""
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0})
    try:
        started.add_node(num_cpus=1, num_gpus=0, resources={"HPU": 2}, labels={"pool": "gaudi2"})
        ray.init(started.address, log_to_driver=False)
        yield started.address
    finally:
        ray.shutdown()
        started.shutdown()


def lacks(**pool: Any) -> list[str]:
    return list(examine(Pool.model_validate({"backend": "cpu", **pool}), live_nodes(), deadline_s=120))


def test_a_cluster_that_has_what_a_pool_needs_lacks_nothing(cluster: str) -> None:
    assert lacks(replicas=2) == []
    assert lacks(labels={"pool": "gaudi2"}, resources={"CPU": 0.5, "HPU": 1}, replicas=2) == []


def test_missing_labels_and_resources_are_told(cluster: str) -> None:
    assert lacks(labels={"pool": "h100"}) == ["no node of the cluster, which has 2, has the labels pool=h100"]
    assert lacks(labels={"pool": "gaudi2"}, resources={"CPU": 0.1, "HPU": 1}, replicas=3) == [
        "its nodes have room for 2 replicas of 0.1 CPU, 1 HPU each, and replicas.min is 3"
    ]
    assert lacks(labels={"pool": "h100"}, replicas={"min": 0, "max": 2}) == []  # the cluster may start them later


def executable(path: Path, *lines: str) -> str:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return str(path)


def test_another_python_must_be_there_with_the_clusters_versions(cluster: str, tmp_path: Path) -> None:
    def told(py_executable: str) -> str:
        (sentence,) = lacks(environment={"py_executable": py_executable}, labels={"pool": "gaudi2"})
        return sentence

    assert f"{tmp_path}/python cannot be run: [Errno 2] No such file" in told(f"{tmp_path}/python")
    older = executable(tmp_path / "older", 'echo \'["3.9.1", "2.40.0"]\'')
    both = lacks(environment={"py_executable": older}, labels={"pool": "gaudi2"})
    assert len(both) == 2
    assert f"has Python 3.9.1, and the cluster {sys.version.split()[0]}: the minor must be the same" in both[0]
    assert f"has Ray 2.40.0, and the cluster {ray.__version__}" in both[1]
    venv.create(tmp_path / "bare", with_pip=False)
    assert "has no Ray that can be imported: ModuleNotFoundError" in told(f"{tmp_path}/bare/bin/python")


def test_an_environment_must_import_what_replicas_import(cluster: str, tmp_path: Path) -> None:
    """Here one that has the libraries, but finds a broken torch before theirs."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('no driver')")
    broken = executable(tmp_path / "python", f'PYTHONPATH="{tmp_path}:$PYTHONPATH" exec "{sys.executable}" "$@"')
    (sentence,) = lacks(environment={"py_executable": broken})
    assert sentence.endswith("cannot import what replicas import: RuntimeError: no driver")
    whole = executable(tmp_path / "whole", f'exec "{sys.executable}" "$@"')
    assert lacks(environment={"py_executable": whole}) == []


def test_a_backend_must_see_its_device(cluster: str) -> None:
    (sentence,) = lacks(backend="cuda", resources={"HPU": 1}, labels={"pool": "gaudi2"})
    assert re.search(r"node \w+: backend cuda: \w+", sentence)


def test_a_directory_for_compilations_must_be_writable(cluster: str, tmp_path: Path) -> None:
    (sentence,) = lacks(environment={"compilation_cache": "/proc/cache"})
    assert "cannot write to /proc/cache, the pool's environment.compilation_cache: FileNotFoundError" in sentence
    assert lacks(environment={"compilation_cache": str(tmp_path / "made")}) == []


def test_a_node_that_does_not_answer_is_told(cluster: str, tmp_path: Path) -> None:
    silent = executable(tmp_path / "silent", "sleep 600")
    pool = Pool.model_validate({"backend": "cpu", "environment": {"py_executable": silent}})
    sentences = list(examine(pool, live_nodes(), deadline_s=4))
    assert len(sentences) == 1
    assert "timed out after 2.0 seconds" in sentences[0] or "no answer within 4 s" in sentences[0]


def test_command_tells_of_each_pool(cluster: str, tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    (application,) = config["applications"]
    application["args"]["pools"] = str(tmp_path / "pools.yaml")
    application["args"]["placement"]["Base"]["pool"] = "h100"
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    pools = {
        "cpu": {"backend": "cpu", "replicas": {"min": 1, "max": 5}},
        "h100": {"backend": "cpu", "labels": {"pool": "h100"}},
    }
    (tmp_path / "pools.yaml").write_text(yaml.safe_dump(pools))

    def run(address: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cluster", "check", str(tmp_path / "serve.yaml")]
        environment = {**os.environ, "RAY_ADDRESS": address}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)

    checked = run(cluster)
    assert checked.returncode == 1
    assert checked.stdout.splitlines() == [
        "cpu: 2 nodes with room for 3 replicas",
        "h100: 0 nodes with room for 0 replicas",
    ]
    assert "h100: no node of the cluster, which has 2, has the labels pool=h100" in checked.stderr.splitlines()

    nowhere = run("127.0.0.1:1")
    assert (nowhere.returncode, nowhere.stdout) == (1, "")
    (sentence,) = nowhere.stderr.splitlines()
    assert sentence.startswith("no Ray cluster can be joined: nobody answers at 127.0.0.1:1: ")


def test_plans_take_prices_from_pools_and_count_replicas(tmp_path: Path) -> None:
    (tmp_path / "pools.yaml").write_text("a: {backend: cpu, price: 2, replicas: 3}\nb: {backend: cpu, price: 1}")
    path = tmp_path / "scenarios.yaml"
    stages = "{base: {device: a, steps: 2, per_image: 0.5}, decode: {device: b, per_image: 0.1}}"
    path.write_text(
        f"pools: pools.yaml\nscenarios: {{both: {{rate: 1, megapixels: 1, deadline: 9, stages: {stages}}}}}"
    )
    scenarios = read_scenarios(path)
    assert {name: device.price for name, device in scenarios.by_name["both"].devices.items()} == {"a": 2, "b": 1}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cluster", "plan", str(path), *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    planned = run()
    assert planned.stdout.startswith("both: 2 on a, 1 on b (2 base, 1 decode); p50 "), planned.stderr
    assert "$5.00 an hour" in planned.stdout
    assert run("--rate", "5").stdout.startswith("both: 6 on a, which has room for 3, 1 on b (6 base, 1 decode)")
    refused = run("--deadline", "1")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == f"{path}: scenarios.both: deadline is 1.0 s, but one image alone takes 1.10 s\n"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("scenarios: {a: {}}", "must have either pools or devices"),
        ("devices: {gpu: {prize: 3}}\nscenarios: {a: {}}", r"devices\.gpu\.prize: Extra"),
        ("devices: {gpu: {}}\nscenarios: {}", "scenarios: "),
        ("devices: {gpu: {}}\nscenarios: {a: {rate: 1}}", r"scenarios\.a: stages: Field required"),
        (
            "devices: {gpu: {}}\n"
            "scenarios: {a: {rate: 1, megapixels: 1, deadline: 1, stages: {b: {device: x, per_image: 1}}}}",
            r"scenarios\.a: stages\.b\.device must be one of \['gpu'\], not 'x'",
        ),
    ],
)
def test_a_wrong_key_of_a_scenario_is_named(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "scenarios.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"^{path}: {complaint}"):
        read_scenarios(path)
