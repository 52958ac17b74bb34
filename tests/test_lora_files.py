"""LoRA files of every spelling on a tiny transformer, against W + delta in float64, and all that is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypedDict

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from reference import predict_velocity
from safetensors.torch import save_file

from backends import Backend
from stages.caches import make_cache
from stages.families.qwen_image.transformer import QwenImageTransformer
from stages.lora_files import Lora, linear_layers, read_lora
from stages.network import Network
from stages.plan import FirstBlockSpec
from stages.rows import ModelInput
from stages.sources import BadFile, find_adapter

GRID = (2, 3)
STRENGTHS = [0.5, 1.0, 2.0]
ADAPTED = [
    "img_in",
    "txt_in",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    *(
        f"transformer_blocks.{block}.{layer}"
        for block in range(2)
        for layer in (
            "attn.to_q",
            "attn.to_out.0",
            "attn.add_k_proj",
            "img_mlp.net.0.proj",
            "txt_mlp.net.2",
            "img_mod.1",
        )
    ),
    "norm_out.linear",
    "proj_out",
]


class PeftConfig(TypedDict, total=False):
    r: int
    lora_alpha: float
    alpha_pattern: dict[str, float]
    use_rslora: bool


@dataclass(frozen=True)
class Spelling:
    """How a file says what a LoRA is.

    Attributes:
        key: of a layer and a part of its LoRA, `down` or `up`.
        alpha: key of a layer's alpha, or None for a file without.
        magnitude: key of a layer's DoRA magnitude, or None for plain LoRA.
        metadata: peft's config in the file.
    """

    key: Callable[[str, str], str]
    alpha: Callable[[str], str] | None = None
    magnitude: Callable[[str], str] | None = None
    metadata: PeftConfig | None = None


AB = {"down": "lora_A", "up": "lora_B"}
SPELLINGS = {
    "diffusers": Spelling(lambda layer, part: f"transformer.{layer}.{AB[part]}.weight"),
    "diffusers_with_config": Spelling(
        lambda layer, part: f"transformer.{layer}.{AB[part]}.weight",
        metadata={"r": 4, "lora_alpha": 6, "alpha_pattern": {"proj_out": 3}},
    ),
    "diffusers_rslora": Spelling(
        lambda layer, part: f"transformer.{layer}.{AB[part]}.weight",
        metadata={"r": 4, "lora_alpha": 6, "use_rslora": True},
    ),
    "bare_default": Spelling(lambda layer, part: f"{layer}.{AB[part]}.default.weight"),
    "bare_alpha": Spelling(lambda layer, part: f"{layer}.lora_{part}.weight", lambda layer: f"{layer}.alpha"),
    "diffusion_model": Spelling(lambda layer, part: f"diffusion_model.{layer}.{AB[part]}.weight"),
    "diffusion_model_alpha": Spelling(
        lambda layer, part: f"diffusion_model.{layer}.lora_{part}.weight",
        lambda layer: f"diffusion_model.{layer}.alpha",
    ),
    "peft": Spelling(lambda layer, part: f"base_model.model.{layer}.{AB[part]}.weight"),
    "kohya": Spelling(
        lambda layer, part: f"lora_unet_{layer.replace('.', '_')}.lora_{part}.weight",
        lambda layer: f"lora_unet_{layer.replace('.', '_')}.alpha",
    ),
    "kohya_without_alpha": Spelling(lambda layer, part: f"lora_unet_{layer.replace('.', '_')}.lora_{part}.weight"),
    "old_diffusers": Spelling(lambda layer, part: f"transformer.{layer}.lora.{part}.weight"),
    "dora": Spelling(
        lambda layer, part: f"transformer.{layer}.{AB[part]}.weight",
        magnitude=lambda layer: f"transformer.{layer}.lora_magnitude_vector",
    ),
    "kohya_dora": Spelling(
        lambda layer, part: f"lora_unet_{layer.replace('.', '_')}.lora_{part}.weight",
        lambda layer: f"lora_unet_{layer.replace('.', '_')}.alpha",
        lambda layer: f"lora_unet_{layer.replace('.', '_')}.dora_scale",
    ),
}


@pytest.fixture(scope="module")
def tiny() -> QwenImageTransformer2DModel:
    """Random, in float64, without adapters."""
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )
    return transformer.double().eval().requires_grad_(False)


def scale_of(spelling: Spelling, layer: str, rank: int) -> float:
    """Of the product up @ down."""
    config: PeftConfig = spelling.metadata or {}
    if spelling.alpha:
        return 3 / rank
    alpha = config.get("alpha_pattern", {}).get(layer, config.get("lora_alpha", rank))
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def write(directory: Path, name: str, tiny: QwenImageTransformer2DModel) -> Path:
    """A file in the spelling `name`, of rank 4 and, outside of the blocks, 2."""
    spelling = SPELLINGS[name]
    generator = torch.Generator().manual_seed(list(SPELLINGS).index(name))
    state: dict[str, torch.Tensor] = {}
    for layer in ADAPTED:
        weight = tiny.get_submodule(layer).weight
        rank = 4 if "blocks" in layer or spelling.metadata else 2
        down = torch.randn(rank, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
        up = 0.2 * torch.randn(weight.shape[0], rank, generator=generator)
        state |= {spelling.key(layer, "down"): down, spelling.key(layer, "up"): up}
        if spelling.alpha:
            state[spelling.alpha(layer)] = torch.tensor(3.0)
        if spelling.magnitude:
            drawn = weight.norm(dim=1) * (0.5 + torch.rand(weight.shape[0], generator=generator))
            magnitude = drawn.float()
            state[spelling.magnitude(layer)] = magnitude[:, None] if name == "kohya_dora" else magnitude
    path = directory / f"{name}.safetensors"
    metadata = None
    if spelling.metadata:
        config = {f"transformer.{key}": value for key, value in spelling.metadata.items()}
        metadata = {"lora_adapter_metadata": json.dumps(config)}
    save_file(state, path, metadata=metadata)
    return path


@pytest.fixture(scope="module")
def adapters(tiny: QwenImageTransformer2DModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Lora]]:
    """As the engine reads a file of each spelling."""
    layers = linear_layers(tiny)
    directory = tmp_path_factory.mktemp("loras")
    return {name: read_lora(f"adapters.{name}", write(directory, name, tiny), layers) for name in SPELLINGS}


@pytest.fixture(scope="module")
def expected(
    tiny: QwenImageTransformer2DModel, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[ModelInput], torch.Tensor]:
    """Call it for the velocity by weights with the delta added in them, computed from what the file was written of."""
    from safetensors.torch import load_file

    directory = tmp_path_factory.mktemp("truths")

    @cache
    def changed(name: str | None, strength: float) -> QwenImageTransformer2DModel:
        if name is None:
            return tiny
        spelling = SPELLINGS[name]
        state = load_file(write(directory, name, tiny))
        transformer = deepcopy(tiny)
        for layer in ADAPTED:
            down, up = (state[spelling.key(layer, part)].double() for part in ("down", "up"))
            weight = transformer.get_submodule(layer).weight
            weight += strength * scale_of(spelling, layer, len(down)) * up @ down
            if spelling.magnitude:
                magnitude = state[spelling.magnitude(layer)].double().flatten()
                weight *= (magnitude / weight.norm(dim=1))[:, None]
        return transformer

    @torch.inference_mode()
    def velocity(query: ModelInput) -> torch.Tensor:
        transformer = changed(query.adapter, query.adapter_scale)
        return predict_velocity(transformer, query.latent[None], torch.tensor([query.sigma]), [query.embeds], GRID)[0]

    return velocity


def queries(wanted: Sequence[tuple[str | None, float]], cached: bool = False) -> list[ModelInput]:
    """Rows of these adapters and strengths; a cache has them evaluated in parts."""
    generator = torch.Generator().manual_seed(1)
    return [
        ModelInput(
            torch.randn(6, 16, generator=generator, dtype=torch.float64),
            sigma=0.9 - 0.3 * (row % 3),
            embeds=torch.randn(3 + row % 3, 24, generator=generator, dtype=torch.float64),
            adapter=adapter,
            adapter_scale=scale,
            cache=make_cache(FirstBlockSpec(threshold=0.1), steps=2) if cached else None,
        )
        for row, (adapter, scale) in enumerate(wanted)
    ]


def check(network: Network, rows: Sequence[ModelInput], expected: Callable[[ModelInput], torch.Tensor]) -> None:
    with torch.inference_mode():
        answers = network.evaluate(rows, GRID)
    for row, answer in zip(rows, answers, strict=True):
        truth = expected(row)
        assert float((answer.velocity - truth).abs().max()) < 1e-5 * float(truth.abs().max()), row.adapter


@pytest.fixture(scope="module")
def network(tiny: QwenImageTransformer2DModel, adapters: dict[str, dict[str, Lora]]) -> Network:
    return Network(QwenImageTransformer(deepcopy(tiny)), adapters)


@pytest.fixture(scope="module")
def compiled(
    tiny: QwenImageTransformer2DModel, adapters: dict[str, dict[str, Lora]], backend: Backend
) -> Iterator[Network]:
    torch._dynamo.reset()
    network = Network(QwenImageTransformer(deepcopy(tiny)), adapters)
    network.compile()
    yield network
    torch._dynamo.reset()


@pytest.mark.parametrize("cached", [False, True], ids=["at once", "in parts"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_a_file_of_any_spelling_adds_its_delta_beside_rows_of_base_and_of_another(
    network: Network, expected: Callable[[ModelInput], torch.Tensor], name: str, cached: bool
) -> None:
    other = "dora" if name != "dora" else "kohya"
    wanted = [(None, 1.0), *((name, strength) for strength in STRENGTHS), (other, 1.0)]
    check(network, queries(wanted, cached), expected)
    check(network, queries(wanted[1:2], cached), expected)
    check(network, queries(wanted[:1], cached), expected)  # whatever the pass before had


@pytest.mark.parametrize("cached", [False, True], ids=["at once", "in parts"])
@pytest.mark.parametrize("name", ["kohya", "diffusers_rslora", "kohya_dora"])
def test_a_fused_adapter_can_be_taken_away_again(
    tiny: QwenImageTransformer2DModel,
    adapters: dict[str, dict[str, Lora]],
    expected: Callable[[ModelInput], torch.Tensor],
    name: str,
    cached: bool,
) -> None:
    network = Network(QwenImageTransformer(deepcopy(tiny)), adapters, fused=name)
    check(network, queries([(name, 1.0)] * 2, cached), expected)
    rows = queries([(None, 1.0), *((name, strength) for strength in STRENGTHS), ("dora", 2.0), ("peft", 0.5)], cached)
    check(network, rows, expected)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_compiled_blocks_take_all_spellings_in_one_batch(
    compiled: Network, expected: Callable[[ModelInput], torch.Tensor], strength: float
) -> None:
    check(compiled, queries([(None, 1.0), *((name, strength) for name in SPELLINGS), (None, 1.0)]), expected)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_dora_is_what_peft_computes(
    tiny: QwenImageTransformer2DModel, network: Network, tmp_path: Path, strength: float
) -> None:
    from safetensors.torch import load_file

    theirs = deepcopy(tiny)
    theirs.load_lora_adapter(load_file(write(tmp_path, "dora", tiny)), adapter_name="dora")
    theirs.double().set_adapters("dora", strength)
    (row,) = queries([("dora", strength)])
    with torch.inference_mode():
        (answer,) = network.evaluate([row], GRID)
        truth = predict_velocity(theirs, row.latent[None], torch.tensor([row.sigma]), [row.embeds], GRID)[0]
    assert float((answer.velocity - truth).abs().max()) < 1e-5 * float(truth.abs().max())


def test_a_layer_that_runs_outside_of_an_evaluation_says_so(network: Network) -> None:
    with pytest.raises(AssertionError, match="outside"):
        network.transformer.module.proj_out(torch.zeros(1, 32, dtype=torch.float64))


Q = "transformer_blocks.0.attn.to_q"
SOUND = {f"{Q}.lora_A.weight": torch.ones(2, 32), f"{Q}.lora_B.weight": torch.ones(32, 2)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({f"{Q}.lora_A.weight": None}, f"is half a LoRA: it lacks down (A) of '{Q}'"),
        ({f"{Q}.lora_B.weight": None}, f"is half a LoRA: it lacks up (B) of '{Q}'"),
        ({f"{Q}.lora_B.bias": torch.ones(32)}, f"is a LoRA with biases, which is not served, in '{Q}.lora_B.bias'"),
        ({f"{Q}.lokr_w1": torch.ones(2, 2)}, f"is LoKr, which is not served, in '{Q}.lokr_w1'"),
        ({f"{Q}.hada_w1_a": torch.ones(2, 2)}, f"is LoHa, which is not served, in '{Q}.hada_w1_a'"),
        ({f"{Q}.oft_R.weight": torch.ones(2, 2)}, f"is OFT, which is not served, in '{Q}.oft_R.weight'"),
        ({f"{Q}.diff": torch.ones(32, 32)}, f"is full weights, which is not served, in '{Q}.diff'"),
        ({f"{Q}.diff_b": torch.ones(32)}, f"is full weights, which is not served, in '{Q}.diff_b'"),
        ({f"{Q}.weight": torch.ones(32, 32)}, f"holds no LoRA alone: '{Q}.weight' is no key of one"),
        (
            {"transformer_blocks.7.attn.to_q.lora_A.weight": torch.ones(2, 32)},
            "adapts what is no linear layer of the transformer, in 'transformer_blocks.7.attn.to_q.lora_A.weight'",
        ),
        (
            {"text_encoder.layers.0.lora_A.weight": torch.ones(2, 32)},
            "adapts what is no linear layer of the transformer, in 'text_encoder.layers.0.lora_A.weight'",
        ),
        ({f"{Q}.lora_A.weight": torch.full((2, 32), torch.nan)}, f"not finite, in '{Q}.lora_A.weight'"),
        ({f"{Q}.alpha": torch.tensor(torch.inf)}, f"not finite, in '{Q}.alpha'"),
        ({f"{Q}.alpha": torch.ones(2)}, f"has an alpha of '{Q}' that is no single number"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 31)}, f"does not fit '{Q}' of 32 inputs and 32 outputs with (2, 31)"),
        ({f"{Q}.lora_B.weight": torch.ones(32, 3)}, "and (32, 3)"),
        ({f"diffusion_model.{Q}.lora_down.weight": torch.ones(2, 32)}, f"gives down of {Q} twice"),
        ({f"{Q}.dora_scale": torch.ones(1, 32, 1)}, "other than one magnitude for each output"),
        (
            {f"{Q}.dora_scale": torch.ones(32), "proj_out.lora_A.weight": torch.ones(2, 32)},
            "is DoRA, but lacks the magnitude of 'proj_out'",
        ),
        (dict.fromkeys(SOUND), "is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_complete_lora_is_refused_in_a_sentence(
    tiny: QwenImageTransformer2DModel, tmp_path: Path, change: dict[str, torch.Tensor | None], reason: str
) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({key: value for key, value in (SOUND | change).items() if value is not None}, path)
    with pytest.raises(BadFile) as caught:
        read_lora("adapters.mine.source", path, linear_layers(tiny))
    assert str(caught.value).startswith(f"adapters.mine.source: {path} ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, "is DoRA, but lacks the magnitude of"),
        ({"init_lora_weights": "pissa"}, "belongs to a base model that peft changed by pissa"),
        ({"alora_invocation_tokens": [1]}, "is a LoRA with alora_invocation_tokens"),
        ({"lora_alpha": "x"}, "has a config whose lora_alpha is wrong"),
        ({"alpha_pattern": ["x"]}, "has a config whose alpha_pattern is wrong"),
        ({"alpha_pattern": {"(": 1.0}}, "is no regular expression"),
    ],
)
def test_pefts_config_beside_a_file_is_heeded(
    tiny: QwenImageTransformer2DModel, tmp_path: Path, config: dict[str, object], reason: str
) -> None:
    path, beside = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file({f"base_model.model.{key}": value for key, value in SOUND.items()}, path)
    beside.write_text(json.dumps({"r": 2, "lora_alpha": 6}))
    assert torch.equal(read_lora("key", path, linear_layers(tiny))[Q].up, torch.full((32, 2), 3.0))
    beside.write_text(json.dumps({"r": 2, "lora_alpha": 2, **config}))
    with pytest.raises(BadFile, match=reason):
        read_lora("key", path, linear_layers(tiny))


def test_a_truncated_file_is_named(tiny: QwenImageTransformer2DModel, tmp_path: Path) -> None:
    path = write(tmp_path, "kohya", tiny)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BadFile, match=r"key: .*kohya\.safetensors cannot be read as safetensors, it may be truncated"):
        read_lora("key", path, linear_layers(tiny))


def test_the_file_of_an_adapter_is_the_one_that_is_meant(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"holds no \.safetensors file"):
        find_adapter("key", str(tmp_path), None)
    save_file(SOUND, tmp_path / "a.safetensors")
    assert find_adapter("key", str(tmp_path), None) == tmp_path / "a.safetensors"
    save_file(SOUND, tmp_path / "b.safetensors")
    with pytest.raises(BadFile, match=r"weight_name must name one: a\.safetensors, b\.safetensors"):
        find_adapter("key", str(tmp_path), None)
    assert find_adapter("key", str(tmp_path), "b.safetensors") == tmp_path / "b.safetensors"
    with pytest.raises(BadFile, match=r"c\.safetensors is missing"):
        find_adapter("key", str(tmp_path), "c.safetensors")


@pytest.mark.parametrize("text", ["{", "[1]", "\ufffe"])
def test_a_config_beside_a_file_that_is_no_object_is_refused(
    tiny: QwenImageTransformer2DModel, tmp_path: Path, text: str
) -> None:
    path = tmp_path / "adapter_model.safetensors"
    save_file(SOUND, path)
    path.with_name("adapter_config.json").write_text(text)
    with pytest.raises(BadFile, match=r"adapter_config\.json has a config"):
        read_lora("key", path, linear_layers(tiny))


@pytest.mark.parametrize("alpha", ["NaN", "Infinity", "1e300"])
def test_an_alpha_that_makes_a_lora_infinite_is_refused(
    tiny: QwenImageTransformer2DModel, tmp_path: Path, alpha: str
) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(SOUND, path, metadata={"lora_adapter_metadata": f'{{"transformer.lora_alpha": {alpha}}}'})
    with pytest.raises(BadFile, match=r"lora_alpha is wrong|is not finite at"):
        read_lora("key", path, linear_layers(tiny))


def test_factors_without_dimensions_are_refused(tiny: QwenImageTransformer2DModel, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({key: torch.tensor(1.0) for key in SOUND}, path)
    with pytest.raises(BadFile, match="does not fit"):
        read_lora("key", path, linear_layers(tiny))
