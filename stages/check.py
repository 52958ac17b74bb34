"""Checks of a model's files that need no model to be built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stages.config import ModelConfig
from stages.encode import prompt_limit
from stages.families import get_family
from stages.loading import load_adapters, load_scheduler, load_tokenizer, wrap
from stages.sources import find_component
from stages.weight_files import check_finite, load_component, weights_of

# Bytes of a component's files up to which their numbers are read: some seconds from a disk.
READ_AT_MOST = 2 * 1024**3


def check_files(config: ModelConfig) -> None:
    """Check the files that a config names, without building the model.

    Every component's weights must exist, be complete and match the component; adapters must be LoRAs of the
    transformer. This reads the files' headers and takes about a second, whatever their size. Numbers are checked to be
    finite in adapters and in components of at most `READ_AT_MOST` bytes; replicas check larger ones as they load them.
    Adapters on a hub are downloaded. A model on a hub is not checked: replicas download the components that they need,
    and check those.

    Raises:
        BadFile: the first error, in one sentence with the config's key and the file.
    """
    if not Path(config.source).is_dir():
        find_component(config.source, "scheduler")
        return
    config.check_family()
    family = get_family(config.family)
    kinds: dict[str, Any] = {
        "transformer": family.transformer.kind,
        "text_encoder": family.text_encoder.kind,
        "vae": family.autoencoder.kind,
    }
    modules = {name: load_component(kind, config.source, name, device_map="meta") for name, kind in kinds.items()}
    wrap(family.transformer, modules["transformer"], config.source, "transformer")
    wrap(family.autoencoder, modules["vae"], config.source, "vae")
    for component, module in modules.items():
        files = weights_of(find_component(config.source, component))
        if sum(file.stat().st_size for file in files) <= READ_AT_MOST:
            dtype = getattr(torch, config.dtype or "float32")
            for file in files:
                check_finite("source", file, dtype)
        if component == "transformer":
            load_adapters(config, module)
    prompt_limit(config, family.text_encoder(modules["text_encoder"], load_tokenizer(config)))
    load_scheduler(config)
