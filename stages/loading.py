"""Loading of a config's components onto a device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from backends import Backend
from stages.config import ModelConfig
from stages.families import get_family
from stages.families.base import Autoencoder, TextEncoder, Transformer
from stages.lora_files import Lora, linear_layers, read_lora
from stages.sigmas import SchedulerConfig
from stages.sources import BadFile, find_adapter, find_component, read_json
from stages.weight_files import check_loaded, load_component
from stages.yaml_file import validate

T = TypeVar("T")


def dtype_on(config: ModelConfig, backend: Backend) -> torch.dtype:
    """Return the dtype of the weights: the config's, or else the backend's default."""
    return getattr(torch, config.dtype or backend.default_dtype)


def load_text_encoder(config: ModelConfig, backend: Backend) -> TextEncoder:
    """Load the tokenizer and the text encoder, quantized as the config says.

    Raises:
        BadFile: files are missing, truncated or not finite, or their weights are not those of the text encoder.
    """
    kind = get_family(config.family).text_encoder
    module = backend.place(load_component(kind.kind, config.source, "text_encoder", dtype=dtype_on(config, backend)))
    check_loaded(module, config.source, "text_encoder")
    encoder = kind(module, load_tokenizer(config))
    if config.quantize.text_encoder:
        backend.quantize(encoder.layers, config.quantize.text_encoder)
    return encoder


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the text encoder's tokenizer, whose class its own config names; raises BadFile."""
    directory = find_component(config.source, "tokenizer")
    if not (directory / "tokenizer_config.json").is_file():
        raise BadFile("source", directory / "tokenizer_config.json", "is missing")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # tokenizers raises nothing narrower
        raise BadFile("source", directory, f"cannot be loaded: {' '.join(str(error).split())}") from error
    if tokenizer.pad_token is None:
        raise BadFile("source", directory / "tokenizer_config.json", "names no pad_token")
    return tokenizer


def load_transformer(config: ModelConfig, backend: Backend) -> Transformer:
    """Load the transformer without adapters; raises BadFile as `load_text_encoder` does."""
    kind = get_family(config.family).transformer
    module = backend.place(load_component(kind.kind, config.source, "transformer", dtype=dtype_on(config, backend)))
    check_loaded(module, config.source, "transformer")
    if backend.attention:
        module.set_attention_backend(backend.attention)
    transformer = wrap(kind, module, config.source, "transformer")
    if not backend.complex_numbers:
        transformer.avoid_complex()
    return transformer


def load_adapters(config: ModelConfig, transformer: nn.Module) -> dict[str, dict[str, Lora]]:
    """Load the config's adapters, each as LoRAs by layer of `transformer`, which may be on the meta device.

    Raises:
        BadFile: a file is not a complete LoRA of this transformer, see `stages.lora_files`.
    """
    layers = linear_layers(transformer)
    adapters = {}
    for name, adapter in config.adapters.items():
        key = f"adapters.{name}.source"
        adapters[name] = read_lora(key, find_adapter(key, adapter.source, adapter.weight_name), layers)
    return adapters


def load_scheduler(config: ModelConfig) -> FlowMatchEulerDiscreteScheduler:
    """Load the base model's scheduler; raises ConfigError if `stages.sigmas` does not support its schedule."""
    content = read_json(config.source, "scheduler/scheduler_config.json")
    validate(Path(config.source) / "scheduler" / "scheduler_config.json", SchedulerConfig, content)
    return FlowMatchEulerDiscreteScheduler.from_config(content)


def load_autoencoder(config: ModelConfig, backend: Backend) -> Autoencoder:
    """Load the autoencoder; raises BadFile as `load_text_encoder` does."""
    kind = get_family(config.family).autoencoder
    module = backend.place(load_component(kind.kind, config.source, "vae", dtype=dtype_on(config, backend)))
    check_loaded(module, config.source, "vae")
    return wrap(kind, module, config.source, "vae")


def wrap(kind: Callable[[Any], T], module: Any, source: str, part: str) -> T:
    """Make a family's part of a loaded module; raises BadFile, which names the part's config."""
    try:
        return kind(module)
    except (ValueError, TypeError) as error:
        raise BadFile("source", find_component(source, part) / "config.json", str(error)) from error
