"""Weights and images whose numbers are none, and files that are not what the model needs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from backends import Backend
from stages.batching import StepBatcher
from stages.check import check_files
from stages.config import ModelConfig
from stages.errors import NotFinite
from stages.loading import load_autoencoder, load_text_encoder, load_transformer
from stages.packet import LatentPacket
from stages.pipeline import Pipeline
from stages.plan import (
    CacheSpec,
    FirstBlockSpec,
    MagCacheSpec,
    Plan,
    SeaCacheSpec,
    StageSpec,
    TaylorSeerSpec,
    TeaCacheSpec,
)
from stages.sources import BadFile

LOADERS = {"transformer": load_transformer, "text_encoder": load_text_encoder, "vae": load_autoencoder}


def broken(packet: LatentPacket) -> LatentPacket:
    """As an overflow would leave it."""
    latent = packet.latent.clone()
    latent[3, 5] = torch.inf
    return replace(packet, latent=latent)


@pytest.mark.parametrize(
    "cache",
    [
        None,
        FirstBlockSpec(threshold=0.1),
        TaylorSeerSpec(interval=2, warmup=1),
        TeaCacheSpec(threshold=0.1, coefficients=(1.0, 0.0)),
        MagCacheSpec(threshold=0.1, ratios=(1.0,) * 4),
        SeaCacheSpec(threshold=0.1),
    ],
    ids=lambda cache: cache and cache.kind,
)
def test_a_row_that_is_not_finite_fails_alone_and_names_its_stage(pipeline: Pipeline, cache: CacheSpec | None) -> None:
    stage = StageSpec(name="base", sigma_start=1.0, sigma_end=0.0, steps=4, guidance_scale=3.0, cache=cache)
    plan = Plan(stages=(stage,))
    packets = [pipeline.encoder.begin("request", 0, seed, "64x64", "a red ring", "blue") for seed in range(2)]
    batcher = StepBatcher(pipeline.denoiser, max_tokens=128)
    bad, good = batcher.submit(broken(packets[0]), plan), batcher.submit(packets[1], plan)
    assert [len(batch) for batch in iter(batcher.step, [])] == [2] * 4
    with pytest.raises(NotFinite, match="not finite after stage base"):
        bad.result(0)
    (alone,) = pipeline.denoiser.denoise([packets[1]], plan)
    torch.testing.assert_close(good.result(0).latent, alone.latent, atol=1e-4, rtol=1e-4)


def test_of_a_batch_only_the_image_that_is_not_finite_is_not_decoded(pipeline: Pipeline) -> None:
    latents = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))
    (whole,) = pipeline.decoder.decode(latents[1:], (4, 4))
    latents[0, 3, 5] = torch.nan
    error, image = pipeline.decoder.decode(latents, (4, 4))
    assert isinstance(error, NotFinite)
    assert error.stage == "decode"
    assert np.abs(np.asarray(image).astype(int) - np.asarray(whole)).max() <= 1


@pytest.fixture
def copied(config: ModelConfig, tmp_path: Path) -> ModelConfig:
    """The small model in files that a test may change."""
    shutil.copytree(config.source, tmp_path / "model")
    return config.model_copy(update={"source": str(tmp_path / "model")})


def test_the_shipped_model_is_sound(copied: ModelConfig) -> None:
    check_files(copied)


def without_one(state: dict[str, torch.Tensor], key: str) -> None:
    del state[key]


def with_another(state: dict[str, torch.Tensor], key: str) -> None:
    state["other.weight"] = torch.zeros(2)


def in_another_shape(state: dict[str, torch.Tensor], key: str) -> None:
    state[key] = state[key][:1].clone()


def with_nan(state: dict[str, torch.Tensor], key: str) -> None:
    state[key].view(-1)[0] = torch.nan


@pytest.mark.parametrize("part", LOADERS)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_one, "lacks '"),
        (with_another, "has, which the model does not take, 'other.weight'"),
        (in_another_shape, "has in another shape '"),
        (with_nan, "holds numbers that are not finite, in '"),
    ],
)
def test_weights_that_are_not_the_models_or_not_finite_stop_the_check_and_the_start(
    copied: ModelConfig,
    backend: Backend,
    part: str,
    change: Callable[[dict[str, torch.Tensor], str], None],
    reason: str,
) -> None:
    (file,) = (Path(copied.source) / part).glob("*.safetensors")
    state = load_file(file)
    key = sorted(name for name, tensor in state.items() if tensor.ndim >= 2 and "embed" not in name)[0]
    change(state, key)
    save_file(state, file, metadata={"format": "pt"})
    for action in (lambda: check_files(copied), lambda: LOADERS[part](copied, backend)):
        with pytest.raises(BadFile) as caught:
            action()
        assert str(caught.value).startswith(f"source: {file} {reason}"), str(caught.value)


@pytest.mark.parametrize("part", LOADERS)
def test_a_file_that_is_missing_or_truncated_is_named(copied: ModelConfig, backend: Backend, part: str) -> None:
    directory = Path(copied.source) / part
    (file,) = directory.glob("*.safetensors")

    def refused() -> str:
        with pytest.raises(BadFile) as caught:
            LOADERS[part](copied, backend)
        with pytest.raises(BadFile) as checked:
            check_files(copied)
        assert str(caught.value) == str(checked.value)
        return str(caught.value)

    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file} cannot be read as safetensors, it may be truncated" in refused()
    file.unlink()
    assert f"{directory} holds no .safetensors file" in refused()
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"some.weight": "model-1.safetensors"}}))
    assert f"{directory / 'model-1.safetensors'} is missing, which {index.name} names" in refused()
    (directory / "config.json").unlink()
    assert f"{directory / 'config.json'} is missing" in refused()
    shutil.rmtree(directory)
    assert f"has no directory '{part}'" in refused()


def test_a_source_that_is_nowhere_is_named(copied: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadFile, match="source: nobody/nothing is neither a directory nor a repo that can be read"):
        check_files(copied.model_copy(update={"source": "nobody/nothing"}))
