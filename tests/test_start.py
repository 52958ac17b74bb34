"""How a server starts, stands and stops: `python -m deployments` as a user meets it."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
import yaml
from ray import serve
from ray.serve._private.common import DeploymentStatus, DeploymentStatusTrigger, ReplicaState
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, DeploymentStatusOverview, ServeStatus
from served import log_lines

from bench.serving.servers import ROOT, Running, free_ports, servers, started, titled
from deployments.check import StartError, check, read_config
from deployments.fit import starting_resources
from deployments.http.readiness import Deployments, Readiness, _ask_controller

MODEL = ROOT / "configs" / "scenes.yaml"
SLOW = {"prompt": "a ring", "plan": "base"}  # fifty steps


def shipped() -> dict[str, Any]:
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["http_options"]["port"], config["applications"][0]["args"]["metrics_port"] = free_ports(2)
    config["applications"][0]["args"]["model"] = str(MODEL)
    return config


def written(directory: Path, config: dict[str, Any]) -> Path:
    path = directory / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the small model with its config, to be damaged."""
    shutil.copytree(ROOT / "checkpoints" / "scenes", tmp_path / "checkpoints" / "scenes")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    return tmp_path / "configs" / "scenes.yaml"


def test_shipped_config_is_accepted(tmp_path: Path) -> None:
    check(written(tmp_path, shipped()))


@pytest.mark.parametrize("path", ["cluster/h100/serve.yaml", "cluster/heterogeneous/serve.yaml"])
def test_other_shipped_configs_are_right_as_far_as_this_machine_can_tell(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert read_config(Path(path)).pools


def test_wrong_config_is_refused_by_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "exits.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)

    def refusal(change: Callable[..., object]) -> str:
        config = shipped()
        change(config, config["applications"][0])
        with pytest.raises(StartError) as refused:
            check(written(tmp_path, config))
        assert "\n" not in str(refused.value)
        return str(refused.value)

    deployment = "applications.0.deployments.0"
    assert f": {deployment}.num_replica: Ray" in refusal(
        lambda config, app: app["deployments"][0].update(num_replica=2)
    )
    assert f": {deployment}.ray_actor_options.num_cpu: Ray" in refusal(
        lambda config, app: app["deployments"][0]["ray_actor_options"].update(num_cpu=2)
    )
    assert "num_replicas" in refusal(lambda config, app: app["deployments"][1].update(num_replicas="many"))
    assert "args: max_imagez:" in refusal(lambda config, app: app["args"].update(max_imagez=2))
    assert "args: max_images:" in refusal(lambda config, app: app["args"].update(max_images=0))
    assert "default_plan must be" in refusal(lambda config, app: app["args"].update(default_plan="fastest"))
    assert "Basis is not in args.placement" in refusal(lambda config, app: app["deployments"][2].update(name="Basis"))
    assert "Ingress of args.placement is missing" in refusal(lambda config, app: app["deployments"].pop(0))
    assert "import_path" in refusal(lambda config, app: app.update(import_path="app:build"))
    assert "args.model: configs/nothing.yaml: No such file" in refusal(
        lambda config, app: app["args"].update(model="configs/nothing.yaml")
    )
    assert "args.request_timeout_s: must be below http_options.request_timeout_s, 130, not 500" in refusal(
        lambda config, app: app["args"].update(request_timeout_s=500)
    )
    (tmp_path / "file").touch()
    (tmp_path / "secret").write_text("whsec_short")
    here = {"directory": str(tmp_path)}
    for jobs, complaint in (
        ({}, "args: jobs: directory must be there, or both store and images"),
        ({"directory": str(tmp_path), "lease": 3}, "args: jobs.lease: "),
        ({"directory": f"{tmp_path}/file"}, "args.jobs.store: "),
        (
            {"store": "mysql://root:secret@host/jobs"},
            "args: jobs.store: must be sqlite:/// with a path, or begin with postgresql://",
        ),
        ({**here, "store": "sqlite:///:memory:"}, "args: jobs.store: must be"),
        ({**here, "store": "postgresql:///jobs?host=/nowhere"}, "args.jobs.store: "),
        ({**here, "images": "nowhere://images"}, "args.jobs.images: "),
        ({**here, "images": f"{tmp_path}/file"}, "args.jobs.images: "),
        ({**here, "webhooks": {"secret_file": "nowhere"}}, "args.jobs.webhooks.secret_file: "),
        ({**here, "webhooks": {"secret_file": f"{tmp_path}/secret"}}, f"{tmp_path}/secret must hold whsec_"),
    ):
        refused = refusal(lambda config, app, to=jobs: app["args"].update(jobs=to))
        assert complaint in refused
        assert "root:secret" not in refused
    for access, complaint in (
        ({}, "args: access.database: "),
        ({"database": "mysql://root:secret@host/keys"}, "args: access.database: must be sqlite:/// with a path"),
        (
            {"database": "postgresql://root:secret@host:54x/keys"},
            "args: access.database: must have a port of 1 to 65535",
        ),
        ({"database": f"sqlite:///{tmp_path}/file/keys.sqlite3"}, "args.access.database: "),
    ):
        refused = refusal(lambda config, app, to=access: app["args"].update(access=to))
        assert complaint in refused
        assert "root:secret" not in refused
    for host in ("0.0.0.0", "::"):
        assert f"args.access: must be there, or http_options.host be 127.0.0.1 in place of {host}" in refusal(
            lambda config, app, to=host: config["http_options"].update(host=to)
        )
    for options, complaint in (
        (
            {"ssl_keyfile": "nowhere", "ssl_certfile": f"{tmp_path}/file"},
            "http_options.ssl_keyfile: nowhere cannot be read",
        ),
        (
            {"ssl_keyfile": f"{tmp_path}/file", "ssl_certfile": f"{tmp_path}"},
            f"http_options.ssl_certfile: {tmp_path} cannot be read",
        ),
        ({"ssl_keyfile": f"{tmp_path}/file"}, "http_options.ssl_certfile: must be there, since ssl_keyfile is"),
        (
            {"ssl_keyfile": f"{tmp_path}/file", "ssl_certfile": f"{tmp_path}/file"},
            f"http_options.ssl_certfile: {tmp_path}/file and ssl_keyfile do not go together",
        ),
    ):
        assert complaint in refusal(lambda config, app, to=options: config["http_options"].update(to))
    for checks, complaint in (
        ({"prompt": "nowhere:check"}, "args: moderation.prompt: 'nowhere:check' cannot be imported: ModuleNotFoundErr"),
        ({"image": "math:pi"}, "args: moderation.image: must be the import path of a function, as module:function"),
        ({"prompt": "exits:check"}, "args: moderation.prompt: 'exits:check' cannot be imported: SystemExit: 3"),
        ({"image": "math:sqrt"}, "args: moderation.image: 'math:sqrt' must take image, prompt: too many"),
        ({"timeout_s": 0}, "args: moderation.timeout_s: "),
    ):
        assert complaint in refusal(lambda config, app, to=checks: app["args"].update(moderation=to))
    for origin in ("example.com", "https://*.example.com"):
        assert "args: cors_origins.0: " in refusal(lambda config, app, to=origin: app["args"].update(cors_origins=[to]))
    for prefix in ("foo", None, "/{x}"):
        assert "route_prefix: must begin with /" in refusal(lambda config, app, to=prefix: app.update(route_prefix=to))
    for key, value, complaint in (
        ("port", 70000, "must be 1 to 65535, not 70000"),
        ("port", 0, "must be 1 to 65535, not 0"),
        ("host", "", "must be an address or a name"),
        ("host", "\u00e9" * 70, "cannot be had"),
    ):
        assert complaint in refusal(lambda config, app, key=key, to=value: config["http_options"].update({key: to}))
    assert (
        "deployments.Base.max_queued_requests: must be -1 or at least 32, args.max_images_in_service, not 31"
        in refusal(lambda config, app: app["deployments"][2].update(max_queued_requests=31))
    )
    assert "proxy_location" in refusal(lambda config, app: config.update(proxy_location="Disabled"))
    assert "Base.autoscaling_config.foo: Ray" in refusal(
        lambda config, app: app["deployments"][2]["autoscaling_config"].update(foo=3)
    )
    assert "autoscaling_config" in refusal(
        lambda config, app: app["deployments"][2]["autoscaling_config"].update(min_replicas=3)
    )
    assert "Base.ray_actor_options.resources.x: must be a number, not 'y'" in refusal(
        lambda config, app: app["deployments"][2].update(ray_actor_options={"resources": {"x": "y"}})
    )
    assert "Bridge is there twice" in refusal(lambda config, app: app["deployments"].append(app["deployments"][3]))


def test_replicas_that_serve_counts_itself_are_accepted(tmp_path: Path) -> None:
    config = shipped()
    config["applications"][0]["deployments"][1]["num_replicas"] = "auto"
    application = check(written(tmp_path, config)).application
    assert starting_resources(application.deployments[1])["CPU"] == 1


@pytest.mark.parametrize(
    ("file", "change", "complaint"),
    [
        ("scheduler/scheduler_config.json", None, r"scheduler_config\.json cannot be read"),
        ("scheduler/scheduler_config.json", "{", r"scheduler_config\.json is not JSON"),
        ("vae/config.json", {"latents_mean": [0.0]}, r"vae/config\.json latents_mean must be z_dim, 16, numbers"),
        ("vae/config.json", {"latents_std": [0.0] * 16}, "latents_std must be z_dim, 16, numbers above 0"),
        (
            "transformer/config.json",
            {"axes_dims_rope": [8, 8, 8]},
            "must add up to attention_head_dim, 48",
        ),
        ("transformer/config.json", {"use_layer3d_rope": True}, "use_layer3d_rope must be false"),
        ("text_encoder/config.json", {"text_config": {"hidden_act": "foo"}}, "text_encoder cannot be loaded"),
        ("text_encoder/config.json", {"transformers_version": "6.1.0"}, r"transformers 6\.1\.0 saved it"),
        ("tokenizer/tokenizer_config.json", "{}", "names no pad_token|cannot be loaded"),
    ],
)
def test_configs_of_parts_are_refused_by_file(
    tmp_path: Path, model: Path, file: str, change: str | dict[str, Any] | None, complaint: str
) -> None:
    path = tmp_path / "checkpoints" / "scenes" / file
    if change is None:
        path.unlink()
    elif isinstance(change, str):
        path.write_text(change)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    config = shipped()
    config["applications"][0]["args"]["model"] = str(model)
    with pytest.raises(StartError, match=rf"^{model}: source: .*({complaint})"):
        check(written(tmp_path, config))


def test_half_of_what_https_needs_is_refused(tmp_path: Path) -> None:
    config = shipped()
    options = config["http_options"]
    (tmp_path / "tls").touch()
    for given, missing in (("ssl_certfile", "ssl_keyfile"), ("ssl_keyfile", "ssl_certfile")):
        config["http_options"] = {**options, given: str(tmp_path / "tls")}
        with pytest.raises(StartError, match=r"http_options\.ssl_certfile: (Both|must be there)"):
            check(written(tmp_path, config))
        config["http_options"] = {**options, given: str(tmp_path), missing: str(tmp_path / "tls")}
        with pytest.raises(StartError, match=rf"http_options\.{given}: {tmp_path} cannot be read"):
            check(written(tmp_path, config))


def test_taken_port_is_refused(tmp_path: Path) -> None:
    config = shipped()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", config["http_options"]["port"]))
        listener.listen()
        with pytest.raises(StartError, match=r"http_options\.port: 127\.0\.0\.1:\d+ cannot be had"):
            check(written(tmp_path, config))


def test_metrics_need_a_port_of_their_own(tmp_path: Path) -> None:
    config = shipped()
    args = config["applications"][0]["args"]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", args["metrics_port"]))
        listener.listen()
        with pytest.raises(StartError, match=r"args\.metrics_port: \S+ cannot be had: Address already in use"):
            check(written(tmp_path, config))
    args["metrics_port"] = config["http_options"]["port"]
    with pytest.raises(StartError, match=r"args\.metrics_port: must differ from http_options\.port, \d+"):
        check(written(tmp_path, config))


def test_traces_that_cannot_be_exported_stop_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with pytest.raises(StartError, match=r"^OTEL_TRACES_EXPORTER: no package here has the exporter zipkin"):
        check(written(tmp_path, shipped()))


def test_missing_and_damaged_files_are_refused_by_name(tmp_path: Path, model: Path) -> None:
    """Of what `stages.check` looks at, two kinds; its own tests have the others."""
    config = shipped()
    config["applications"][0]["args"]["model"] = str(model)
    path = written(tmp_path, config)
    for directory, key in (("transformer", "source"), ("bridge", "adapters.bridge.source")):
        (file,) = (tmp_path / "checkpoints" / "scenes").glob(f"**/{directory}/*.safetensors")
        whole = file.read_bytes()
        file.write_bytes(whole[:-100])
        with pytest.raises(StartError, match=rf"^{model}: {key}: .*{file.name} cannot be read as safetensors"):
            check(path)
        file.unlink()
        with pytest.raises(StartError, match=rf"^{model}: {key}: .*holds no \.safetensors file"):
            check(path)
        file.write_bytes(whole)
    check(path)


def test_command_ends_with_one_sentence_and_status_1(tmp_path: Path) -> None:
    config = shipped()
    config["applications"][0]["args"]["max_imagez"] = 3
    command = [sys.executable, "-m", "deployments", str(written(tmp_path, config))]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, len(ended.stderr.splitlines())) == (1, "", 1)
    assert "max_imagez" in ended.stderr


def test_unreadable_tokenizer_is_refused(model: Path, tmp_path: Path) -> None:
    config = shipped()
    config["applications"][0]["args"]["model"] = str(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "checkpoints" / "scenes" / "tokenizer" / name).write_text("{")
        with pytest.raises(StartError, match=r"source: .*tokenizer cannot be loaded"):
            check(written(tmp_path, config))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has such a device")
def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    pools = tmp_path / "pools.yaml"
    pools.write_text("cpu: {backend: cpu}\ngpu: {backend: cuda, resources: {}}")
    config = shipped()
    config["applications"][0]["args"]["pools"] = str(pools)
    config["applications"][0]["args"]["placement"]["Bridge"]["pool"] = "gpu"
    with pytest.raises(StartError, match=r"placement\.Bridge\.pool: this machine cannot run 'gpu': \w+"):
        check(written(tmp_path, config))


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.slow
def test_constructor_that_raises_ends_the_start_with_its_reason(tmp_path: Path) -> None:
    """Of what no check sees: that there is no compiler."""
    server = servers(MODEL)[1]
    config = copy.deepcopy(server.config)
    assert config
    (application,) = config["applications"]
    application["args"]["placement"]["Device"]["compile"] = True
    application["runtime_env"]["env_vars"] |= {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    with (
        pytest.raises(RuntimeError, match=r"cannot start: Device: .*ompiler"),
        started(replace(server, config=config), MODEL),
    ):
        pass


def test_readiness_counts_replicas_that_both_the_controller_and_ray_know() -> None:
    first, second = "SERVE_REPLICA::images#Base#1", "SERVE_REPLICA::images#Base#2"
    ran = Deployments({"images#Base": 1}, frozenset({"images#Base"}), frozenset({first}))

    assert Readiness.of(Deployments(), frozenset()).reason == "starting"
    assert Readiness.of(ran, frozenset({first})) == Readiness({"Base": 1}, None)
    # The controller does not know of the death yet, nor what the new actor is worth.
    assert Readiness.of(ran, frozenset()).reason == "no running replica of Base"
    assert Readiness.of(ran, frozenset({second})).reason == "no running replica of Base"
    loads = Deployments({"images#Base": 0}, frozenset(), frozenset({second}))
    assert Readiness.of(loads, frozenset({second})).reason == "no running replica of Base"
    scaled_to_none = Deployments({"images#Base": 0}, frozenset({"images#Base"}), frozenset())
    assert Readiness.of(scaled_to_none, frozenset()).reason is None
    one_of_two = Deployments({"images#Base": 2}, frozenset(), frozenset({first, second}))
    assert Readiness.of(one_of_two, frozenset({second})) == Readiness({"Base": 1}, None)


def test_replicas_go_on_while_their_application_is_built_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve then reports no deployments of it."""
    base = DeploymentStatusOverview(
        status=DeploymentStatus.UPDATING,
        status_trigger=DeploymentStatusTrigger.CONFIG_UPDATE_STARTED,
        replica_states={ReplicaState.RUNNING: 1, ReplicaState.UPDATING: 1},
        message="",
    )

    def report(before: Deployments, status: ApplicationStatus, *deployments: str) -> Mapping[str, int]:
        overview = ApplicationStatusOverview(status, "", 0.0, dict.fromkeys(deployments, base))
        monkeypatch.setattr(serve, "status", lambda: ServeStatus(applications={"images": overview}))
        monkeypatch.setattr("deployments.ray_internals.get", lambda name: None)
        return _ask_controller(frozenset(), before).running

    other = Deployments({"other#Base": 2})
    assert report(other, ApplicationStatus.DEPLOYING) == {}
    assert report(other, ApplicationStatus.DEPLOYING, "Base") == {"images#Base": 1}
    before = Deployments({"images#Base": 2, "other#Base": 2})
    for building in (ApplicationStatus.DEPLOYING, ApplicationStatus.DEPLOY_FAILED):
        assert report(before, building) == {"images#Base": 2}
    assert report(before, ApplicationStatus.RUNNING, "Tail") == {"images#Tail": 1}
    assert report(before, ApplicationStatus.DELETING) == {}


def test_a_stage_is_ready_when_one_of_its_deployments_is() -> None:
    runs = {"Base": ["base"], "Other": ["base", "bridge"], "Tail": ["bridge", "decode"], "Spare": []}
    names = {name: f"SERVE_REPLICA::images#{name}#1" for name in ("Ingress", *runs)}
    deployments = Deployments(
        {f"images#{name}": 1 for name in names},
        started=frozenset(names.values()),
        stages={f"images#{name}": stages for name, stages in runs.items()},
    )

    def readiness(*gone: str) -> Readiness:
        return Readiness.of(deployments, frozenset(actor for name, actor in names.items() if name not in gone))

    assert readiness("Other", "Spare").reason is None  # no plan needs what Spare runs
    assert readiness("Other").stages == {
        "base": {"Base": 1, "Other": 0}, "bridge": {"Other": 0, "Tail": 1}, "decode": {"Tail": 1}
    }  # fmt: skip
    assert readiness("Base").reason is None
    assert readiness("Base", "Other").reason == "no running replica of Base or Other (base)"
    assert readiness("Other", "Tail", "Ingress").reason == (
        "no running replica of Ingress, Other or Tail (bridge), Tail (decode)"
    )


@pytest.fixture(scope="module")
def narrow() -> Iterator[Running]:
    """All stages in one deployment, behind a queue of four, in which Serve also counts those that it hands on."""
    server = servers(MODEL)[1]
    config = copy.deepcopy(server.config)
    assert config
    for deployment in config["applications"][0]["deployments"]:
        deployment["health_check_period_s"] = 1
        if deployment["name"] == "Ingress":
            deployment.update(num_replicas=1, max_ongoing_requests=4, max_queued_requests=4)
    with started(replace(server, config=config), MODEL) as running:
        yield running


def post(running: Running, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{running.url}/v1/images/generations", json=body, timeout=120)


def get(running: Running, path: str) -> httpx.Response:
    return httpx.get(f"{running.url}{path}", timeout=30)


def at_work(running: Running, requests: int, *, begun: int) -> list[Future[httpx.Response]]:
    """Send slow requests, and return once Ingress has begun some of them."""

    def count() -> int:
        return len(log_lines(running, "Ingress", " by plan base,"))

    before, deadline = count(), time.monotonic() + 60
    pool = ThreadPoolExecutor(requests)
    answers = [pool.submit(post, running, SLOW) for _ in range(requests)]
    pool.shutdown(wait=False)
    while count() < before + begun:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return answers


def assert_error(answer: httpx.Response, status: int, code: str) -> None:
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert (answer.headers.get("retry-after") is not None) == (status == 503)


def test_start_is_quiet_and_its_last_line_tells_the_addresses(narrow: Running) -> None:
    assert narrow.dashboard.startswith("http://127.0.0.1:")  # waits until the command has seen that `/readyz` answers
    lines = narrow.log.read_text().splitlines()
    assert len(lines) <= 15, "\n".join(lines)
    assert lines[-1].startswith(f"ready: API at {narrow.url}/v1")
    assert "dashboard at http://127.0.0.1:" in lines[-1]


def test_an_image_is_a_line(narrow: Running) -> None:
    before = len(narrow.log.read_text().splitlines())
    assert post(narrow, {"prompt": "a ring", "n": 3, "seed": 5}).status_code == 200
    deadline = time.monotonic() + 20
    while len(lines := narrow.log.read_text().splitlines()[before:]) < 3 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert sorted(int(line.partition(" seed ")[2].partition(",")[0]) for line in lines) == [5, 6, 7]


def test_probes_pass_a_full_queue_whose_refusals_have_the_apis_shape(narrow: Running) -> None:
    answers = at_work(narrow, 12, begun=4)
    seconds = []
    with httpx.Client(base_url=narrow.url, timeout=30) as client:
        for path in ("/healthz", "/readyz") * 10:
            start = time.monotonic()
            assert client.get(path).status_code == 200
            seconds.append(time.monotonic() - start)
    print(f"slowest of {len(seconds)} probes: {1000 * max(seconds):.0f} ms")
    assert not all(answer.done() for answer in answers)
    statuses = [answer.result().status_code for answer in answers]
    assert statuses.count(200) >= 4
    assert set(statuses) == {200, 503}
    for answer in answers:
        if answer.result().status_code == 503:
            assert_error(answer.result(), 503, "overloaded")


def kill_replica(running: Running, deployment: str) -> float:
    """Kill a deployment's process; seconds until `/readyz` tells so."""
    title = f"ray::ServeReplica:images:{deployment}"
    (process,) = titled(running.processes(), title)
    start = time.monotonic()
    process.send_signal(signal.SIGKILL)
    while (answer := get(running, "/readyz")).status_code == 200 or deployment not in answer.json()["error"]["message"]:
        assert time.monotonic() - start < 30
        time.sleep(0.02)
    return time.monotonic() - start


def test_death_of_every_replica_is_told_at_once_and_outlived_by_what_they_had(narrow: Running) -> None:
    answers = at_work(narrow, 2, begun=2)
    seconds = {"Ingress": kill_replica(narrow, "Ingress"), "Device": kill_replica(narrow, "Device")}
    print(f"/readyz told of a death after {seconds} s")
    assert_error(get(narrow, "/readyz"), 503, "not_ready")
    assert get(narrow, "/readyz").json()["error"]["message"] == (
        "no running replica of Device (encode, base, bridge, distilled, decode), Ingress"
    )
    assert_error(post(narrow, SLOW), 503, "not_ready")
    assert_error(get(narrow, "/v1/models"), 503, "not_ready")
    for answer in answers:
        assert answer.result().status_code == 200, answer.result().text
    deadline = time.monotonic() + 240
    while get(narrow, "/readyz").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert post(narrow, {"prompt": "a ring"}).status_code == 200


def end(running: Running, name: signal.Signals, *, group: bool) -> None:
    """Send a signal while four images are made: they are answered, others refused, and no process is left."""
    answers = at_work(running, 4, begun=4)
    processes = running.processes()
    if group:
        os.killpg(running.process.pid, name)
    else:
        running.process.send_signal(name)
    while (probe := get(running, "/readyz")).status_code == 200:
        time.sleep(0.02)
    assert_error(probe, 503, "not_ready")
    assert_error(post(running, SLOW), 503, "not_ready")
    for answer in answers:
        assert answer.result().status_code == 200, answer.result().text
    assert running.process.wait(timeout=60) == 0
    _, left = psutil.wait_procs(processes, timeout=30)
    assert not left
    log = running.log.read_text()
    assert "stopped before" not in log
    assert "Traceback" not in log
    assert "SIGTERM" not in log


def test_sigterm_drains(narrow: Running) -> None:
    """Comes last of those that share the server."""
    end(narrow, signal.SIGTERM, group=False)


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.slow
def test_ctrl_c_drains() -> None:
    """A terminal sends it to the whole group."""
    with started(servers(MODEL)[1], MODEL) as running:
        end(running, signal.SIGINT, group=True)
