"""Manifests against the schemas of those who read them."""

from __future__ import annotations

import gzip
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray import autoscaler
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from cluster.manifests import containers, kuberay, ray_up
from cluster.manifests.layout import Layout
from cluster.pools import Pool, read_pools
from deployments.check import Config, StartError, read_config
from stages.yaml_file import ConfigError

ROOT = Path(__file__).parent.parent
SCHEMA = json.loads(gzip.decompress((ROOT / "tests" / "data" / "rayservice-v1.schema.json.gz").read_bytes()))
AWS = {"type": "aws", "region": "eu-west-1"}

# What KubeRay makes of a container's limits.
KUBERAY = {"nvidia.com/gpu": "GPU", "amd.com/gpu": "GPU", "google.com/tpu": "TPU"}

ACCESS = {"database": "postgresql:///images"}

PLACEMENT = {
    "TextEncoder": {"stages": ["encode"], "pool": "cpu"},
    "Base": {"stages": ["base"], "pool": "h100"},
    "BaseOnMI300": {"stages": ["base"], "pool": "mi300"},
    "Bridge": {"stages": ["bridge"], "pool": "gaudi2"},
    "Distilled": {"stages": ["distilled"], "pool": "tpu"},
    "VAEDecoder": {"stages": ["decode"], "pool": "cpu"},
}


def on_pools(directory: Path, pools: Path, placement: dict[str, Any]) -> Config:
    """The shipped config, placed on other pools."""
    content = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    (application,) = content["applications"]
    application["args"].update(pools=str(pools), placement=placement, access=ACCESS)
    ingress, *_ = application["deployments"]
    application["deployments"] = [ingress, *({"name": name, "num_replicas": 1} for name in placement)]
    path = directory / "serve.yaml"
    path.write_text(yaml.safe_dump(content))
    return read_config(path)


@pytest.fixture
def everywhere(tmp_path: Path) -> Layout:
    """Stages on all of the example's pools."""
    return Layout.of(on_pools(tmp_path, ROOT / "cluster" / "example-pools.yaml", PLACEMENT))


def with_access(directory: Path, access: dict[str, str] | None = ACCESS, **http: str) -> Layout:
    """The shipped config, with keys in a database."""
    content = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    content["applications"][0]["args"]["access"] = access
    content["http_options"].update(http)
    path = directory / "serve.yaml"
    path.write_text(yaml.safe_dump(content))
    return Layout.of(read_config(path))


@pytest.fixture
def shipped(tmp_path: Path) -> Layout:
    return with_access(tmp_path)


def pods(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Templates of a service's pods, the head's first."""
    cluster = manifest["spec"]["rayClusterConfig"]
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **groups}


@pytest.mark.parametrize("layout", ["shipped", "everywhere"])
def test_the_service_is_one_that_kuberay_takes(layout: str, request: pytest.FixtureRequest) -> None:
    manifest = kuberay.render(request.getfixturevalue(layout), "images")
    jsonschema.validate(manifest, SCHEMA)
    for name, template in pods(manifest).items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, **template}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def test_the_schemas_would_refuse_what_is_wrong(shipped: Layout) -> None:
    manifest = kuberay.render(shipped, "images")
    container = pods(manifest)["cpu"]["spec"]["containers"][0]
    container["livenessProbe"]["failures"] = 3
    with pytest.raises(jsonschema.ValidationError, match="failures"):
        jsonschema.validate(manifest, SCHEMA)
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "cpu"}, **pods(manifest)["cpu"]}
    with pytest.raises(kubernetes_validate.ValidationError, match="failures"):
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("layout", ["shipped", "everywhere"])
def test_what_is_served_is_a_config_of_serve_and_ours(
    layout: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    text = kuberay.render(request.getfixturevalue(layout), "images")["spec"]["serveConfigV2"]
    served = ServeDeploySchema.model_validate(yaml.safe_load(text))
    assert (served.http_options.host, served.http_options.port) == ("0.0.0.0", 8000)
    (tmp_path / "served.yaml").write_text(text)
    config = read_config(tmp_path / "served.yaml")
    timeout = config.settings.request_timeout_s
    assert all(deployment.graceful_shutdown_timeout_s > timeout for deployment in config.application.deployments)


def test_a_service_without_keys_for_all_its_pods_is_refused(tmp_path: Path) -> None:
    for access in (None, {"database": "sqlite:///access.sqlite3"}):
        with pytest.raises(ConfigError, match=r"images\.args\.access: must be there, with a database that begins"):
            kuberay.render(with_access(tmp_path, access), "images")
    with pytest.raises(ConfigError, match=r"http_options\.ssl_certfile: KubeRay asks"):
        kuberay.render(with_access(tmp_path, ssl_certfile="c.pem", ssl_keyfile="k.pem"), "images")


def test_the_service_exposes_neither_the_dashboard_nor_rays_ports(everywhere: Layout) -> None:
    manifest = kuberay.render(everywhere, "images")
    head = manifest["spec"]["rayClusterConfig"]["headGroupSpec"]
    # Services of KubeRay's own are within the cluster, and there the dashboard asks for a token.
    assert (head["serviceType"], head["enableIngress"]) == ("ClusterIP", False)
    assert manifest["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    assert "serveService" not in manifest["spec"]
    assert head["rayStartParams"] == {"metrics-export-port": "9464"}
    for template in pods(manifest).values():
        spec = template["spec"]
        assert not spec.get("hostNetwork")
        for container in spec["containers"]:
            assert container["ports"] == [
                {"name": "serve", "containerPort": 8000}, {"name": "metrics", "containerPort": 9464}
            ]  # fmt: skip
            assert container["envFrom"] == [{"secretRef": {"name": "images-postgres"}}]


def offered(group: dict[str, Any]) -> dict[str, float]:
    """Ray resources of a pod of a worker group, as KubeRay starts it."""
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    return {
        "CPU": float(limits["cpu"]),
        **{KUBERAY[name]: float(amount) for name, amount in limits.items() if name in KUBERAY},
        **{name: float(amount) for name, amount in group.get("resources", {}).items()},
    }


@pytest.mark.parametrize("layout", ["shipped", "everywhere"])
def test_pods_of_a_pool_have_what_its_replicas_ask_for(layout: str, request: pytest.FixtureRequest) -> None:
    laid_out: Layout = request.getfixturevalue(layout)
    groups = kuberay.render(laid_out, "images")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert [group["groupName"] for group in groups] == list(laid_out.config.pools)
    for group, (_, pool) in zip(groups, laid_out.config.pools.items(), strict=True):
        assert pool.actor_options.get("label_selector", {}) == group.get("labels", {})
        has = offered(group)
        room = min(math.floor(has.get(name, 0) / amount + 1e-6) for name, amount in pool.resources.items())
        assert room * group["maxReplicas"] >= pool.replicas.max
        assert room * group["minReplicas"] >= pool.replicas.min
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["image"] == pool.environment.image


def test_devices_are_asked_for_by_their_vendors_names(everywhere: Layout) -> None:
    groups = {
        group["groupName"]: group
        for group in kuberay.render(everywhere, "images")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    }
    devices = {
        name: [key for key in group["template"]["spec"]["containers"][0]["resources"]["limits"] if "/" in key]
        for name, group in groups.items()
    }
    assert devices == {
        "cpu": [],
        "h100": ["nvidia.com/gpu"],
        "mi300": ["amd.com/gpu"],
        "gaudi2": ["habana.ai/gaudi"],
        "tpu": ["google.com/tpu"],
    }
    # KubeRay does not derive this one.
    assert {name: group["resources"] for name, group in groups.items() if "resources" in group} == {
        "gaudi2": {"HPU": "1"}
    }
    for name, keys in devices.items():
        tolerated = [each["key"] for each in groups[name]["template"]["spec"].get("tolerations", [])]
        assert tolerated == keys
    assert groups["tpu"]["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x2x1"
    assert offered(groups["tpu"])["TPU"] == 4
    assert (groups["tpu"]["minReplicas"], groups["tpu"]["maxReplicas"]) == (1, 2)  # of four chips each


def test_pods_outlive_the_longest_request_and_the_dashboard_stays_inside(everywhere: Layout) -> None:
    manifest = kuberay.render(everywhere, "images")
    timeout = everywhere.config.settings.request_timeout_s
    spec = manifest["spec"]
    assert spec["rayClusterDeletionDelaySeconds"] > timeout
    for name, template in pods(manifest).items():
        (container,) = template["spec"]["containers"]
        (command,) = container["lifecycle"]["preStop"]["exec"]["command"][2:]
        waits = int(re.findall(r"sleep (\d+)$", command)[0])
        assert template["spec"]["terminationGracePeriodSeconds"] > waits > timeout
        assert ("drain-node" in command) == (name != "head")
        assert container["livenessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        assert container["readinessProbe"]["httpGet"] == (
            {"path": "/api/healthz", "port": 52365} if name == "head" else {"path": "/-/healthz", "port": 8000}
        )
    head = spec["rayClusterConfig"]["headGroupSpec"]
    assert (head["serviceType"], head["enableIngress"]) == ("ClusterIP", False)
    assert spec["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    ports = [port for template in pods(manifest).values() for port in template["spec"]["containers"][0]["ports"]]
    assert {port["name"]: port["containerPort"] for port in ports} == {"serve": 8000, "metrics": 9464}
    groups = [spec["rayClusterConfig"]["headGroupSpec"], *spec["rayClusterConfig"]["workerGroupSpecs"]]
    assert [group["rayStartParams"] for group in groups] == [{"metrics-export-port": "9464"}] * len(groups)


def test_the_head_runs_on_processors(everywhere: Layout, tmp_path: Path) -> None:
    assert everywhere.head.name == "cpu"
    pools = read_pools(ROOT / "cluster" / "example-pools.yaml")
    (tmp_path / "pools.yaml").write_text(yaml.safe_dump({"h100": pools["h100"].model_dump()}))
    stages = ["encode", "base", "bridge", "distilled", "decode"]
    alone = Layout.of(on_pools(tmp_path, tmp_path / "pools.yaml", {"Device": {"stages": stages, "pool": "h100"}}))
    assert alone.head.name == "h100"
    (container,) = pods(kuberay.render(alone, "images"))["head"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in container["resources"]["limits"]


def some(tmp_path: Path, **changes: Any) -> Layout:
    """Two pools, one of them changed."""
    pools: dict[str, Any] = {
        "cpu": {"backend": "cpu", "labels": {"pool": "cpu"}, "environment": {"image": "a"}},
        "h100": {"backend": "cuda", "labels": {"pool": "h100"}, "environment": {"image": "b"}} | changes,
    }
    (tmp_path / "pools.yaml").write_text(yaml.safe_dump(pools))
    placement = {
        "Device": {"stages": ["base", "bridge", "distilled"], "pool": "h100"},
        "Ends": {"stages": ["encode", "decode"], "pool": "cpu"},
    }
    return Layout.of(on_pools(tmp_path, tmp_path / "pools.yaml", placement))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"environment": {}}, r"h100\.environment\.image: must name the container image"),
        ({"labels": {}}, r"h100\.labels: must name one"),
        ({"resources": {"x": 1}}, r"h100\.resources: must have GPU on backend cuda"),
    ],
)
def test_pools_that_say_too_little_are_refused_by_the_key(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/pools\.yaml: {complaint}"):
        some(tmp_path, **changes)


def test_resources_of_ones_own_are_told_to_kuberay(tmp_path: Path) -> None:
    layout = some(tmp_path, resources={"GPU": 1, "nvlink": 0.5, "CPU": 2}, node={"devices": 2})
    *_, group = kuberay.render(layout, "images")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert group["resources"] == {"nvlink": "1"}
    assert offered(group)["GPU"] == 2


@pytest.mark.parametrize(
    ("node", "kept"),
    [
        ({}, {"hostPath": {"path": "/var/compilations", "type": "DirectoryOrCreate"}}),
        ({"cache_claim": "compiled"}, {"persistentVolumeClaim": {"claimName": "compiled"}}),
    ],
)
def test_what_replicas_compile_outlives_their_pods(tmp_path: Path, node: dict[str, Any], kept: dict[str, Any]) -> None:
    layout = some(tmp_path, environment={"image": "b", "compilation_cache": "/var/compilations"}, node=node)
    manifest = kuberay.render(layout, "images")
    jsonschema.validate(manifest, SCHEMA)
    spec = pods(manifest)["h100"]["spec"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "h100"}, "spec": spec}
    kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
    (mount,), (volume,) = spec["containers"][0]["volumeMounts"], spec["volumes"]
    assert mount["mountPath"] == "/var/compilations"
    assert volume == {"name": mount["name"], **kept}
    for other in ("head", "cpu"):  # whose pool keeps nothing
        assert "volumes" not in pods(manifest)[other]["spec"]


def test_a_claim_without_a_directory_to_mount_it_at_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"pools\.yaml: h100: node\.cache_claim needs environment\.compilation_cache"):
        some(tmp_path, node={"cache_claim": "compiled"})


def test_the_cluster_file_is_one_that_ray_takes(tmp_path: Path, everywhere: Layout) -> None:
    layout = some(
        tmp_path,
        replicas={"min": 1, "max": 5},
        environment={"image": "b", "compilation_cache": "/var/compilations"},
        node={"devices": 2, "config": {"InstanceType": "p5.4xlarge"}},
    )
    with pytest.raises(ConfigError, match=r"pools\.yaml: cpu\.node\.config: must be what the provider calls"):
        ray_up.render(layout, "images", AWS)
    (tmp_path / "pools.yaml").write_text(
        (tmp_path / "pools.yaml")
        .read_text()
        .replace("cpu:\n", "cpu:\n  node: {config: {InstanceType: m7i.2xlarge}}\n", 1)
    )
    cluster = ray_up.render(Layout.of(read_config(tmp_path / "serve.yaml")), "images", AWS)
    schema = json.loads((Path(autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    validate_config(prepare_config(yaml.safe_load(yaml.safe_dump(cluster))))
    types = cluster["available_node_types"]
    assert list(types) == ["head", "cpu", "h100"]
    assert types["h100"]["labels"] == {"pool": "h100"}
    assert types["h100"]["resources"] == {"CPU": 4, "GPU": 2}
    assert (types["h100"]["min_workers"], types["h100"]["max_workers"], cluster["max_workers"]) == (1, 3, 4)
    assert types["h100"]["docker"]["worker_image"] == "b"
    options = types["h100"]["docker"]["worker_run_options"]
    assert options == ["--gpus=all", "--volume=/var/compilations:/var/compilations"]
    assert types["cpu"]["docker"]["worker_run_options"] == []
    assert cluster["docker"]["image"] == "a"
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][1]
    assert not any(option.startswith(("-p", "--publish", "--network")) for option in cluster["docker"]["run_options"])


def test_every_pool_has_a_container_file(everywhere: Layout) -> None:
    files = containers.render(everywhere)
    assert list(files) == [f"{name}.Containerfile" for name in everywhere.config.pools]
    for (name, text), pool in zip(files.items(), everywhere.config.pools.values(), strict=True):
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        keywords = [line.split()[0] for line in lines]
        assert set(keywords) <= {"ARG", "FROM", "WORKDIR", "RUN", "COPY", "ENV"}
        assert keywords.index("FROM") == 0 or lines[: keywords.index("FROM")] == ["ARG BASE"]
        assert f"--file {name} --tag {pool.environment.image} " in text.splitlines()[0]
        sources = [line.split()[1] for line in lines if line.startswith("COPY")]
        assert all((ROOT / source).exists() for source in sources)
        for line in lines:
            if line.startswith("RUN ["):
                assert all(isinstance(word, str) for word in json.loads(line.removeprefix("RUN ")))
        assert "import deployments.app" in lines[-1]
        locked = "--require-hashes --requirement requirements.lock" in text
        assert locked == (pool.backend != "gaudi")
        assert ("FROM python:3.12" in lines) == locked


def test_gaudis_container_keeps_the_vendors_libraries_and_pins_ray(everywhere: Layout) -> None:
    text = containers.render(everywhere)["gaudi2.Containerfile"]
    (install,) = (json.loads(line.removeprefix("RUN ")) for line in text.splitlines() if "optimum-habana" in line)
    names = [re.split(r"[^\w-]", word)[0] for word in install[3:]]
    assert not {"torch", "diffusers", "transformers", "accelerate"} & set(names)
    assert {"optimum-habana", "ray", "pydantic", "pyyaml", "safetensors", "peft", "fastapi"} <= set(names)
    (locked,) = re.findall(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert f"ray[serve]=={locked}" in install


def test_command_prints_manifests_and_names_what_is_wrong(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cluster", "render", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    with_access(tmp_path)
    printed = run("kuberay", str(tmp_path / "serve.yaml"), "--name", "pictures")
    assert printed.returncode == 0, printed.stderr
    manifest = yaml.safe_load(printed.stdout)
    assert manifest["metadata"] == {"name": "pictures"}
    assert "serveConfigV2: |" in printed.stdout
    jsonschema.validate(manifest, SCHEMA)

    written = run("containers", "--output", str(tmp_path))
    assert written.stdout.split() == [str(tmp_path / "cpu.Containerfile")]
    assert (tmp_path / "cpu.Containerfile").read_text().startswith("# Nodes of pool cpu")

    for arguments, complaint in (
        (("ray-up",), "--provider: must name the cloud provider"),
        (("ray-up", "--provider", "type=aws"), "cluster/pools.yaml: cpu.node.config: must be"),
        (("kuberay",), "serve_config.yaml: applications.images.args.access: must be there"),
        (("kuberay", "nothing.yaml"), "nothing.yaml: No such file or directory"),
    ):
        refused = run(*arguments)
        assert (refused.returncode, refused.stdout, len(refused.stderr.splitlines())) == (1, "", 1)
        assert refused.stderr.startswith(complaint)


def test_example_pools_have_the_memory_of_their_devices() -> None:
    """So that the check of weights can tell what fits: Qwen-Image's transformer takes 41 GB in bfloat16."""
    pools = read_pools(ROOT / "cluster" / "example-pools.yaml")
    accelerators: list[Pool] = [pool for pool in pools.values() if pool.backend != "cpu"]
    assert len(accelerators) == 4
    assert all(pool.memory_gib and pool.memory_gib > 41e9 / 2**30 for pool in accelerators)
