"""The commands of `python -m bench` that no other test runs, each in its shortest form."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from typing import Protocol

import psutil
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from bench.__main__ import COMMANDS, main
from bench.methods import read_methods
from bench.models import SCENES
from bench.serving import pools, serving
from bench.serving.handover import WAYS
from bench.serving.load import Sent
from bench.serving.servers import Running, Server
from bench.serving.traffic import mixed
from deployments.check import read_config
from scenes.cases import DEV, TEST
from scenes.embedding import WEIGHTS
from stages.config import ModelConfig


class Command(Protocol):
    def __call__(self, *arguments: object) -> None: ...


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `python -m bench` with these arguments in this process, so that torch is not loaded anew."""

    def run(*arguments: object) -> None:
        monkeypatch.setattr("sys.argv", ["bench", *map(str, arguments)])
        main()

    return run


_SECONDS = 1e-5  # that a stage claims to take: less than any answer takes in all


class _Images(BaseHTTPRequestHandler):
    """Answers requests for images at once, with timings and no image."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        stages = ("encode", "base", "bridge", "distilled", "decode")
        timings = [
            {"stage": stage, "start": _SECONDS * at, "end": _SECONDS * (at + 1), "seconds": _SECONDS, "nfe": 1.0}
            for at, stage in enumerate(stages)
        ]
        body = json.dumps({"data": [{"seed": request["seed"], "timings": timings}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *values: object) -> None:
        pass


@contextmanager
def _answering() -> Iterator[str]:
    """The URL of a server of `_Images`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Images) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_tells_its_arguments(command: Command, capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as ended:
        command(name, "--help")
    assert ended.value.code == 0
    assert f"usage: python -m bench {name}" in capsys.readouterr().out


def test_grid(command: Command, tmp_path: Path) -> None:
    command("grid", SCENES, tmp_path / "grid.png", "--plans", "distilled", "--seeds", 1)
    with Image.open(tmp_path / "grid.png") as sheet:
        assert (sheet.width, sheet.height // 3) == (128, 128 + 16 + 5)


def test_pruned_plans_are_methods(command: Command, config: ModelConfig, tmp_path: Path) -> None:
    command("prune", tmp_path / "pruned.yaml", "--prompts", 1, "--drop", 1)
    methods = read_methods(config.plans, tmp_path / "pruned.yaml")["pruned"]
    assert [len(plan.stages[0].skip_blocks) for plan in methods.values()] == [0, 1]


def test_ratios(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    command("ratios", "--plan", "hybrid", "--prompts", 1)  # whose first stage has one step
    assert capsys.readouterr().out == "cache: {kind: magcache, threshold: 0.1, ratios: [1.0000]}\n"


def test_evaluation_ends_by_its_bars(command: Command, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        command("evaluate", "--plans", "distilled", "--captions", 4, "--json", tmp_path / "reports.json")
    content = json.loads((tmp_path / "reports.json").read_text())
    assert ended.value.code == ("\n".join(content["misses"]) or None)
    (report,) = content["reports"]
    assert (report["plan"], report["captions"], report["removal"]) == ("distilled", 4, None)
    assert report["both"] >= 0.5


def test_cases_are_written_as_they_are_committed(command: Command, tmp_path: Path) -> None:
    command("cases", tmp_path)
    for committed in (DEV, TEST):
        assert (tmp_path / committed.name).read_text() == committed.read_text()


def test_embedding_is_trained_to_the_shape_of_the_committed_one(command: Command, tmp_path: Path) -> None:
    command("embedding", tmp_path / "weights.safetensors", "--steps", 2)
    trained, committed = load_file(tmp_path / "weights.safetensors"), load_file(WEIGHTS)
    assert {name: (part.shape, part.dtype) for name, part in trained.items()} == {
        name: (part.shape, part.dtype) for name, part in committed.items()
    }


def test_trace_has_a_slice_for_each_stage_of_each_image(command: Command, tmp_path: Path) -> None:
    with _answering() as url:
        command("trace", tmp_path / "trace.json", "--url", url, "--requests", 2)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sorted(event["name"] for event in events if event["ph"] == "X") == ["image 0"] * 5 + ["image 1"] * 5


@contextmanager
def _started(server: Server, model: Path) -> Iterator[Running]:
    """What answers without a model in place of a server."""
    with _answering() as url:
        yield Running(url, psutil.Process(), Path(), None)


def test_pools_are_loaded_apart_and_together(monkeypatch: pytest.MonkeyPatch, command: Command, tmp_path: Path) -> None:
    monkeypatch.setattr(pools, "started", _started)
    command("pools", "--seconds", 1e-4, "--output", tmp_path)
    content = json.loads((tmp_path / "pools.json").read_text())
    closed = [(row["pools"], row["load"]) for row in content["rows"][:5]]
    loads = [(["fast"], 1), (["slow"], 1), (["fast"], 8), (["slow"], 8), (["fast", "slow"], 8)]
    assert closed == [(chosen, f"concurrency {clients}") for chosen, clients in loads]
    assert [row["pools"] for row in content["rows"][5:]] == [["fast"], ["fast", "slow"]]
    assert content["comparisons"].keys() == {"throughput", "p95"}
    assert len(content["forecasts"]) == 3


def test_the_server_of_two_pools_is_one_that_starts(tmp_path: Path) -> None:
    """Of its application the check knows all but the import path."""
    config = pools.two_pools(SCENES, 0.25, tmp_path).config
    assert config
    config["applications"][0]["import_path"] = "deployments.app:build"
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    settings = read_config(tmp_path / "serve.yaml").settings
    assert settings.pools_by_stage["base"] == ("fast", "slow")


def test_a_loop_is_full_from_its_first_answer_to_its_last_request() -> None:
    sent = [Sent(due, due + 2.0, {}, None) for due in (0.0, 0.5, 2.0, 2.5, 4.0)]
    assert pools.steady(sent) == 2 / 2.0
    with pytest.raises(ValueError, match="too short"):
        pools.steady(sent[:1])


@pytest.mark.long
@pytest.mark.slow
def test_serving_reports_every_server(monkeypatch: pytest.MonkeyPatch, command: Command, tmp_path: Path) -> None:
    """Beside bare images by the real model; what is started in place of the servers answers without one."""

    monkeypatch.setattr(serving, "started", _started)
    monkeypatch.setattr(serving, "mixed", lambda cases: mixed(cases)[:8])
    command("serving", "--concurrencies", 2, "--seconds", 0.05, "--output", tmp_path)
    content = json.loads((tmp_path / "serving.json").read_text())
    assert len({row["server"] for row in content["rows"]}) == 4
    assert [len({overhead[key] for overhead in content["overheads"]}) for key in ("server", "size")] == [2, 2]
    assert len(content["forecasts"]) == 3


@pytest.mark.ray
def test_handover_reports_every_way_on_one_node(command: Command, tmp_path: Path) -> None:
    command(
        "handover",
        "--clusters",
        "one node",
        "--sizes",
        1024,
        "--text-tokens",
        512,
        "--repeats",
        2,
        "--output",
        tmp_path,
    )
    content = json.loads((tmp_path / "handover.json").read_text())
    assert {(row["way"], row["form"]["dtype"]) for row in content["rows"]} == set(
        product(WAYS, ("bfloat16", "float32"))
    )
    assert content["skipped"] == {}
    for row in content["rows"]:
        assert row["bytes"] > (64 * 64 * 64 + 576 * 3584) * (2 if row["form"]["dtype"] == "bfloat16" else 4)
        assert row["milliseconds"] > 0
        if row["copies"] is not None:
            assert row["copies"] == pytest.approx(2, abs=0.01) if row["way"] == "packet" else row["copies"] >= 1
