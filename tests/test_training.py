"""The data set, the loop, and the checkpoint that they made."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from random import Random

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
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from stages.vae import convolve_images
from training.base import encode_captions
from training.data import LABELS, NO_OBJECT, SceneBatches, SceneLatents, SizeShare, in_order, object_labels
from training.decoder import contrast
from training.loop import Schedule, one_cycle, read_config, train
from training.scenes import COLORS, FILLS, SHAPES, Scene, SceneObject, caption, examples, render, sample_scene
from training.vae import to_pixels

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
    batches = SceneBatches([SceneLatents(vae, size, tmp_path, 0, workers=1) for size in sizes], tokens=32, seed=7)
    draw = in_order(batches, workers=2)
    for index in range(3, 9):
        ahead, here = draw(index), batches[index]
        assert ahead.captions == here.captions
        assert torch.equal(ahead.latents, here.latents)
        assert torch.equal(ahead.labels, here.labels)
        assert ahead.latents.shape[:2].numel() == 32
    assert batches[3].captions != batches[4].captions


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
def test_captions_are_embedded_as_the_pipeline_embeds_prompts() -> None:
    pipeline = QwenImagePipeline.from_pretrained(CHECKPOINT)
    captions = ["a red star", "", "a large furry blue heart on a white background"]
    embeds, mask = encode_captions(pipeline, captions)
    expected, expected_mask = pipeline.encode_prompt(captions)
    assert torch.equal(mask, expected_mask.bool())
    torch.testing.assert_close(embeds[mask], expected[mask])


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


def test_tail_moves_the_bridge_by_what_the_student_makes_of_its_end(tmp_path: Path) -> None:
    config = read_config(ROOT / "training" / "scenes.yaml", "tail") | {
        "teacher_steps": 3,
        "error_weights": {"bridge": 0.0, "distilled": 1.0},
        "decoded": 1,
        "schedule": {"steps": 1, "batch_size": 4, "learning_rate": 1e-3, "save_every": 1},
    }
    config["pairs"] |= {"count": 4, "batch_size": 4}
    (tmp_path / "tail.yaml").write_text(yaml.safe_dump({"tail": config}))
    loras = {name: CHECKPOINT / "loras" / name for name in ("distilled", "bridge")}
    command = [sys.executable, "-m", "training.tail", tmp_path / "tail.yaml", CHECKPOINT, *loras.values(), tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, timeout=240)
    for name, directory in loras.items():
        before, after = (load_file(of / "pytorch_lora_weights.safetensors") for of in (directory, tmp_path / name))
        moved = {key for key, value in after.items() if not value.equal(before[key])}
        assert len(moved) > len(before) / 2, name


def test_checkpoint_is_a_small_pipeline_of_the_production_classes_for_plain_diffusers() -> None:
    pipeline = DiffusionPipeline.from_pretrained(CHECKPOINT)
    assert type(pipeline) is QwenImagePipeline
    assert type(pipeline.transformer) is QwenImageTransformer2DModel
    assert type(pipeline.vae) is AutoencoderKLQwenImage
    assert type(pipeline.text_encoder) is Qwen2_5_VLForConditionalGeneration
    assert type(pipeline.tokenizer) is Qwen2Tokenizer
    assert type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler
    for name in ("distilled", "bridge"):
        pipeline.load_lora_weights(CHECKPOINT / "loras" / name, adapter_name=name)
    assert set(pipeline.get_list_adapters()["transformer"]) == {"distilled", "bridge"}
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()) < 40e6


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
    vae = convolve_images(AutoencoderKLQwenImage.from_pretrained(CHECKPOINT / "vae", torch_dtype=torch.float32))
    scenes = [scene for scene in map(sample_scene, map(Random, range(200))) if scene.objects[0].fill == "furry"][:16]
    renders = to_pixels([render(scene, Random(0)) for scene in scenes])
    drawn = vae.decode(vae.encode(renders).latent_dist.mode()).sample
    power = [float(contrast(pixels).square().mean()) for pixels in (drawn, renders)]
    assert power[0] > 0.5 * power[1]  # 0.37 of it by errors of pixels alone
