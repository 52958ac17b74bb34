"""Gaudi's backend over a stand-in for its runtime.

`tests/pools/test_gaudi_names.py` holds the names and arguments that it uses against the library that runs on the
device, and `test_gaudi_environment.py` beside it runs the stand-in under the releases that this library pins.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from habana_stand_in import gaudi_on_cpu
from torch import nn

from backends import GaudiBackend, Memory
from stages.config import ModelConfig
from stages.pipeline import Pipeline, Prompted

IMAGES = [Prompted("a red star", 1, "blue"), Prompted("a small furry green square left of a large blue triangle", 2)]


@pytest.fixture(scope="module")
def calls() -> Iterator[Counter[str]]:
    """What was called of the runtime, by name."""
    with gaudi_on_cpu() as counts:
        yield counts


@pytest.fixture(scope="module")
def gaudi(calls: Counter[str]) -> GaudiBackend:
    return GaudiBackend()


@pytest.fixture(scope="module")
def fused(gaudi: GaudiBackend, config: ModelConfig) -> Pipeline:
    return Pipeline(config.model_copy(update={"dtype": "float32"}), gaudi)


def test_a_machine_without_the_runtime_says_so() -> None:
    assert "habana_frameworks is not installed" in (GaudiBackend().missing or "")


def test_what_else_a_machine_lacks(gaudi: GaudiBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gaudi.missing is None
    monkeypatch.setattr(sys.modules["habana_frameworks.torch"].hpu, "is_available", lambda: False)
    assert gaudi.missing == "habana_frameworks finds no device"
    monkeypatch.delenv("PT_HPU_LAZY_MODE")
    assert gaudi.missing == "PT_HPU_LAZY_MODE says neither 0 nor 1"


def test_memory_and_waiting_are_the_runtimes(gaudi: GaudiBackend, calls: Counter[str]) -> None:
    assert gaudi.memory() == Memory(in_use=32, free=64)
    before = calls["synchronize"]
    gaudi.synchronise()
    assert calls["synchronize"] == before + 1


@pytest.mark.parametrize("plan", ["distilled", "hybrid"])
def test_images_are_those_of_the_processor(fused: Pipeline, pipeline: Pipeline, calls: Counter[str], plan: str) -> None:
    """With masks, guidance, adapters, and the encoder's causal attention of grouped queries."""
    calls.clear()
    stages = fused.config.plan(plan)
    ours, truths = fused.enter(stages, IMAGES), pipeline.enter(stages, IMAGES)
    for packet, truth in zip(ours, truths, strict=True):
        torch.testing.assert_close(packet.prompt_embeds, truth.prompt_embeds, rtol=0, atol=2e-5)
    for _ in stages.stages:
        ours, truths = fused.denoise(ours, stages), pipeline.denoise(truths, stages)
    for packet, truth in zip(ours, truths, strict=True):
        torch.testing.assert_close(packet.latent, truth.latent, rtol=0, atol=2e-5)
    blocks = fused.denoiser.blocks * sum(stage.steps for stage in stages.stages)
    assert calls["attend"] > blocks
    assert calls["mark_step"] > blocks


def test_attention_is_fused_once(gaudi: GaudiBackend, fused: Pipeline, calls: Counter[str]) -> None:
    once = F.scaled_dot_product_attention
    gaudi.place(nn.Linear(2, 2))
    assert F.scaled_dot_product_attention is once
    calls.clear()
    once(*torch.randn(3, 1, 2, 4, 8))
    assert calls["attend"] == 1


def test_other_devices_attend_as_before(fused: Pipeline, calls: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GaudiBackend, "device", "hpu")
    calls.clear()
    F.scaled_dot_product_attention(*torch.randn(3, 1, 2, 4, 8))
    assert not calls


class Block(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_blocks_are_compiled_for_every_shape_where_nothing_is_recorded(
    gaudi: GaudiBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For more shapes than torch.compile takes by default."""
    graphs = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    torch._dynamo.register_backend(compiler, "hpu_backend")
    for lazy, expected in (("1", 0), ("0", 12)):
        monkeypatch.setenv("PT_HPU_LAZY_MODE", lazy)
        block = Block()
        gaudi.compile(block)
        for rows in (*range(1, 13), 1):
            block(torch.ones(rows, 4))
        assert len(graphs) == expected
    torch._dynamo.reset()
