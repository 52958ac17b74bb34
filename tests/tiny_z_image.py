"""A tiny random checkpoint of Z-Image's own classes, with LoRAs, and its config."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

SCENES = Path(__file__).parent.parent / "checkpoints" / "scenes"
WIDTH, BLOCKS, STEPS, SCALE = 32, 3, 4, 3.0
CHAT = "{% for message in messages %}user {{ message.content }}{% endfor %} assistant"
ADAPTERS = ("distilled", "bridge")

BASE = {"name": "base", "sigma_start": 1, "sigma_end": 0, "steps": STEPS}
PLANS = {
    "base": [{**BASE, "guidance_scale": SCALE}],
    "distilled": [{**BASE, "name": "distilled", "adapter": "distilled"}],
    "cached": [{**BASE, "guidance_scale": SCALE, "cache": {"kind": "first_block", "threshold": 0.05}}],
    "hybrid": [
        {**BASE, "sigma_end": 0.75, "steps": 1, "guidance_scale": SCALE},
        {**BASE, "name": "distilled", "sigma_start": 0.75, "steps": 2, "adapter": "distilled"},
    ],
}


def write_checkpoint(directory: Path) -> Path:
    """Write a pipeline into `directory`, its LoRAs into directories of their names there, and return the config."""
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(SCENES / "tokenizer")
    tokenizer.chat_template = CHAT
    text = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, head_dim=12,
    )  # fmt: skip
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=WIDTH, n_layers=BLOCKS, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=24,
        axes_dims=[4, 6, 6], axes_lens=[256, 64, 64],
    )  # fmt: skip
    for name, parameter in transformer.named_parameters():
        # Noise levels as small as diffusion transformers start with: 0.15 would blow up the rounding of large angles.
        torch.nn.init.normal_(parameter, std=0.02 if name.startswith("t_embedder") else 0.15)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4, layers_per_block=1,
        scaling_factor=0.36, shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    pipeline = ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), vae, Qwen3Model(text), tokenizer, transformer)
    pipeline.save_pretrained(directory)
    for adapter in ADAPTERS:
        (directory / adapter).mkdir()
        save_file(_draw_lora(transformer), directory / adapter / "pytorch_lora_weights.safetensors")
    path = directory / "configs" / "z.yaml"
    path.parent.mkdir()
    content = {
        "name": "tiny-z", "family": "z_image", "source": str(directory), "sizes": ["64x64", "64x96"],
        "adapters": {adapter: {"source": str(directory / adapter)} for adapter in ADAPTERS}, "plans": PLANS,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(content))
    return path


def _draw_lora(transformer: ZImageTransformer2DModel) -> dict[str, torch.Tensor]:
    lora = {}
    for block in range(BLOCKS):
        for layer in ("attention.to_q", "attention.to_out.0", "feed_forward.w2", "adaLN_modulation.0"):
            name = f"layers.{block}.{layer}"
            outputs, inputs = transformer.get_submodule(name).weight.shape
            lora[f"transformer.{name}.lora_A.weight"] = torch.randn(2, inputs)
            lora[f"transformer.{name}.lora_B.weight"] = 0.1 * torch.randn(outputs, 2)
    return lora
