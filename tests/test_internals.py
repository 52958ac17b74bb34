"""What is used of libraries beyond what they promise, so that an upgrade which takes it away says so here, by name."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable

import pytest
import ray
import torch
from diffusers import QwenImageTransformer2DModel, ZImageTransformer2DModel
from diffusers.models.transformers import transformer_z_image
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope, QwenImageTransformerBlock
from peft import LoraConfig
from ray._private import ray_constants
from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS
from ray.experimental import internal_kv
from ray.scripts.scripts import cli
from ray.serve._private import autoscaling_state, common, constants, logging_utils, router
from ray.serve._private.replica import UserCallableWrapper
from ray.serve._private.request_router import RequestRouter
from ray.serve.config import AutoscalingPolicy
from ray.serve.handle import DeploymentHandle
from torch.fx.experimental import _config as shapes_config

from deployments import ray_internals
from deployments.replica import StageReplica
from stages.internals.diffusers import (
    QwenImageCausalConv3d,
    attention_backend,
    dispatch_attention_fn,
    image_padding,
    rotary_axes,
    rotary_tables,
)
from stages.internals.peft import get_pattern_key
from stages.internals.torch import unrelated_dimensions


def parameters(function: Callable[..., object]) -> set[str]:
    return set(inspect.signature(function).parameters)


def test_diffusers_attention_of_qwen_image(transformer: QwenImageTransformer2DModel) -> None:
    """`stages.internals.diffusers`, on a transformer as diffusers makes it."""
    plain = QwenImageTransformer2DModel.from_config(transformer.config)
    attention = plain.transformer_blocks[0].attn
    assert attention_backend(attention) is None
    plain.set_attention_backend("native")
    assert attention_backend(attention) == "native"
    assert {"attn_mask", "backend"} <= parameters(dispatch_attention_fn)
    assert rotary_axes(plain) == (10000, transformer.config.axes_dims_rope)
    assert {"video_fhw", "device", "max_txt_seq_len"} <= parameters(QwenEmbedRope.forward)


def test_diffusers_attention_of_z_image() -> None:
    """`stages.internals.diffusers`."""
    plain = ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=1, n_kv_heads=1, cap_feat_dim=8,
        axes_dims=[4, 6, 6], axes_lens=[7, 5, 3],
    )  # fmt: skip
    assert attention_backend(plain.layers[0].attention) is None
    tables = rotary_tables(plain)
    assert [table.shape for table in tables] == [(7, 2), (5, 3), (3, 3)]
    assert all(table.is_complex() for table in tables)
    assert {"attention_mask", "freqs_cis"} <= parameters(transformer_z_image.ZSingleStreamAttnProcessor.__call__)


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
    """`stages.internals.diffusers`."""
    assert image_padding(QwenImageCausalConv3d(2, 2, (3, 5, 7), padding=(1, 2, 3))) == (2, 3)


def test_torchs_duck_shapes() -> None:
    """`stages.internals.torch`."""
    assert shapes_config.use_duck_shape is True
    with unrelated_dimensions():
        assert shapes_config.use_duck_shape is False
    assert torch._dynamo.config.error_on_recompile is False  # which tests switch on


def test_pefts_patterns_and_variants() -> None:
    """`stages.internals.peft`, and what `stages.lora_files` refuses by name."""
    assert get_pattern_key(["to_q"], "blocks.0.to_q") == "to_q"
    variants = {field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")}
    assert {"use_dora"} < variants


def test_rays_store_and_names_of_actors() -> None:
    """`deployments.ray_internals`, and the hook of `deployments.__main__`."""
    for function in (internal_kv._internal_kv_get, internal_kv._internal_kv_put, internal_kv._internal_kv_del):
        assert "namespace" in parameters(function)
    assert common.DeploymentID(name="Base", app_name="images")
    replica = common.ReplicaID("x", common.DeploymentID(name="Base", app_name="images"))
    assert ray_internals.deployment_of(replica.to_full_id_str()) == "images#Base"
    assert replica.to_full_id_str().startswith(f"{ray_internals._REPLICA}images#Base#")
    assert constants.SERVE_PROXY_NAME.startswith(ray_internals._PROXY.rstrip("-"))
    assert hasattr(constants, "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH")


def test_replicas_that_a_handle_knows() -> None:
    """`deployments.ray_internals`: `follow` and `lacks_replicas`."""
    assert callable(DeploymentHandle._init)
    assert "if not self.is_initialized:" in inspect.getsource(DeploymentHandle._init_router)
    for wrapper in (router.CurrentLoopRouter, router.SingletonThreadRouter):
        assert "self._asyncio_router = AsyncioRouter(" in inspect.getsource(wrapper)
    assert isinstance(router.AsyncioRouter.request_router, property)
    assert isinstance(RequestRouter.curr_replicas, property)


def test_serves_policies_and_stats_of_replicas() -> None:
    """`deployments.autoscaling`: Serve finds a method by its name, and makes a policy that is a class."""
    assert '"record_autoscaling_stats"' in inspect.getsource(UserCallableWrapper)
    assert autoscaling_state._resolve_policy_callable(
        AutoscalingPolicy(policy_function="deployments.autoscaling:ExpectedWait", policy_kwargs={"target_wait_s": 1.0})
    )
    assert hasattr(StageReplica, "record_autoscaling_stats")


def test_serves_logs_and_rays_console() -> None:
    """`deployments.ray_internals.logs_json`, and the environment of `deployments.__main__`."""
    configure = inspect.getsource(logging_utils.configure_component_logger)
    assert "json_formatter = JSONFormatter()" in configure
    assert "file_handler.setFormatter(json_formatter)" in configure
    assert "target=file_handler" in configure
    assert hasattr(ray_constants, "RAY_DISABLE_WORKER_LOG_PREFIX")


def test_serves_print_and_the_tracebacks_of_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        raise ValueError("the reason")
    except ValueError as error:
        info = (ValueError, error, error.__traceback__)
    monkeypatch.setattr("builtins.print", logging_utils.redirected_print)
    assert "('ValueError: the reason\\n',)" in logging.Formatter().formatException(info)  # else `mend_print` may go
    ray_internals.mend_print()
    assert logging.Formatter().formatException(info).endswith("\nValueError: the reason")


def test_rays_port_of_metrics() -> None:
    """`deployments.launch`, and manifests."""
    assert '"_metrics_export_port"' in inspect.getsource(ray.init)
    assert "metrics_export_port" in {option.name for option in cli.commands["start"].params}


def test_rays_commands_for_nodes() -> None:
    """`cluster.manifests.kuberay`."""
    options = {option.name for option in cli.commands["drain-node"].params}
    assert {"reason", "reason_message", "deadline_remaining_seconds"} <= options
    assert "/api/healthz" in PUBLIC_EXACT_PATHS  # which the probes ask without a token
