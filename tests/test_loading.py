"""Models from configs and adapters from files: the small model, and Qwen-Image's full architecture without weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import QwenImageTransformer2DModel
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from backends import Backend
from stages.decode import Decoder
from stages.encode import Encoder
from stages.model import AdapterSource, ModelConfig, load_adapters, load_transformer
from stages.network import predict_velocity
from stages.packet import LatentPacket
from stages.plan import presets
from stages.stage import Denoiser

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
    assert qwen_image.dtype_on(backend) == torch.bfloat16
    assert qwen_image.sizes[0] == "1328x1328"
    assert qwen_image.adapters["distilled"].source == "lightx2v/Qwen-Image-Lightning"
    assert qwen_image.adapters["distilled"].weight_name.endswith(".safetensors")


def test_every_preset_can_run_on_qwen_image(qwen_image: ModelConfig) -> None:
    plans = {name: plan.with_adapters(qwen_image.adapters) for name, plan in presets().items()}
    assert [stage.adapter for stage in plans["hybrid"].stages] == [None, None, None, "distilled", "distilled"]
    used = {stage.adapter for plan in plans.values() for stage in plan.stages}
    assert used - {None} == set(qwen_image.adapters)


def test_full_transformer_has_twenty_billion_parameters(full_transformer: QwenImageTransformer2DModel) -> None:
    assert {parameter.device.type for parameter in full_transformer.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in full_transformer.parameters()) == pytest.approx(20.4e9, rel=0.01)


def test_lightning_lora_loads_into_the_full_transformer(
    qwen_image: ModelConfig, full_transformer: QwenImageTransformer2DModel, tmp_path: Path
) -> None:
    weight_name = qwen_image.adapters["distilled"].weight_name
    state = save_lightning_lora(full_transformer, tmp_path / weight_name, rank=2, alpha=1.0)
    assert len(state) == 60 * 12 * 3
    save_file({"other.lora_A.weight": torch.zeros(1)}, tmp_path / "another-8steps.safetensors")

    load_adapters(full_transformer, {"distilled": AdapterSource(source=str(tmp_path), weight_name=weight_name)})

    loaded = {name: tuple(value.shape) for name, value in full_transformer.named_parameters() if "lora_" in name}
    expected = {}
    for key, value in state.items():
        if not key.endswith(".alpha"):
            key = key.replace("lora_down", "lora_A.distilled").replace("lora_up", "lora_B.distilled")
            expected[key] = tuple(value.shape)
    assert loaded == expected
    layer = full_transformer.transformer_blocks[59].attn.to_q
    assert layer.scaling == {"distilled": 1.0}, "alpha / rank is in the weights already"
    assert layer.disable_adapters
    full_transformer.set_adapters("distilled", 0.5)
    full_transformer.enable_lora()
    assert layer.scaling == {"distilled": 0.5}
    assert not layer.disable_adapters


def test_an_adapter_in_lightnings_format_does_the_same_as_in_diffusers_format(
    config: ModelConfig, backend: Backend, tmp_path: Path
) -> None:
    """Alpha differs from the rank there, so that one that ignores it would show."""
    alpha_over_rank = 0.25
    state = {}
    for file in Path(config.adapters["distilled"].source).glob("*.safetensors"):
        for key, value in load_file(file).items():
            module, kind = key.removeprefix("transformer.").removesuffix(".weight").rsplit(".", 1)
            if kind == "lora_A":
                state[f"{module}.lora_down.weight"] = value
                state[f"{module}.alpha"] = torch.tensor(alpha_over_rank * value.shape[0])
            else:
                state[f"{module}.lora_up.weight"] = value / alpha_over_rank
    save_file(state, tmp_path / "lightning.safetensors")
    source = AdapterSource(source=str(tmp_path), weight_name="lightning.safetensors")
    transformer = load_transformer(
        config.model_copy(update={"adapters": {"theirs": source, "ours": config.adapters["distilled"]}}), backend
    )

    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((1, 16, 64), generator=generator)
    embeds = torch.randn((7, transformer.config.joint_attention_dim), generator=generator)

    @torch.inference_mode()
    def velocity() -> torch.Tensor:
        return predict_velocity(transformer, latents, torch.tensor([0.9]), [embeds], (4, 4))

    base = velocity()
    transformer.enable_lora()
    transformer.set_adapters("ours")
    ours = velocity()
    transformer.set_adapters("theirs")
    theirs = velocity()
    assert float((ours - theirs).abs().max()) < 1e-5
    assert float((ours - base).abs().max()) > 1e-2


def test_loaded_adapters_are_all_there_and_none_is_active(
    config: ModelConfig, transformer: QwenImageTransformer2DModel, diffusers_base: object
) -> None:
    assert set(transformer.peft_config) == {"bridge", "distilled"} == set(config.adapters)
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


def test_a_file_without_a_lora_of_this_transformer_is_refused(
    config: ModelConfig, backend: Backend, tmp_path: Path
) -> None:
    save_file({"unet.block.lora_A.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    source = AdapterSource(source=str(tmp_path), weight_name="other.safetensors")
    with pytest.raises(ValueError, match=r"adapters\.distilled\.source: .* holds no LoRA"):
        load_transformer(config.model_copy(update={"adapters": {"distilled": source}}), backend)


def test_a_model_without_adapters_loads(config: ModelConfig, backend: Backend) -> None:
    transformer = load_transformer(config.model_copy(update={"adapters": {}}), backend)
    assert not any("lora" in name for name, _ in transformer.named_parameters())


def test_half_precision_is_used_from_prompt_to_image(config: ModelConfig, backend: Backend) -> None:
    config = config.model_copy(update={"dtype": "bfloat16"})
    encoder, denoiser, decoder = Encoder(config, backend), Denoiser.load(config, backend), Decoder(config, backend)
    packet = encoder.begin("test", 0, 5, "64x64", "a red circle", " ")
    assert packet.latent.dtype == packet.prompt_embeds.dtype == packet.negative_embeds.dtype == torch.bfloat16
    for _ in presets()["hybrid"].stages:
        packet = LatentPacket.from_bytes(packet.to_bytes())
        (packet,) = denoiser.denoise([packet], presets()["hybrid"], preview=True)
        assert packet.latent.dtype == packet.preview.dtype == torch.bfloat16
    (image,) = decoder.decode(packet.latent[None], packet.grid)
    assert image.size == (64, 64)

    precise = Encoder(config.model_copy(update={"dtype": None}), backend)
    reference = precise.begin("test", 0, 5, "64x64", "a red circle", " ")
    assert reference.latent.dtype == torch.float32
    denoiser = Denoiser.load(config.model_copy(update={"dtype": None}), backend)
    for _ in presets()["hybrid"].stages:
        (reference,) = denoiser.denoise([reference], presets()["hybrid"])
    assert (packet.latent - reference.latent).norm() / reference.latent.norm() < 0.05


def test_directories_of_a_config_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: ModelConfig
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ModelConfig.read(ROOT / "configs" / "scenes.yaml") == config
    assert Path(config.source).is_dir()
    assert Path(config.source).is_absolute()
    assert all(Path(adapter.source).is_dir() for adapter in config.adapters.values())


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("size: [64x64]", "size\n"),
        ("dtype: float8", "dtype\n"),
        ("sizes: []", "sizes\n"),
        ("sizes: [64x72]", "64x72: width and height must be multiples of 16"),
        ("sizes: [64]", "sizes"),
        ("sizes: [64by64]", "size must be WIDTHxHEIGHT, not '64by64'"),
        ("max_prompt_tokens: 0", "max_prompt_tokens\n"),
        ("max_prompt_tokens: 1025", "max_prompt_tokens\n"),
        ("adapters: {distilled: {source: somewhere, scale: 2}}", "adapters.distilled.scale\n"),
        ("adapters: {distilled: {weight_name: file.safetensors}}", "adapters.distilled.source\n"),
    ],
)
def test_a_wrong_key_of_a_config_is_named(tmp_path: Path, line: str, field: str) -> None:
    lines = {"name": "name: small", "source": "source: somewhere", "sizes": "sizes: [64x64]"}
    path = tmp_path / "model.yaml"
    path.write_text("\n".join(lines.values()))
    assert ModelConfig.read(path).adapters == {}
    path.write_text("\n".join({**lines, line.split(":")[0]: line}.values()))
    with pytest.raises(ValidationError) as caught:
        ModelConfig.read(path)
    assert field in str(caught.value), str(caught.value)


def test_a_missing_config_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ModelConfig.read(tmp_path / "model.yaml")
