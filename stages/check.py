"""Everything that can be known of a model's files before anything of it is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stages.config import ModelConfig
from stages.families import get_family
from stages.loading import load_adapters, load_scheduler, load_tokenizer, wrap
from stages.sources import BadFile, find_part, read_json
from stages.weight_files import check_finite, load_part, weights_of

# Of the files of a part whose numbers are read: some seconds from a disk. What is larger is checked as it is loaded.
READ_AT_MOST = 2 * 1024**3


def check_files(config: ModelConfig) -> None:
    """Check the files that a config names, without building the model.

    Every part's weights must be there, whole, and those that the part has; adapters must be LoRAs of the transformer.
    That takes the files' headers and about a second, whatever their size. Numbers are checked to be finite in
    adapters and in parts of at most `READ_AT_MOST` bytes; in larger ones replicas do it as they load them. Adapters
    on a hub are downloaded. A model on a hub is not checked: replicas download the parts that they need, and check
    those.

    Raises:
        BadFile: the first thing that is wrong, in one sentence with the config's key and the file.
    """
    if not Path(config.source).is_dir():
        find_part(config.source, "scheduler")
        return
    family = get_family(config.family)
    pipeline = read_json(config.source, "model_index.json").get("_class_name")
    if pipeline != family.pipeline:
        index = Path(config.source) / "model_index.json"
        raise BadFile("source", index, f"is of a {pipeline}, and family {family.name} is {family.pipeline}")
    kinds: dict[str, Any] = {
        "transformer": family.transformer.kind,
        "text_encoder": family.text_encoder.kind,
        "vae": family.autoencoder.kind,
    }
    modules = {part: load_part(kind, config.source, part, device_map="meta") for part, kind in kinds.items()}
    wrap(family.transformer, modules["transformer"], config.source, "transformer")
    wrap(family.autoencoder, modules["vae"], config.source, "vae")
    for part, module in modules.items():
        files = weights_of(find_part(config.source, part))
        if sum(file.stat().st_size for file in files) <= READ_AT_MOST:
            dtype = getattr(torch, config.dtype or "float32")
            for file in files:
                check_finite("source", file, dtype)
        if part == "transformer":
            load_adapters(config, module)
    load_tokenizer(config)
    load_scheduler(config)
