"""What is used of libraries beyond what they promise, so that an upgrade which takes it away says so here, by name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from diffusers.models.transformers import transformer_z_image
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    QwenImageTransformerBlock,
    apply_rotary_emb_qwen,
)
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from ray.experimental import internal_kv
from ray.serve._private import common, constants
from torch.fx.experimental import _config as shapes_config

from deployments.http import readiness


def parameters(function: Callable[..., object]) -> set[str]:
    return set(inspect.signature(function).parameters)


def test_diffusers_attention_of_qwen_image() -> None:
    """`stages.families.qwen_image.attention`."""
    assert {"_attention_backend", "_parallel_config"} <= vars(QwenDoubleStreamAttnProcessor2_0).keys()
    assert {"attn_mask", "backend", "parallel_config"} <= parameters(dispatch_attention_fn)
    assert "use_real" in parameters(apply_rotary_emb_qwen)
    assert {
        "hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "image_rotary_emb"
    } <= parameters(QwenDoubleStreamAttnProcessor2_0.__call__)  # fmt: skip


def test_diffusers_blocks() -> None:
    """`stages.families.*.transformer`."""
    assert {
        "hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "temb", "image_rotary_emb",
        "joint_attention_kwargs",
    } <= parameters(QwenImageTransformerBlock.forward)  # fmt: skip
    names = list(inspect.signature(transformer_z_image.ZImageTransformerBlock.forward).parameters)
    assert names[:5] == ["self", "x", "attn_mask", "freqs_cis", "adaln_input"]
    assert transformer_z_image.SEQ_MULTI_OF == 32


def test_diffusers_causal_convolution() -> None:
    """`stages.families.qwen_image.autoencoder`."""
    convolution = QwenImageCausalConv3d(2, 2, 3, padding=1)
    assert convolution._padding == (1, 1, 1, 1, 2, 0)  # width, height, time


def test_torchs_duck_shapes() -> None:
    """`stages.network`."""
    assert isinstance(shapes_config.use_duck_shape, bool)
    assert torch._dynamo.config.error_on_recompile is False  # which tests switch on


def test_pefts_patterns_and_variants() -> None:
    """`stages.lora_files`."""
    assert get_pattern_key(["to_q"], "blocks.0.to_q") == "to_q"
    variants = {field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")}
    assert {"use_dora"} < variants


def test_rays_store_and_names_of_actors() -> None:
    """`deployments.http.readiness`, and the hook of `deployments.__main__`."""
    for function in (internal_kv._internal_kv_get, internal_kv._internal_kv_put, internal_kv._internal_kv_del):
        assert "namespace" in parameters(function)
    assert common.DeploymentID(name="Base", app_name="images")
    replica = common.ReplicaID("x", common.DeploymentID(name="Base", app_name="images"))
    assert replica.to_full_id_str().startswith(f"{readiness._REPLICA}images#Base#")
    assert constants.SERVE_PROXY_NAME.startswith(readiness._PROXY.rstrip("-"))
    assert hasattr(constants, "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH")
