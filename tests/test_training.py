"""The data set, the loop, and the checkpoint that they made."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import (
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from PIL import Image, ImageChops
from plans import PLANS
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from backends import Backend
from scenes.captions import caption
from scenes.examples import examples
from scenes.renderer import render
from scenes.scene import COLORS, FILLS, SHAPES, Scene, SceneObject, sample_scene
from stages.denoise import join_negative
from stages.families.qwen_image import EMPTY_PROMPT
from stages.families.qwen_image.autoencoder import convolve_images
from stages.lora_files import linear_layers, read_lora
from stages.pipeline import Pipeline, Prompted
from stages.plan import Plan
from stages.sigmas import stage_sigmas
from training.average import average
from training.lib.adapters import active, lora_parameters
from training.lib.contrast import contrast
from training.lib.data import LABELS, NO_OBJECT, SceneBatches, SceneLatents, SizeShare, in_order, object_labels
from training.lib.images import to_pixels
from training.lib.loop import Schedule, load_pipeline, one_cycle, read_config, train
from training.lib.optimize import StackedMuon
from training.lib.prompts import Prompts
from training.lib.sampling import model_config, sample_grid
from training.lib.teacher import Trajectories, draw_trajectories, hand_over, teacher_stages
from training.lib.text import embed, embed_pairs
from training.lib.velocity import conditional, guided, integrate

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "checkpoints" / "scenes"


def test_scenes_are_the_same_for_the_same_seed() -> None:
    first, again, other = (list(islice(examples(seed), 5)) for seed in (3, 3, 4))
    assert [(image.tobytes(), text) for image, text in first] == [(image.tobytes(), text) for image, text in again]
    assert [text for _, text in first] != [text for _, text in other]


def test_captions_leave_attributes_unsaid_and_some_are_empty() -> None:
    rng = Random(0)
    scenes = [sample_scene(rng) for _ in range(4000)]
    captions = [caption(scene, rng) for scene in scenes]
    empty = sum(not text.strip() for text in captions) / len(captions)
    named = sum(scene.objects[0].color in text for scene, text in zip(scenes, captions, strict=True)) / len(captions)
    assert 0.10 <= empty <= 0.15
    assert 0.5 <= named <= 0.7


def test_listed_values_have_one_that_the_scene_has() -> None:
    rng = Random(1)
    scenes = [sample_scene(rng, 1) for _ in range(1000)]
    lists = [(scene, text) for scene in scenes if ", " in (text := caption(scene, rng))]
    assert len(lists) > 60
    for scene, text in lists:
        (thing,) = scene.objects
        own = {thing.shape, thing.color, thing.size, thing.fill, scene.background}
        assert any(word in own for item in text.split(", ") for word in item.rstrip(".!").split())


@pytest.mark.parametrize(("asked", "kept"), [("a star", True), ("a red star", False), ("a shape.", True)])
def test_nothing_is_to_be_avoided_that_the_prompt_asks_for(asked: str, kept: bool) -> None:
    prompts = Prompts(None, None)
    avoided = [prompts.draw_negative(Random(seed), asked, 1.0) for seed in range(200)]
    assert any("red" in text for text in avoided) is kept
    assert all("star" not in text for text in avoided) is ("star" in asked)


def test_kept_latents_are_those_of_the_scenes_that_they_are_captioned_as(tmp_path: Path) -> None:
    vae = AutoencoderKLQwenImage.from_pretrained(CHECKPOINT / "vae")
    size = SizeShare(width=64, height=64, count=3, share=1.0)
    first, other, again = (SceneLatents(vae, size, tmp_path, seed) for seed in (0, 1, 0))
    assert torch.equal(first.latents, again.latents)
    assert first.scenes == again.scenes
    assert first.scenes != other.scenes
    assert (first.latents - other.latents).abs().max() > 0.1


def test_batches_drawn_ahead_are_those_of_their_indices(tmp_path: Path) -> None:
    vae = AutoencoderKLQwenImage.from_pretrained(CHECKPOINT / "vae")
    sizes = [SizeShare(width=64, height=64, count=6, share=0.5), SizeShare(width=64, height=128, count=6, share=0.5)]
    sets = [SceneLatents(vae, size, tmp_path, 0, workers=1) for size in sizes]

    def letters(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.tensor([[ord(letter) for letter in caption.ljust(120)] for caption in captions])
        return codes, codes != ord(" ")

    batches = SceneBatches(sets, tokens=32, seed=7, tokenize=letters)
    draw = in_order(batches, workers=2)
    for index in range(3, 9):
        ahead, here = draw(index), batches[index]
        assert ahead.chosen == here.chosen
        for name in ("rows", "tokens", "mask"):
            assert torch.equal(getattr(ahead, name), getattr(here, name))
        rows, columns = sets[ahead.chosen].grid
        assert len(ahead.rows) * rows * columns == 32
    assert not torch.equal(batches[3].tokens, batches[4].tokens)


def test_labels_name_the_object_that_a_token_shows() -> None:
    def thing(shape: str, color: str, x: float) -> SceneObject:
        return SceneObject(shape=shape, color=color, size="small", fill="furry", x=x, y=0.5, radius=0.2)

    two = Scene((thing("star", "red", 0.25), thing("moon", "blue", 0.75)), "white")
    one = Scene((thing("ring", "green", 0.25),), "white")
    labels = object_labels([two, one], SizeShare(64, 64, count=2, share=1.0), patch=16).view(2, 4, 4, len(LABELS))

    def indices(shape: str, color: str) -> list[int]:
        return [SHAPES.index(shape), list(COLORS).index(color), FILLS.index("furry")]

    assert labels[0, 1, 0].tolist() == indices("star", "red")
    assert labels[0, 2, 3].tolist() == indices("moon", "blue")
    assert labels[1, 1, 1].tolist() == indices("ring", "green")
    assert (labels[1, :, 3] == NO_OBJECT).all()


@torch.no_grad()
def test_prompts_are_embedded_as_the_pipeline_embeds_them() -> None:
    pipeline = QwenImagePipeline.from_pretrained(CHECKPOINT)
    prompts = ["a red star", "", "a large furry blue heart on a white background"]
    text = embed(pipeline, prompts, length=32)
    expected, expected_mask = pipeline.encode_prompt(prompts)
    longest = expected.shape[1]
    assert torch.equal(text.mask[:, :longest], expected_mask.bool())
    assert not text.mask[:, longest:].any()
    torch.testing.assert_close(text.embeds[text.mask], expected[expected_mask.bool()])
    with pytest.raises(ValueError, match="more than 8"):
        embed(pipeline, prompts, length=8)


@torch.no_grad()
def test_joined_prompts_are_those_that_the_engine_joins() -> None:
    pipeline = QwenImagePipeline.from_pretrained(CHECKPOINT)
    texts = embed_pairs(pipeline, ["a red star", "a moon"], ["furry", " "], length=16)
    joined = texts.joined()
    for row in range(2):
        prompt, negative = (text.embeds[row][text.mask[row]] for text in (texts.prompt, texts.negative))
        assert torch.equal(joined.embeds[row][joined.mask[row]], join_negative(prompt, negative))


LORAS = {name: CHECKPOINT / "loras" / name for name in ("bridge", "distilled", "finish")}
WEIGHTS = "pytorch_lora_weights.safetensors"
PROMPTS, NEGATIVES = ["a red star", "a small blue moon on the left"], ["a furry shape", " "]
# Training leaves attention guidance to the engine.
PLANS_IN_TRAINING = [
    plan.model_copy(
        update={"stages": tuple(stage.model_copy(update={"attention_guidance": None}) for stage in plan.stages)}
    )
    for plan in (PLANS["hybrid"], PLANS["distilled"])
]


@pytest.fixture(scope="module")
def trained() -> QwenImagePipeline:
    """As training loads it, with all LoRAs of the checkpoint."""
    pipeline = load_pipeline(CHECKPOINT, torch.device("cpu"))
    pipeline.transformer.requires_grad_(False)
    for name, directory in LORAS.items():
        pipeline.load_lora_weights(directory, adapter_name=name)
    return pipeline


@pytest.fixture(scope="module")
def engine(backend: Backend) -> Pipeline:
    return Pipeline(model_config(CHECKPOINT, LORAS, "64x64"), backend)


@pytest.mark.parametrize(
    ("plan", "position"),
    [(plan, position) for plan in PLANS_IN_TRAINING for position in range(len(plan.stages))],
    ids=lambda value: value.name if isinstance(value, Plan) else str(value),
)
def test_steps_that_gradients_pass_are_the_engines(
    engine: Pipeline, trained: QwenImagePipeline, plan: Plan, position: int
) -> None:
    """Prompts of several lengths, one with something to avoid, padded to a fixed length."""
    stage, grid = plan.stages[position], (4, 4)
    images = [
        Prompted(prompt, seed, negative) for seed, (prompt, negative) in enumerate(zip(PROMPTS, NEGATIVES, strict=True))
    ]
    packets = [
        replace(packet, sigma=stage.sigma_start, position=position) for packet in engine.enter(plan, images, "64x64")
    ]
    expected = torch.stack([packet.latent for packet in engine.denoise(packets, plan)])

    texts = embed_pairs(trained, PROMPTS, NEGATIVES, length=24)
    transformer = trained.transformer
    if stage.guided:
        velocity = guided(transformer, texts, grid, stage.guidance_scale)
    else:
        velocity = conditional(transformer, texts.read_by(stage), grid)
    latents = torch.stack([packet.latent for packet in packets]).requires_grad_()
    with active(transformer, stage.adapter):
        reached = integrate(velocity, latents, stage_sigmas(stage, trained.scheduler, tokens=16))
    torch.testing.assert_close(reached, expected, rtol=1e-3, atol=1e-4)
    assert float((reached - latents).detach().abs().max()) > 0.1

    learning = [] if stage.adapter is None else lora_parameters(transformer, stage.adapter)
    gradients = torch.autograd.grad(reached.square().mean(), [latents, *learning], materialize_grads=True)
    assert all(gradient.isfinite().all() for gradient in gradients)
    # Nothing follows what the last block does to the text.
    assert sum(bool(gradient.any()) for gradient in gradients) > 0.9 * len(gradients)


def _drawn(engine: Pipeline, plan: Plan) -> Trajectories:
    config = {"count": 3, "batch_size": 2, "seed": 5, "negative_share": 1.0}
    return draw_trajectories(engine, plan, Prompts(PROMPTS, NEGATIVES[:1]), config)


@torch.no_grad()
def test_trajectories_are_the_guided_models_from_noise_by_each_level(
    engine: Pipeline, trained: QwenImagePipeline, tmp_path: Path
) -> None:
    levels = [1.0, 0.75, 0.5, 0.0]
    stages = teacher_stages(levels, steps=8, guidance_scale=3.0)
    assert [stage.steps for stage in stages] == [2, 2, 4]
    _drawn(engine, Plan(stages=stages)).save(tmp_path)
    taught = Trajectories.load(tmp_path)
    assert taught.latents.shape == (4, 4, 16, 64)
    assert taught.sigmas.tolist() == levels
    assert taught.size == "64x64"
    assert set(taught.negative_prompts) == set(NEGATIVES[:1])

    latents = taught.latents[:, 0].float()
    assert 0.9 < float(latents.std()) < 1.1
    assert not torch.equal(latents[0], latents[1])
    velocity = guided(trained.transformer, taught.texts(trained, length=24), taught.grid, 3.0)
    with active(trained.transformer, None):
        for level, stage in enumerate(stages, start=1):
            latents = integrate(velocity, latents, stage_sigmas(stage, trained.scheduler, tokens=16))
            torch.testing.assert_close(latents, taught.latents[:, level].float(), rtol=0, atol=0.05)  # in bfloat16


def test_bridge_starts_where_a_user_gets_the_base_stages_latent(engine: Pipeline) -> None:
    """With the attention guidance of the plan that is served, and for an image that avoids nothing as well."""
    plan, stages = PLANS["hybrid"], 3
    images = [Prompted("a red star", 1, "a furry shape"), Prompted("a moon", 2), Prompted("a blue ring", 3)]
    packets = engine.enter(plan, images)
    noise = torch.stack([packet.latent for packet in packets]).bfloat16()
    for _ in range(stages):
        packets = engine.denoise(packets, plan)
    expected = torch.stack([packet.latent for packet in packets])

    texts = [image.prompt for image in images], [image.negative_prompt or EMPTY_PROMPT for image in images]
    taught = Trajectories(torch.tensor([1.0]), noise[:, None], *texts, (4, 4))
    handed_over = hand_over(engine, plan, stages, taught, batch=2)
    torch.testing.assert_close(handed_over.float(), expected, rtol=0, atol=0.05)  # in bfloat16


def test_tails_teacher_goes_on_from_where_base_hands_over(engine: Pipeline) -> None:
    before = PLANS["hybrid"].stages[:3]
    plan = Plan(stages=(*before, *teacher_stages([0.75, 0.5, 0.0], 3, 4.0, "bridge")))
    drawn = _drawn(engine, plan)
    assert [drawn.level(sigma) for sigma in (0.75, 0.5, 0.0)] == [3, 4, 5]
    handed_over = hand_over(engine, PLANS["hybrid"], 3, drawn)
    torch.testing.assert_close(handed_over.float(), drawn.latents[:, 3].float(), rtol=0, atol=0.05)  # in bfloat16


def test_samples_are_the_engines_and_leave_no_memory_taken(backend: Backend, tmp_path: Path) -> None:
    def weights() -> int:
        return sum(type(thing) is torch.nn.Parameter for thing in gc.get_objects())

    path, config = tmp_path / "samples.png", model_config(CHECKPOINT, LORAS)
    gc.disable()  # memory must not wait for the collector
    try:
        before = weights()
        sample_grid(config, backend, PLANS["distilled"].stages, path)
        assert weights() == before
    finally:
        gc.enable()
    with Image.open(path) as sheet:
        assert sheet.size == (4 * 130, 6 * 130)
        second = sheet.crop((130, 0, 258, 128))
    (result,) = Pipeline(config, backend).run(PLANS["distilled"], "a red star", seeds=[1])
    assert np.asarray(ImageChops.difference(second, result.image)).max() <= 2


def test_stacked_muon_is_torchs() -> None:
    torch.manual_seed(0)
    shapes = [(8, 4), (4, 8), (8, 4), (8, 4), (2, 2)]
    trained = 3  # what follows has no gradient
    weights = [torch.randn(shape) for shape in shapes]
    own, reference = ([torch.nn.Parameter(weight.clone()) for weight in weights] for _ in range(2))
    optimizers = [StackedMuon(own, lr=0.1), torch.optim.Muon(reference, lr=0.1, weight_decay=0.0)]
    for _ in range(3):
        gradients = [torch.randn(shape) for shape in shapes[:trained]]
        for parameters, optimizer in zip((own, reference), optimizers, strict=True):
            for parameter, gradient in zip(parameters[:trained], gradients, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
    for mine, theirs in zip(own, reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-3)  # in bfloat16, whose sums have another order


class _Stop(Exception):
    pass


@pytest.mark.parametrize("stop_at", [4, 7])
def test_interrupted_training_resumes_to_the_same_weights(tmp_path: Path, stop_at: int) -> None:
    schedule = Schedule(steps=9, batch_size=4, learning_rate=0.1, save_every=2)

    def run(directory: Path, stop: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        accelerator = Accelerator(cpu=True)
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, one_cycle(optimizer, schedule))

        def step(index: int) -> dict[str, torch.Tensor]:
            if index == stop:
                raise _Stop
            inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(index))
            loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            return {"loss": loss.detach()}

        train(accelerator, directory, schedule, step, lambda path: None)
        return model.weight.detach().clone()

    whole = run(tmp_path / "whole", None)
    with pytest.raises(_Stop):
        run(tmp_path / "parts", stop_at)
    assert torch.equal(run(tmp_path / "parts", None), whole)


def test_config_without_the_section_is_named(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("base: {}\n")
    with pytest.raises(KeyError, match=r"no section 'bridge'; it has \['base'\]"):
        read_config(config, "bridge")


def test_tail_moves_the_bridge_by_what_the_finish_makes_of_its_end(tmp_path: Path) -> None:
    config = read_config(ROOT / "training" / "scenes.yaml", "tail") | {
        "teacher_steps": 3,
        "error_weights": {"bridge": 0.0, "finish": 1.0},
        "decoded": 1,
        "schedule": {"steps": 1, "batch_size": 4, "learning_rate": 1e-3, "save_every": 1},
    }
    config["pairs"] |= {"count": 4, "batch_size": 4}
    (tmp_path / "tail.yaml").write_text(yaml.safe_dump({"tail": config}))
    loras = {name: LORAS[name] for name in ("finish", "bridge")}
    paths = [str(path) for path in (tmp_path / "tail.yaml", CHECKPOINT, *loras.values(), tmp_path)]
    command = [sys.executable, "-m", "training.tail", *paths]
    subprocess.run(command, cwd=ROOT, check=True, timeout=240)
    for name, directory in loras.items():
        before, after = (load_file(of / WEIGHTS) for of in (directory, tmp_path / name))
        moved = {key for key, value in after.items() if not value.equal(before[key])}
        assert len(moved) > len(before) / 2, name


def test_average_is_of_the_factors_and_serves_as_a_lora(
    tmp_path: Path, transformer: QwenImageTransformer2DModel
) -> None:
    loras = [LORAS[name] for name in ("distilled", "finish")]  # of which one began as the other
    command = [sys.executable, "-m", "training.average", str(tmp_path / "mean")]
    subprocess.run([*command, *map(str, loras)], cwd=ROOT, check=True, timeout=240)
    first, second, mean = (load_file(of / WEIGHTS) for of in (*loras, tmp_path / "mean"))
    assert mean.keys() == first.keys()
    for key, value in mean.items():
        torch.testing.assert_close(value, ((first[key].float() + second[key].float()) / 2).to(value.dtype))
    assert read_lora("mean", tmp_path / "mean" / WEIGHTS, linear_layers(transformer))

    other = tmp_path / "other"
    other.mkdir()
    save_file({key: value[:1] for key, value in first.items()}, other / WEIGHTS)
    with pytest.raises(ValueError, match="other has other layers or ranks than"):
        average([loras[0], other])


def test_checkpoint_is_a_small_pipeline_of_the_production_classes_for_plain_diffusers() -> None:
    pipeline = DiffusionPipeline.from_pretrained(CHECKPOINT)
    assert type(pipeline) is QwenImagePipeline
    assert type(pipeline.transformer) is QwenImageTransformer2DModel
    assert type(pipeline.vae) is AutoencoderKLQwenImage
    assert type(pipeline.text_encoder) is Qwen2_5_VLForConditionalGeneration
    assert type(pipeline.tokenizer) is PreTrainedTokenizerFast
    assert type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler
    for name in ("distilled", "bridge", "finish"):
        pipeline.load_lora_weights(CHECKPOINT / "loras" / name, adapter_name=name)
    assert set(pipeline.get_list_adapters()["transformer"]) == {"distilled", "bridge", "finish"}
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()) < 40e6


@torch.no_grad()
def test_case_of_prompts_does_not_matter() -> None:
    pipeline = DiffusionPipeline.from_pretrained(CHECKPOINT)
    (lower, _), (upper, _) = (pipeline.encode_prompt(prompt) for prompt in ("a red star", "A Red STAR"))
    assert torch.equal(lower, upper)


def test_pipelines_template_is_the_34_tokens_that_diffusers_drops() -> None:
    pipeline = DiffusionPipeline.from_pretrained(CHECKPOINT)
    template = pipeline.prompt_template_encode.partition("{}")[0]
    assert len(pipeline.tokenizer(template).input_ids) == pipeline.prompt_template_encode_start_idx
    vocabulary = json.loads((CHECKPOINT / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    assert "\u0120star" in vocabulary  # a word is one token


def test_contrast_is_apart_by_direction() -> None:
    rows = torch.ones(1, 3, 1, 16, 16)
    rows[..., ::2, :] = -1
    right, down, *diagonals = contrast(rows).mean((0, 2, 3)).split(3)
    assert torch.allclose(right, torch.tensor(0.001))
    for other in (down, *diagonals):
        assert torch.allclose(other, torch.tensor(2.0))


@torch.inference_mode()
def test_checkpoints_decoder_draws_fur() -> None:
    vae = convolve_images(AutoencoderKLQwenImage.from_pretrained(CHECKPOINT / "vae", dtype=torch.float32))
    scenes = [scene for scene in map(sample_scene, map(Random, range(200))) if scene.objects[0].fill == "furry"][:16]
    renders = to_pixels([render(scene, Random(0)) for scene in scenes])
    drawn = vae.decode(vae.encode(renders).latent_dist.mode()).sample
    power = [float(contrast(pixels).square().mean()) for pixels in (drawn, renders)]
    assert power[0] > 0.5 * power[1]  # 0.37 of it by errors of pixels alone
