"""Compiled blocks and quantized weights, each against the plain network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from backends import Backend, Quantization
from deployments.settings import Settings
from stages.caches import make_cache
from stages.config import ModelConfig, Quantize
from stages.latents import draw_noise
from stages.network import Network
from stages.pipeline import Pipeline
from stages.plan import AttentionGuidanceSpec, FirstBlockSpec
from stages.rows import ModelInput, Prediction
from stages.stage import Denoiser
from stages.text import Negative

ROOT = Path(__file__).parent.parent
PROMPTS = ["a red circle", "a small furry green square left of a large blue triangle", "a star"]


def make_queries(
    pipeline: Pipeline, grid: tuple[int, int], adapters: list[str | None], avoiding: bool = False
) -> list[ModelInput]:
    """The last of them avoids something, if any is to."""
    negative = Negative(pipeline.encoder.encode("a furry shape"), AttentionGuidanceSpec())
    return [
        ModelInput(
            draw_noise(row, 16, grid),
            sigma=1.0 - 0.2 * row,
            embeds=pipeline.encoder.encode(PROMPTS[row % len(PROMPTS)]),
            negative=negative if avoiding and row == len(adapters) - 1 else None,
            adapter=adapter,
        )
        for row, adapter in enumerate(adapters)
    ]


def evaluate(network: Network, queries: list[ModelInput], grid: tuple[int, int]) -> list[Prediction]:
    with torch.inference_mode():
        return network.evaluate(queries, grid)


def relative_error(answers: list[Prediction], truths: list[Prediction]) -> float:
    """Norm of the error over that of the truth, at worst."""
    return max(
        float((answer.velocity - truth.velocity).norm() / truth.velocity.norm())
        for answer, truth in zip(answers, truths, strict=True)
    )


def make_network(config: ModelConfig, backend: Backend, blocks: int) -> Network:
    """The first blocks alone, which are what compiling takes time for."""
    network = Network.load(config, backend)
    network.transformer.module.transformer_blocks = network.transformer.module.transformer_blocks[:blocks]
    return network


@pytest.fixture(scope="module")
def compiled(config: ModelConfig, backend: Backend) -> Iterator[Network]:
    torch._dynamo.reset()
    network = make_network(config, backend, blocks=2)
    network.compile()
    for form in network.forms(rows=2, text=64):
        with backend.inference():
            network.warm_up(form, (8, 8), guides_attention=True)
    yield network
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def plain(config: ModelConfig, backend: Backend) -> Network:
    return make_network(config, backend, blocks=2)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(8, 8), (8, 12), (4, 4)])
@pytest.mark.parametrize(
    "adapters", [[None], ["bridge"], [None, None], ["distilled", None, "bridge"], ["distilled"] * 8], ids=str
)
@pytest.mark.parametrize("avoiding", [False, True])
def test_nothing_is_compiled_after_the_warm_up(
    compiled: Network,
    plain: Network,
    pipeline: Pipeline,
    grid: tuple[int, int],
    adapters: list[str | None],
    avoiding: bool,
) -> None:
    """Neither for another batch size, grid, length or mixture of adapters, nor where a cache hits or misses."""
    queries = make_queries(pipeline, grid, adapters, avoiding)
    truths = evaluate(plain, queries, grid)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert relative_error(evaluate(compiled, queries, grid), truths) < 1e-5
        cached = [replace(query, cache=make_cache(FirstBlockSpec(threshold=0.1), steps=2)) for query in queries]
        costs = [[answer.cost for answer in evaluate(compiled, cached, grid)] for _ in range(2)]
    assert costs == [[1.0] * len(queries), [0.5] * len(queries)]


@pytest.mark.slow
def test_a_second_start_finds_what_the_first_compiled(
    config: ModelConfig, backend: Backend, pipeline: Pipeline
) -> None:
    """On disk; and what is not warm is compiled when it comes, so that the test above can fail."""

    def start() -> tuple[Network, int, int]:
        torch._dynamo.reset()
        counters.clear()
        network = make_network(config, backend, blocks=1)
        network.compile()
        evaluate(network, make_queries(pipeline, (4, 4), [None] * 2), (4, 4))
        return network, counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]

    with fresh_cache():
        assert start()[1:] == (0, 1)
        network, *found = start()
        assert found == [1, 0]
        with (
            torch._dynamo.config.patch(error_on_recompile=True),
            pytest.raises(torch._dynamo.exc.RecompileError),
        ):
            evaluate(network, make_queries(pipeline, (4, 4), [None]), (4, 4))
    torch._dynamo.reset()


def is_quantized(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter


@pytest.mark.parametrize(("scheme", "bound"), [("int8_weight_only", 0.04), ("int8_dynamic", 0.08)])
def test_quantized_weights_with_adapters_come_near_the_plain_ones(
    config: ModelConfig, backend: Backend, network: Network, pipeline: Pipeline, scheme: Quantization, bound: float
) -> None:
    quantized = Denoiser.load(config.model_copy(update={"quantize": Quantize(transformer=scheme)}), backend)._network
    queries = make_queries(pipeline, (4, 6), [None, "distilled", "bridge"])
    answers = evaluate(quantized, queries, (4, 6))
    assert 1e-4 < relative_error(answers, evaluate(network, queries, (4, 6))) < bound
    for answer, query in zip(answers, queries, strict=True):
        # Scales are a row's own, but sums in another order round some activations the other way.
        same = 1e-5 if scheme == "int8_weight_only" else bound
        assert relative_error(evaluate(quantized, [query], (4, 6)), [answer]) < same
    eight_bits = [name for name, module in quantized.transformer.module.named_modules() if is_quantized(module)]
    assert len(eight_bits) == sum(
        isinstance(module, nn.Linear) for module in network.transformer.module.transformer_blocks.modules()
    )


def test_a_quantized_text_encoder_comes_near_the_plain_one(config: ModelConfig, backend: Backend) -> None:
    plain = Pipeline(config, backend).encoder
    quantized = Pipeline(config.model_copy(update={"quantize": Quantize(text_encoder="int8_dynamic")}), backend).encoder
    truth, embeds = plain.encode(PROMPTS[1]), quantized.encode(PROMPTS[1])
    assert 1e-4 < float((embeds - truth).norm() / truth.norm()) < 0.1


def test_settings_name_a_quantization_that_a_backend_lacks(tmp_path: Path) -> None:
    text = (ROOT / "configs" / "scenes.yaml").read_text().replace("checkpoints", str(ROOT / "checkpoints"))
    text = text.replace("plans/", f"{ROOT}/configs/plans/")
    path = tmp_path / "scenes.yaml"
    path.write_text(text + "quantize: {transformer: fp8_dynamic}\n")
    with pytest.raises(ValueError, match=r"quantize\.transformer .* one of int8_weight_only, int8_dynamic on cpu"):
        Settings(model=path)
    path.write_text(text + "quantize: {transformer: int4}\n")
    with pytest.raises(ValueError, match=r"quantize\.transformer"):
        Settings(model=path)
