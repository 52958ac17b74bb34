"""The quality bench: metrics on cases whose answer is known, and a short run on the real model."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import yaml
from diffusers import MagCacheConfig, QwenImagePipeline
from PIL import Image, ImageFilter
from plans import PLANS
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from backends import Backend
from bench.__main__ import main
from bench.methods import read_methods
from bench.model import latency
from bench.model.latency import RandomModel, measure
from bench.model.prune import importance, prune, without
from bench.model.ratios import measure as measure_ratios
from bench.quality import metrics
from bench.quality.cost import Cost, take_turns
from bench.quality.quality import QualityBench
from bench.quality.report import REPORT, Measured, read_rows, write_report, write_rows
from bench.quality.scorers import clip_scorer
from bench.serving.calibrate import calibrate
from bench.serving.load import LoadFigures, Sent, figures
from cluster.simulate import circulate, replay
from scenes.cases import DEV, TEST, Cases, scene_cases
from scenes.embedding import embed
from scenes.oracle import read
from scenes.renderer import render
from scenes.scene import Scene, sample_scene
from stages.config import ModelConfig
from stages.pipeline import Pipeline, Prompted
from stages.plan import Plan, StageSpec

ROOT = Path(__file__).parent.parent


def scenes(count: int, seed: int) -> list[Scene]:
    rng = Random(seed)
    return [sample_scene(rng) for _ in range(count)]


def renders(shown: list[Scene], seed: int = 0) -> list[Image.Image]:
    rng = Random(seed)
    return [render(scene, rng) for scene in shown]


def test_frechet_distance_of_a_scaled_and_shifted_set() -> None:
    """For right = 2 left + 3: |m + 3|^2 + tr(C + 4 C - 2 * 2 C)."""
    left = np.random.default_rng(0).normal(size=(200, 5)) @ np.diag([1.0, 2.0, 0.5, 1.0, 3.0])
    expected = ((left.mean(axis=0) + 3) ** 2).sum() + np.trace(np.cov(left, rowvar=False))
    assert metrics.frechet_distance(left, 2 * left + 3) == pytest.approx(expected)
    assert metrics.frechet_distance(left, left) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_of_two_points_each() -> None:
    left, right = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[2.0, 0.0], [0.0, 0.0]])
    # Within left (0/2+1)^3 = 1, within right 1; across: (2/2+1)^3 = 8 once and 1 three times.
    assert metrics.kernel_distance(left, right) == pytest.approx(1 + 1 - 2 * (8 + 3) / 4)


def test_kernel_distance_is_unbiased() -> None:
    generator = np.random.default_rng(0)
    distances = [metrics.kernel_distance(*generator.normal(size=(2, 30, 4))) for _ in range(300)]
    assert abs(np.mean(distances)) < 3 * np.std(distances) / math.sqrt(300)
    assert min(distances) < 0


def test_mean_pairwise_distance_of_a_right_triangle() -> None:
    assert metrics.mean_pairwise_distance(np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])) == pytest.approx(4)


def test_relative_entropy() -> None:
    assert metrics.relative_entropy(["a"] * 64, "abcdefgh") == 0
    assert metrics.relative_entropy([], "abcdefgh") == 0
    assert metrics.relative_entropy("ab" * 3200, "abcd") == pytest.approx(0.5, abs=1e-3)
    rng = Random(0)
    draws = [metrics.relative_entropy(rng.choices("abcdefgh", k=64), "abcdefgh") for _ in range(500)]
    assert np.mean(draws) == pytest.approx(1, abs=0.003)


def test_saturation() -> None:
    half = Image.new("RGB", (4, 4), (255, 0, 0))
    half.paste((128, 128, 128), (0, 0, 4, 2))
    assert metrics.saturation([half]) == pytest.approx(0.5)


@pytest.mark.parametrize(("frequency", "expected"), [(0.05, 0.0), (0.2, 0.0), (0.3, 0.5), (0.45, 0.5)])
def test_top_octave_power_of_a_cosine_is_half_its_square_above_a_quarter(frequency: float, expected: float) -> None:
    wave = np.cos(2 * np.pi * frequency * np.arange(64))[None, :].repeat(64, axis=0)
    assert metrics.top_octave_power(wave) == pytest.approx(expected, abs=0.02)


def test_embedding_tells_a_narrow_or_blurred_set_from_renders() -> None:
    references, fresh = embed(renders(scenes(500, 1))), scenes(300, 2)
    narrow = [replace(scene, objects=tuple(replace(o, color="red") for o in scene.objects)) for scene in fresh]
    floor, images = embed(renders(fresh)), embed(renders(narrow))
    blurred = embed([image.filter(ImageFilter.GaussianBlur(1)) for image in renders(fresh)])
    for worse in (images, blurred):
        assert metrics.frechet_distance(worse, references) > 1.5 * metrics.frechet_distance(floor, references)
        assert metrics.kernel_distance(worse, references) > 3 * metrics.kernel_distance(floor, references)
    assert metrics.mean_pairwise_distance(images) < metrics.mean_pairwise_distance(floor)


def test_pruning_takes_the_least_important_block_first(pipeline: Pipeline) -> None:
    prompted = [Prompted("a red circle", 0), Prompted("a furry star", 1, "a blue shape")]
    plan = PLANS["hybrid"].with_adapters(pipeline.config.adapters)
    packets = pipeline.enter(plan, prompted)
    moved = importance(pipeline, plan, 0, packets, range(6))
    assert importance(pipeline, without(plan, 0, frozenset({2})), 0, packets, [2])[2] == pytest.approx(moved[2])
    first, second = prune(pipeline, plan, 0, prompted, drop=2)
    assert first.stages[0].skip_blocks == {min(moved, key=lambda block: moved[block])}
    assert first.stages[0].skip_blocks < second.stages[0].skip_blocks
    assert first.stages[1:] == plan.stages[1:]
    results = [pipeline.run_batch(made, prompted[:1])[0].nfe for made in (plan, first, second)]
    assert results == pytest.approx([7, 7 - 1 / 6, 7 - 2 / 6])


def test_magnitude_ratios_are_those_of_diffusers(
    pipeline: Pipeline, diffusers_base: QwenImagePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = 6
    plan = Plan(stages=(StageSpec(name="base", sigma_start=1.0, sigma_end=0.0, steps=steps),))
    ratios = measure_ratios(pipeline, plan, [Prompted("a red circle", 3)])
    hook = MagCacheConfig(calibrate=True, num_inference_steps=steps)
    diffusers_base.transformer.enable_cache(hook)
    try:
        diffusers_base(
            "a red circle",
            true_cfg_scale=1.0,
            width=128,
            height=128,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(3),
            output_type="latent",
        )
    finally:
        diffusers_base.transformer.disable_cache()
    printed = re.search(r"^\[.*\]$", capsys.readouterr().out, re.MULTILINE)
    assert printed
    theirs = yaml.safe_load(printed[0])
    assert ratios == pytest.approx(theirs, rel=1e-4)
    assert max(ratios) > 1.02


@pytest.mark.parametrize(("split", "path"), [(0, DEV), (1, TEST)])
def test_committed_cases_are_those_of_their_generator(split: int, path: Path) -> None:
    assert Cases.read(path) == scene_cases(split)


def test_splits_share_no_seed() -> None:
    def seeds(cases: Cases) -> set[int]:
        single = {case.seed for part in (cases.accuracy, cases.plain, cases.texture, cases.negative) for case in part}
        several = {case.seed + index for case in cases.diversity for index in range(case.seeds)}
        assert len(single) == sum(map(len, (cases.accuracy, cases.plain, cases.texture, cases.negative)))
        assert not single & several
        return single | several

    assert not seeds(scene_cases(0)) & seeds(scene_cases(1))


def test_every_method_is_a_plan_that_the_model_can_run(pipeline: Pipeline) -> None:
    methods = read_methods(pipeline.config.plans)
    assert next(iter(methods["main"])) == "base"  # what speed-ups are over
    for plans in methods.values():
        for plan in plans.values():
            plan.with_adapters(pipeline.config.adapters)


@pytest.fixture(scope="module")
def bench(pipeline: Pipeline) -> QualityBench:
    """A short form of `python -m bench quality`: a few of the dev split's cases."""
    every = Cases.read(DEV)
    cases = every.part(25).model_copy(update={"plain": every.plain[:100]})
    return QualityBench(pipeline, cases, references=300)


@pytest.fixture(scope="module")
def costs(pipeline: Pipeline) -> dict[str, Cost]:
    methods = read_methods(pipeline.config.plans)["main"]
    names = ("base", "distilled, 4 steps", "hybrid")
    prompted = [Prompted("a red circle", 0), Prompted("a furry star", 1)]
    plans = [methods[name] for name in names]
    return dict(zip(names, take_turns(pipeline, plans, prompted, turns=1), strict=True))


@pytest.fixture(scope="module")
def rows(pipeline: Pipeline, bench: QualityBench, costs: dict[str, Cost]) -> dict[str, Measured]:
    """Of the renderer and of the two fast methods."""
    methods = read_methods(pipeline.config.plans)["main"]
    measured = [bench.renders()]
    for name in ("distilled, 4 steps", "hybrid"):
        measured.append(replace(bench.measure("main", name, methods[name], everything=True), **asdict(costs[name])))
    return {row.name: row for row in measured}


def test_hybrid_costs_seven_evaluations_where_base_takes_a_hundred(costs: dict[str, Cost]) -> None:
    assert {name: cost.nfe for name, cost in costs.items()} == {"base": 100, "distilled, 4 steps": 4, "hybrid": 7}
    for cost in costs.values():
        assert cost.speed_up == pytest.approx(costs["base"].denoise / cost.denoise)
        assert cost.speed_up_batched == pytest.approx(costs["base"].denoise_batched / cost.denoise_batched)


def test_calibrated_scenario_takes_what_the_server_took(pipeline: Pipeline) -> None:
    """With one client and with two."""
    alone = {"encode": 0.01, "base": 0.6, "bridge": 0.2, "distilled": 0.2, "decode": 0.3}

    def took(latency: float) -> LoadFigures:
        return figures([Sent(due=0.0, end=latency, stages=alone, error=None)], deadline=10.0)

    scenario = calibrate(
        pipeline,
        PLANS["hybrid"],
        [Prompted("a red circle", seed) for seed in range(8)],
        one_client=took(1.36),
        two_clients=took(2.2),
        rate=1.0,
        deadline=10.0,
        batch_tokens=1024,
    )
    assert replay(scenario, [0.0]).p50 == pytest.approx(1.36)
    assert circulate(scenario, 2).mean == pytest.approx(2.2, rel=0.03)
    assert scenario.devices["core"].contention > 1.05
    assert scenario.stages["base"].steps == 4  # in three parts
    assert {name: stage.max_batch for name, stage in scenario.stages.items()} == {
        "http": 1, "encode": 8, "base": 8, "bridge": 16, "distilled": 16, "decode": 8
    }  # fmt: skip


def frechet(row: Measured) -> float:
    assert row.frechet is not None
    return row.frechet


def test_renders_are_nearer_to_renders_than_images_are(rows: dict[str, Measured]) -> None:
    for name in ("distilled, 4 steps", "hybrid"):
        assert frechet(rows["renders"]) < frechet(rows[name])


@pytest.mark.long
@pytest.mark.slow
def test_renders_are_nearer_to_renders_than_images_of_base_are(bench: QualityBench, rows: dict[str, Measured]) -> None:
    row = bench.measure("main", "base", PLANS["base"], everything=True)
    assert frechet(rows["renders"]) < frechet(row)


@pytest.mark.slow
def test_attention_guidance_removes_fills_that_come_without_it(pipeline: Pipeline) -> None:
    """Fills are drawn after the hybrid plan's guided step."""
    negative = Cases.read(DEV).negative
    fills = [case for case in negative if case.attribute == "fill"]
    hybrid = PLANS["hybrid"]
    deaf = Plan(stages=tuple(stage.model_copy(update={"attention_guidance": None}) for stage in hybrid.stages))

    def left(plan: Plan) -> int:
        images = [result.image for result in pipeline.run_in_batches(plan, fills, 32)]
        return sum(
            any(thing.fill == case.value for thing in read(image).objects)
            for case, image in zip(fills, images, strict=True)
        )

    assert left(hybrid) < 0.6 * left(deaf)


def test_report_has_every_method_and_figure(rows: dict[str, Measured], tmp_path: Path) -> None:
    write_report(tmp_path, {"machine": "m <1>"}, list(rows.values()), {"Diversity": tmp_path / "diversity.webp"})
    page, table = (tmp_path / "quality.html").read_text(), (tmp_path / "quality.md").read_text()
    assert "m &lt;1&gt;" in page
    assert '<img src="diversity.webp">' in page
    for name in rows:
        assert f"<td>{name}</td>" in page
        assert f"| {name} |" in table
    stored = json.loads((tmp_path / "quality.json").read_text())["rows"]
    assert [Measured(**row) for row in stored] == list(rows.values())


@pytest.mark.slow
def test_resumed_report_measures_what_it_lacks_and_all_costs_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cases.yaml").write_text("plain: [{prompt: a red star, seed: 1}, {prompt: a moon, seed: 2}]")
    (tmp_path / "methods.yaml").write_text("main: {distilled: distilled, hybrid: hybrid}")
    drawn = {"model": "scenes", "cases": "cases.yaml", "share": "1/1"}
    write_rows(
        tmp_path / "other.json",
        {"machine": "x", **drawn},
        [Measured("main", "distilled", saturation=2.0, denoise=99.0)],
    )

    def resume(*options: str) -> None:
        files = ["--cases", tmp_path / "cases.yaml", "--methods", tmp_path / "methods.yaml", "--output", tmp_path]
        arguments = ["--resume", tmp_path / "other.json", *files, *options]
        monkeypatch.setattr("sys.argv", ["bench", "quality", *map(str, arguments)])
        main()

    with pytest.raises(ValueError, match=r"1/1.*can't be resumed by a run of.*1/2"):
        resume("--share", "2")
    resume()
    rows = {row.name: row for row in read_rows(tmp_path / REPORT, drawn).values()}
    assert rows["distilled"].saturation == 2
    assert rows["distilled"].denoise is not None
    assert rows["distilled"].denoise < 99
    assert rows["hybrid"].saturation < 1
    assert rows["hybrid"].nfe == 7


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP of the public one's classes, with random weights."""
    directory = tmp_path_factory.mktemp("clip")
    letters = [letter + end for end in ("", "</w>") for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: index for index, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    layer = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**layer, "vocab_size": len(vocabulary), "bos_token_id": 0, "eos_token_id": 1},
        vision_config={**layer, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(directory)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, CLIPTokenizer(vocabulary, [])).save_pretrained(directory)
    return directory


def test_clip_score_is_a_hundred_times_the_cosine(clip: Path) -> None:
    images, prompts = renders(scenes(4, 0)), ["a red star", "a blue ring", "a moon", "a star"]
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    with torch.no_grad():
        made = model(**processor(text=prompts, images=images, return_tensors="pt", padding=True))
    # CLIP's logits are cosines at its temperature.
    cosines = made.logits_per_image.diagonal() / model.logit_scale.detach().exp()
    assert cosines.max() > 0
    expected = 100 * cosines.clamp(min=0).mean().item()
    assert clip_scorer(str(clip), "cpu")(images, prompts) == pytest.approx(expected, rel=1e-4)


def test_model_that_no_oracle_reads_is_scored_by_its_prompts(
    monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline, clip: Path, tmp_path: Path
) -> None:
    (tmp_path / "cases.yaml").write_text("plain: [{prompt: a red star, seed: 1}, {prompt: a moon, seed: 2}]")
    (tmp_path / "methods.yaml").write_text("main: {distilled: distilled}")
    arguments = ["--cases", tmp_path / "cases.yaml", "--methods", tmp_path / "methods.yaml", "--clip", clip]
    monkeypatch.setattr("sys.argv", ["bench", "quality", *map(str, arguments), "--output", str(tmp_path)])
    main()
    (row,) = json.loads((tmp_path / "quality.json").read_text())["rows"]
    assert row["clip"] > 0
    assert row["nfe"] == 4
    assert [row[name] for name in ("frechet", "single", "entropy", "hpsv2")] == [None] * 4


def test_latency_of_a_model_without_its_weights(config: ModelConfig, backend: Backend, blocks_run: list[int]) -> None:
    model = RandomModel(config, backend)
    rows = {row.plan: row for row in measure(model, latency.plans(config), "64x64", length=8, repeats=1)}
    assert {name: row.nfe for name, row in rows.items()} == {
        "base": 100, "base + TaylorSeer": 38, "distilled, 4 steps": 4, "distilled, 8 steps": 8, "hybrid": 7,
    }  # fmt: skip
    for row in rows.values():
        assert row.speed_up == pytest.approx(rows["base"].denoise / row.denoise)
    # Of the model's six blocks; once to warm up.
    assert sum(blocks_run) == 2 * 6 * sum(row.nfe for row in rows.values())


def test_latency_of_a_quantized_model_is_kept_apart(
    monkeypatch: pytest.MonkeyPatch, config: ModelConfig, tmp_path: Path
) -> None:
    stage = StageSpec(name="distilled", steps=2, sigma_start=1.0, sigma_end=0.0)
    monkeypatch.setattr(latency, "plans", lambda config: [Plan(name="short", stages=(stage,))])
    command = ["latency", "--model", str(ROOT / "configs" / "scenes.yaml"), "--size", "64x64", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", ["bench", *command, "--quantize", "int8_weight_only", "--output", str(tmp_path)])
    main()
    content = json.loads((tmp_path / "latency-scenes-int8_weight_only.json").read_text())
    assert (content["quantize"], content["compile"]) == ("int8_weight_only", False)
    assert [row["nfe"] for row in content["rows"]] == [2]


def test_a_command_needs_only_its_own_dependencies() -> None:
    program = """import sys
sys.modules.update(ray=None, httpx=None, simpy=None, scipy=None)
from bench.__main__ import main
main()"""
    subprocess.run([sys.executable, "-c", program, "latency", "--help"], check=True, timeout=120, cwd=ROOT)


def test_figures_of_a_load() -> None:
    sent = [Sent(due=float(i), end=i + (3.0 if i == 9 else 0.5), stages={"base": 0.2}, error=None) for i in range(10)]
    made = figures([*sent, Sent(due=0.0, end=20.0, stages={}, error="503")], deadline=1.0)
    assert (made.requests, made.failed) == (11, 1)
    assert made.throughput == pytest.approx(10 / 20)
    assert made.goodput == pytest.approx(9 / 20)
    assert made.p50 == pytest.approx(0.5)
    assert made.p99 > 2.5
    assert made.stages == {"base": pytest.approx(0.2)}
    assert made.elsewhere == pytest.approx(0.75 - 0.2)
    with pytest.raises(ValueError, match="no request was answered: 503"):
        figures([Sent(0.0, 1.0, {}, "503")], deadline=1.0)
