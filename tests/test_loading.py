"""Models from configs and adapters from files: the small model, and Qwen-Image's full architecture without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from PIL import Image
from plans import PLANS
from reference import predict_velocity
from safetensors.torch import save_file

from backends import Backend
from stages.config import AdapterSource, ModelConfig
from stages.decode import Decoder
from stages.encode import Encoder
from stages.loading import dtype_on, load_adapters
from stages.network import Network
from stages.packet import LatentPacket
from stages.plan import FirstBlockSpec, Plan, StageSpec
from stages.sigmas import stage_sigmas
from stages.stage import Denoiser
from stages.yaml_file import ConfigError

ROOT = Path(__file__).parent.parent

# transformer/config.json of Qwen/Qwen-Image.
QWEN_IMAGE_TRANSFORMER = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}
# What Qwen-Image-Lightning adapts in every block.
LIGHTNING_MODULES = [
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "img_mlp.net.0.proj",
    "img_mlp.net.2",
    "txt_mlp.net.0.proj",
    "txt_mlp.net.2",
]


@pytest.fixture(scope="module")
def qwen_image() -> ModelConfig:
    return ModelConfig.read(ROOT / "configs" / "qwen_image.yaml")


def students_file(config: ModelConfig) -> str:
    """Its name among those of its source."""
    name = config.adapters["distilled"].weight_name
    assert name is not None
    return name


@pytest.fixture
def full_transformer() -> QwenImageTransformer2DModel:
    with init_empty_weights():
        return QwenImageTransformer2DModel(**QWEN_IMAGE_TRANSFORMER)


def save_lightning_lora(
    transformer: QwenImageTransformer2DModel, path: Path, *, rank: int, alpha: float
) -> dict[str, torch.Tensor]:
    """A LoRA of `transformer` in the key format of Qwen-Image-Lightning's files."""
    state = {}
    for block in range(len(transformer.transformer_blocks)):
        for name in LIGHTNING_MODULES:
            linear = transformer.transformer_blocks[block].get_submodule(name)
            key = f"transformer_blocks.{block}.{name}"
            state[f"{key}.lora_down.weight"] = torch.zeros(rank, linear.in_features, dtype=torch.bfloat16)
            state[f"{key}.lora_up.weight"] = torch.zeros(linear.out_features, rank, dtype=torch.bfloat16)
            state[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(state, path)
    return state


def test_qwen_image_config_is_complete(qwen_image: ModelConfig, backend: Backend) -> None:
    assert (qwen_image.name, qwen_image.source) == ("qwen-image", "Qwen/Qwen-Image")
    assert dtype_on(qwen_image, backend) == torch.bfloat16
    assert qwen_image.sizes[0] == "1328x1328"
    assert qwen_image.adapters["distilled"].source == "lightx2v/Qwen-Image-Lightning"
    assert students_file(qwen_image).endswith(".safetensors")


def test_qwen_images_own_plans(qwen_image: ModelConfig) -> None:
    assert {name: plan.nfe for name, plan in qwen_image.plans.items()} == {
        "base": 100,
        "cached": 100,
        "distilled": 4,
        "hybrid": 7,
    }
    (base,) = qwen_image.plans["base"].stages
    assert (base.steps, base.guidance_scale, base.cache) == (50, 4.0, None)
    assert qwen_image.plans["cached"].stages == (base.model_copy(update={"cache": FirstBlockSpec(threshold=0.08)}),)
    adapters = {stage.adapter for plan in qwen_image.plans.values() for stage in plan.stages}
    assert adapters == {None, *qwen_image.adapters}
    assert "4steps" in students_file(qwen_image)


@pytest.mark.parametrize("tokens", [4096, 6889])
def test_qwen_images_hybrid_plan_hands_over_on_the_students_grid(
    qwen_image: ModelConfig, scheduler: FlowMatchEulerDiscreteScheduler, tokens: int
) -> None:
    student, (base, finish) = qwen_image.plans["distilled"].stages[0], qwen_image.plans["hybrid"].stages
    grid = stage_sigmas(student, scheduler, tokens)
    torch.testing.assert_close(stage_sigmas(finish, scheduler, tokens), grid[1:], atol=1e-6, rtol=0)
    assert (base.steps, base.guidance_scale, base.adapter) == (2, 4.0, None)
    assert finish.model_copy(update={"sigma_start": 1.0, "steps": 4}) == student


def test_full_transformer_has_twenty_billion_parameters(full_transformer: QwenImageTransformer2DModel) -> None:
    assert {parameter.device.type for parameter in full_transformer.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in full_transformer.parameters()) == pytest.approx(20.4e9, rel=0.01)


def test_lightning_lora_loads_into_the_full_transformer(
    qwen_image: ModelConfig, full_transformer: QwenImageTransformer2DModel, tmp_path: Path
) -> None:
    weight_name = students_file(qwen_image)
    state = save_lightning_lora(full_transformer, tmp_path / weight_name, rank=2, alpha=1.0)
    assert len(state) == 60 * 12 * 3
    save_file({"other.lora_A.weight": torch.zeros(1)}, tmp_path / "another-8steps.safetensors")

    source = AdapterSource(source=str(tmp_path), weight_name=weight_name)
    loras = load_adapters(qwen_image.model_copy(update={"adapters": {"distilled": source}}), full_transformer)

    assert loras.keys() == {"distilled"}
    shapes = {name: (tuple(lora.down.shape), tuple(lora.up.shape)) for name, lora in loras["distilled"].items()}
    assert shapes == {
        key.removesuffix(".alpha"): tuple(
            tuple(state[key.replace(".alpha", f".lora_{part}.weight")].shape) for part in ("down", "up")
        )
        for key in state
        if key.endswith(".alpha")
    }


def test_a_loaded_transformer_is_diffusers_own(
    transformer: QwenImageTransformer2DModel, diffusers_base: QwenImagePipeline
) -> None:
    assert not any(parameter.requires_grad for parameter in transformer.parameters())
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((1, 16, 64), generator=generator)
    embeds = torch.randn((7, transformer.config.joint_attention_dim), generator=generator)
    with torch.inference_mode():
        ours, plain = (
            predict_velocity(model, latents, torch.tensor([0.9]), [embeds], (4, 4))
            for model in (transformer, diffusers_base.transformer)
        )
    assert torch.equal(ours, plain)


def test_a_model_without_adapters_has_none(config: ModelConfig, backend: Backend) -> None:
    assert Network.load(config.model_copy(update={"adapters": {}}), backend).adapters == []


def test_half_precision_is_used_from_prompt_to_image(config: ModelConfig, backend: Backend) -> None:
    config = config.model_copy(update={"dtype": "bfloat16"})
    encoder, denoiser, decoder = Encoder(config, backend), Denoiser.load(config, backend), Decoder(config, backend)
    packet = encoder.begin("test", 0, 5, "64x64", "a red circle", " ")
    assert packet.negative_embeds is not None
    assert packet.latent.dtype == packet.prompt_embeds.dtype == packet.negative_embeds.dtype == torch.bfloat16
    for _ in PLANS["hybrid"].stages:
        packet = LatentPacket.from_bytes(packet.to_bytes())
        (packet,) = denoiser.denoise([packet], PLANS["hybrid"])
        assert packet.latent.dtype == torch.bfloat16
    (image,) = decoder.decode(packet.latent[None], packet.grid)
    assert isinstance(image, Image.Image)
    assert image.size == (64, 64)

    precise = Encoder(config.model_copy(update={"dtype": None}), backend)
    reference = precise.begin("test", 0, 5, "64x64", "a red circle", " ")
    assert reference.latent.dtype == torch.float32
    denoiser = Denoiser.load(config.model_copy(update={"dtype": None}), backend)
    for _ in PLANS["hybrid"].stages:
        (reference,) = denoiser.denoise([reference], PLANS["hybrid"])
    assert (packet.latent - reference.latent).norm() / reference.latent.norm() < 0.05


def test_directories_of_a_config_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: ModelConfig
) -> None:
    monkeypatch.chdir(tmp_path)
    found = ModelConfig.read(ROOT / "configs" / "scenes.yaml")
    assert (found.source, found.adapters) == (config.source, config.adapters)
    assert Path(config.source).is_dir()
    assert Path(config.source).is_absolute()
    assert all(Path(adapter.source).is_dir() for adapter in config.adapters.values())


class Write(Protocol):
    def __call__(self, *lines: str) -> Path: ...


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Call it with lines of a model's config; those of a sound one stand where none of the same key is given."""

    def write(*lines: str) -> Path:
        sound = {"name": "name: small", "source": "source: somewhere", "sizes": "sizes: [64x64]"}
        path = tmp_path / "model.yaml"
        path.write_text("\n".join({**sound, **{line.split(":")[0]: line for line in lines}}.values()))
        return path

    return write


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("size: [64x64]", "size: Extra inputs are not permitted"),
        ("dtype: float8", "dtype: must be float32 or bfloat16, not 'float8'"),
        ("dtype: float16", "dtype: must be float32 or bfloat16: float16 ends at 65504"),
        ("sizes: []", "sizes: "),
        ("sizes: [64x72]", "sizes: 64x72: width and height must be multiples of 16"),
        ("sizes: [64]", "sizes.0: "),
        ("sizes: [64by64]", "sizes: size must be WIDTHxHEIGHT, not '64by64'"),
        ("max_prompt_tokens: 0", "max_prompt_tokens: "),
        ("max_prompt_tokens: 1020", "max_prompt_tokens: must be at most 1019, not 1020"),
        ("max_prompt_tokens: true", "max_prompt_tokens: Input should be a valid integer"),
        ("max_prompt_tokens: '64'", "max_prompt_tokens: Input should be a valid integer"),
        ("sizes: ['0x0']", "sizes: size must be WIDTHxHEIGHT, not '0x0'"),
        ("sizes: [016x16]", "sizes: size must be WIDTHxHEIGHT, not '016x16'"),
        ("sizes: [16x4112]", "sizes: 16x4112: width and height must be at most 4096"),
        ("sizes: [64x64, 32x32, 64x64]", "sizes: 64x64 is there twice"),
        ("adapters: {a.b: {source: somewhere}}", "adapters.a.b: String should match pattern"),
        ("adapters: {'': {source: somewhere}}", "adapters.: String should match pattern"),
        ("adapters: {one: {source: ''}}", "adapters.one.source: String should have at least 1 character"),
        ("source: ''", "source: String should have at least 1 character"),
        ("name: 'small model'", "name: String should match pattern"),
        ("name: 7", "name: Input should be a valid string"),
        ("vocabulary: []", "vocabulary: "),
        ("vocabulary: [Red]", "vocabulary.0: must be in lower case"),
        ("vocabulary: [on]", "vocabulary.0: Input should be a valid string"),
        ("plans: {a b: []}", "plans.a b: String should match pattern"),
        ("plans: [base]", "plans: Input should be an object"),
        ("adapters: {distilled: {source: somewhere, scale: 2}}", "adapters.distilled.scale: "),
        ("adapters: {distilled: {weight_name: file.safetensors}}", "adapters.distilled.source: Field required"),
        ("plans: {short: [{name: base, sigma_start: 1, sigma_end: 0}]}", "plans.short.stages.0.steps: Field required"),
        (
            "plans: {short: [{name: distilled, sigma_start: 1, sigma_end: 0, steps: 4, adapter: distilled}]}",
            "plans: short.stages.0.adapter must be one of [], not 'distilled'",
        ),
    ],
)
def test_a_wrong_key_of_a_config_is_named(write: Write, line: str, message: str) -> None:
    assert ModelConfig.read(write()).adapters == {}
    path = write(line)
    with pytest.raises(ConfigError) as caught:
        ModelConfig.read(path)
    assert str(caught.value).startswith(f"{path}: {message}"), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_that_is_there_twice_is_refused(write: Write) -> None:
    path = write("adapters: {distilled: {source: here}, distilled: {source: there}}")
    with pytest.raises(ConfigError, match=r"model\.yaml, line 4, column 39: 'distilled' is there twice"):
        ModelConfig.read(path)


@pytest.mark.parametrize("content", ["[1, 2]", "", "name: [", "name: \x00"])
def test_a_file_that_holds_no_config_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"model\.yaml"):
        ModelConfig.read(tmp_path / "model.yaml")


def test_plans_stand_in_the_config_or_in_a_file_beside_it(write: Write, tmp_path: Path) -> None:
    stages = "short: [{name: base, sigma_start: 1, sigma_end: 0, steps: 4}]"
    (tmp_path / "plans.yaml").write_text(stages)
    in_file, inline = ModelConfig.read(write("plans: plans.yaml")), ModelConfig.read(write(f"plans: {{{stages}}}"))
    stage = StageSpec(name="base", sigma_start=1.0, sigma_end=0.0, steps=4)
    assert in_file.plans == inline.plans == {"short": Plan(name="short", stages=(stage,))}
    (tmp_path / "plans.yaml").write_text(stages.replace("steps: 4", "steps: 0"))
    with pytest.raises(ConfigError, match=r"plans\.yaml: short\.stages\.0\.steps: Input should be"):
        ModelConfig.read(write("plans: plans.yaml"))
    with pytest.raises(ConfigError, match=r"model\.yaml: plans: there is no file .*other\.yaml"):
        ModelConfig.read(write("plans: other.yaml"))


def test_a_plan_that_skips_blocks_which_are_not_there_is_named(write: Write, config: ModelConfig) -> None:
    stages = "{name: base, sigma_start: 1, sigma_end: 0, steps: 4, skip_blocks: [6]}"
    pruned = ModelConfig.read(write(f"source: {config.source}", f"plans: {{pruned: [{stages}]}}"))
    with pytest.raises(ConfigError, match=r"plans\.pruned\.stages\W0\W?\.skip_blocks must be below 6, not 6"):
        pruned.check_plans()
    config.check_plans()


def test_a_plan_may_mean_other_stages_at_a_size(write: Write, tmp_path: Path) -> None:
    plans = "plans: {a: &a [{name: base, sigma_start: 1, sigma_end: 0, steps: 4}], b: *a}"
    sizes = "sizes: [64x64, 128x128, 32x16]"
    halved = (
        "a: [{name: base, scale: 0.5, sigma_start: 1, sigma_end: 0.5, steps: 2},"
        "{name: base, sigma_start: 0.5, sigma_end: 0, steps: 2}]"
    )
    (tmp_path / "large.yaml").write_text(halved)
    config = ModelConfig.read(write(plans, sizes, "plans_at: {128x128: large.yaml}"))
    assert config.plan("a", "64x64") == config.plan("a") == config.plans["a"]
    assert [stage.scale for stage in config.plan("a", "128x128").stages] == [0.5, 1.0]
    assert config.plan("b", "128x128") == config.plans["b"]
    assert [(plan.name, sizes) for plan, sizes in config.plans_by_size()] == [
        ("a", ("64x64", "32x16")), ("b", ("64x64", "128x128", "32x16")), ("a", ("128x128",)),
    ]  # fmt: skip
    for wrong, complaint in (
        ("{96x96: large.yaml}", r"plans_at: 96x96: must be one of \['64x64', '128x128', '32x16'\]"),
        ("{64x64: other.yaml}", r"plans_at\.64x64: there is no file .*other\.yaml"),
        ("{32x16: large.yaml}", r"plans_at\.32x16\.a\.stages\W0\W?\.scale must be 1 for 1x2 tokens, not 0\.5"),
        ("{64x64: {c: *a}}", r"plans_at: 64x64\.c: must be one of \['a', 'b'\]"),
        ("{64x64: {a: [{name: base}]}}", r"plans_at\.64x64\.a\.stages\.0\.sigma_start: Field required"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            ModelConfig.read(write(plans, sizes, f"plans_at: {wrong}"))


def test_a_missing_config_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ModelConfig.read(tmp_path / "model.yaml")


@pytest.mark.parametrize(
    "text",
    ["2020-01-01: x", "name: 2020-99-99", "name: &a [*a]", f"max_prompt_tokens: {'9' * 5000}", "1: x", "? [a]\n: x"],
    ids=["date as a key", "no such date", "holds itself", "a long number", "number as a key", "list as a key"],
)
def test_yaml_that_cannot_be_read_is_refused_in_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"model\.yaml") as refused:
        ModelConfig.read(tmp_path / "model.yaml")
    assert len(str(refused.value)) < 4000


def test_one_mistake_is_one_complaint(write: Write) -> None:
    for line, complaint in (
        ("adapters: {distilled: {sourze: x}}", "adapters.distilled"),
        ("sizes: [100x100]", "sizes: 100x100: width and height must be multiples of 16"),
        ("plans: {a: [{name: base, sigma_start: 1, sigma_end: 0, steps: 0}]}", "plans.a.stages.0.steps"),
    ):
        with pytest.raises(ConfigError) as refused:
            ModelConfig.read(write(line))
        complaints = [part for part in str(refused.value).split("; ") if "source" not in part]
        assert len(complaints) <= 1, complaints
        assert complaint in str(refused.value)


def test_names_of_a_model_are_distinct(write: Write) -> None:
    for aliases in ("[a, a]", "[tiny]"):
        with pytest.raises(ConfigError, match=r"aliases: .* is there twice"):
            ModelConfig.read(write("name: tiny", f"aliases: {aliases}"))


def test_a_vocabulary_may_have_words_with_apostrophes(write: Write) -> None:
    assert ModelConfig.read(write("vocabulary: [don't, \u00e9toile]")).vocabulary == frozenset({"don't", "\u00e9toile"})
    with pytest.raises(ConfigError, match="must be in lower case"):
        ModelConfig.read(write("vocabulary: [\u00c9toile]"))
