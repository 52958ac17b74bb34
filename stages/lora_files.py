"""What an adapter's file is: the one place that reads LoRAs, in every public spelling, and refuses the rest.

A layer's keys are its name, dotted as in the transformer or with underscores throughout (`lora_unet_`), maybe behind
a prefix, and one of these ends:

- `lora_A.weight`, `lora_down.weight`, `lora.down.weight`: (rank, inputs);
- `lora_B.weight`, `lora_up.weight`, `lora.up.weight`: (outputs, rank);
- `alpha`: a number, by which with the rank the product is scaled; without it the scale is that of peft's config, in
  the file's metadata or beside it, or else 1;
- `lora_magnitude_vector`, `dora_scale`: (outputs,) or (outputs, 1), of DoRA (https://arxiv.org/abs/2402.09353).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import nn

from stages.sources import BadFile
from stages.weight_files import list_keys, read_header, read_tensors

_PREFIXES = re.compile(r"(base_model\.model\.|diffusion_model\.|transformer\.|lora_unet_)*")
_ENDS = {
    "down": re.compile(r"(\.lora_A|\.lora_down|[._]lora\.down)(\.default)?\.weight$"),
    "up": re.compile(r"(\.lora_B|\.lora_up|[._]lora\.up)(\.default)?\.weight$"),
    "alpha": re.compile(r"\.alpha$"),
    "magnitude": re.compile(r"(\.lora_magnitude_vector(\.default)?(\.weight)?|\.dora_scale)$"),
}
_OTHER_KINDS = {
    "LoKr": re.compile(r"\.lokr_"),
    "LoHa": re.compile(r"\.hada_"),
    "OFT": re.compile(r"\.b?oft_"),
    "a LoRA of convolutions": re.compile(r"\.lora_mid\."),
    "a LoRA with biases": re.compile(r"\.bias$"),
    "full weights": re.compile(r"\.diff(_b)?$"),
}
# Of peft's `init_lora_weights`, those that leave the base model's weights as they were.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Lora:
    """What an adapter adds to one linear layer at strength s: W + s up @ down.

    With DoRA every row of that sum is then scaled to the norm that `magnitude` says.

    Attributes:
        down: (rank, inputs) in float32.
        up: (outputs, rank) in float32, alpha included.
        magnitude: (outputs,) in float32, or None without DoRA.
    """

    down: torch.Tensor
    up: torch.Tensor
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.down)


def read_lora(key: str, file: Path, layers: Mapping[str, nn.Linear]) -> dict[str, Lora]:
    """LoRAs by the layer that they adapt.

    Args:
        key: the config's, to be blamed.
        layers: linear layers of the transformer by name; their weights may be on the meta device.

    Raises:
        BadFile: the file is truncated, or is something else than a LoRA of these layers that is complete and finite,
            all of whose keys are understood.
    """
    config = _read_config(key, file)
    names = _spellings(layers)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in read_tensors(file):
        layer, part = _parse(key, file, name, names)
        if not torch.isfinite(tensor.float()).all():
            raise BadFile(key, file, f"holds numbers that are not finite, in {name!r}")
        parts = found.setdefault(layer, {})
        if part in parts:
            raise BadFile(key, file, f"gives {part} of {layer} twice, once as {name!r}")
        parts[part] = tensor.float()
    if not found:
        raise BadFile(key, file, "is empty")
    with_magnitude = {layer for layer, parts in found.items() if "magnitude" in parts}
    if (with_magnitude or config.get("use_dora")) and (without := found.keys() - with_magnitude):
        raise BadFile(key, file, f"is DoRA, but lacks the magnitude of {list_keys(without)}")
    return {layer: _assemble(key, file, layer, parts, layers[layer], config) for layer, parts in found.items()}


def linear_layers(transformer: nn.Module) -> dict[str, nn.Linear]:
    """By name."""
    return {name: layer for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear)}


def _spellings(layers: Mapping[str, nn.Linear]) -> dict[str, str]:
    """Layers' names by all that files call them."""
    dotted = {name: name for name in layers} | {name.removesuffix(".0"): name for name in layers}
    return {spelling.replace(".", "_"): name for spelling, name in dotted.items()} | dotted


def _parse(key: str, file: Path, name: str, names: Mapping[str, str]) -> tuple[str, str]:
    """The layer that a key is of, and the part of its LoRA."""
    for part, end in _ENDS.items():
        if match := end.search(name):
            prefix = _PREFIXES.match(name)
            spelling = name[prefix.end() if prefix else 0 : match.start()]
            if spelling not in names:
                raise BadFile(key, file, f"adapts what is no linear layer of the transformer, in {name!r}")
            return names[spelling], part
    for kind, pattern in _OTHER_KINDS.items():
        if pattern.search(name):
            raise BadFile(key, file, f"is {kind}, which is not served, in {name!r}")
    raise BadFile(key, file, f"holds no LoRA alone: {name!r} is no key of one")


def _assemble(
    key: str, file: Path, layer: str, parts: Mapping[str, torch.Tensor], linear: nn.Linear, config: Mapping[str, Any]
) -> Lora:
    for part in ("down", "up"):
        if part not in parts:
            raise BadFile(key, file, f"is half a LoRA: it lacks {part} ({'AB'[part == 'up']}) of {layer!r}")
    down, up, magnitude = parts["down"], parts["up"], parts.get("magnitude")
    rank = len(down)
    outputs, inputs = linear.weight.shape
    if rank < 1 or down.shape != (rank, inputs) or up.shape != (outputs, rank):
        shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        raise BadFile(key, file, f"does not fit {layer!r} of {inputs} inputs and {outputs} outputs with {shapes}")
    if magnitude is not None:
        if magnitude.shape not in ((outputs,), (outputs, 1)):
            shape = tuple(magnitude.shape)
            raise BadFile(key, file, f"is DoRA with other than one magnitude for each output of {layer!r}: {shape}")
        magnitude = magnitude.flatten()
    scale = _alpha(key, file, layer, parts, rank, config) / rank
    if "alpha" not in parts and config.get("use_rslora"):
        scale *= math.sqrt(rank)
    return Lora(down, scale * up, magnitude)


def _alpha(
    key: str, file: Path, layer: str, parts: Mapping[str, torch.Tensor], rank: int, config: Mapping[str, Any]
) -> float:
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            raise BadFile(key, file, f"has an alpha of {layer!r} that is no single number")
        return parts["alpha"].item()
    patterns = config.get("alpha_pattern") or {}
    return float(patterns.get(get_pattern_key(patterns, layer), config.get("lora_alpha", rank)))


def _read_config(key: str, file: Path) -> dict[str, Any]:
    """peft's, from where diffusers or peft write it, or nothing; raises BadFile if it asks for more than LoRA."""
    written = read_header(key, file).get("lora_adapter_metadata")
    beside = file.with_name("adapter_config.json")
    if written is not None:
        config = {name.removeprefix("transformer."): value for name, value in json.loads(written).items()}
    elif beside.is_file():
        config = json.loads(beside.read_text())
    else:
        return {}
    variants = {field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")}
    for name in sorted(variants - {"use_dora"}):
        if config.get(name):
            raise BadFile(key, file, f"is a LoRA with {name}, which is not served")
    if (init := config.get("init_lora_weights", True)) not in _PLAIN_INITS:
        raise BadFile(key, file, f"belongs to a base model that peft changed by {init}; convert it to a plain LoRA")
    return config
