"""Files of adapters: reads LoRAs with any of the public spellings of their keys, and refuses all else.

A key is a layer's name, dotted as in the transformer or with underscores throughout (`lora_unet_`), perhaps after a
prefix, followed by one of these endings:

- `lora_A.weight`, `lora_down.weight`, `lora.down.weight`: (rank, inputs);
- `lora_B.weight`, `lora_up.weight`, `lora.up.weight`: (outputs, rank);
- `alpha`: a number; the product is scaled by alpha over the rank. Without it the scale comes from peft's config, in
  the file's metadata or beside the file, or else is 1;
- `lora_magnitude_vector`, `dora_scale`: (outputs,) or (outputs, 1), for DoRA (https://arxiv.org/abs/2402.09353).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from torch import nn

from stages.internals.peft import get_pattern_key
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
# Values of peft's `init_lora_weights` that leave the base model's weights unchanged.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


class _PeftConfig(BaseModel):
    """What peft's config of a LoRA says that this engine looks at; as peft has them."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    lora_alpha: float | None = None
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True

    @field_validator("alpha_pattern", mode="before")
    @classmethod
    def _null_is_none(cls, value: object) -> object:
        return {} if value is None else value

    @field_validator("alpha_pattern")
    @classmethod
    def _readable(cls, value: dict[str, float]) -> dict[str, float]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return value


@dataclass(frozen=True)
class Lora:
    """An adapter's change of one linear layer, which at strength s becomes W + s up @ down.

    With DoRA the weights of each output are then rescaled to the norm that `magnitude` gives.

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
        """Rank of the product."""
        return len(self.down)


def read_lora(key: str, file: Path, layers: Mapping[str, nn.Linear]) -> dict[str, Lora]:
    """Read an adapter's LoRAs, by the layer that they adapt.

    Args:
        key: key of the config that errors name.
        file: the adapter's safetensors file.
        layers: linear layers of the transformer by name; their weights may be on the meta device.

    Raises:
        BadFile: the file is truncated, incomplete or not finite, is not a LoRA of these layers, or has an unknown key.
    """
    config = _read_config(key, file)
    names = _spellings(layers)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in read_tensors(file):
        layer, role = _parse(key, file, name, names)
        if not torch.isfinite(tensor.float()).all():
            raise BadFile(key, file, f"holds numbers that are not finite, in {name!r}")
        tensors = found.setdefault(layer, {})
        if role in tensors:
            raise BadFile(key, file, f"gives {role} of {layer} twice, once as {name!r}")
        tensors[role] = tensor.float()
    if not found:
        raise BadFile(key, file, "is empty")
    with_magnitude = {layer for layer, tensors in found.items() if "magnitude" in tensors}
    if (with_magnitude or config.use_dora) and (without := found.keys() - with_magnitude):
        raise BadFile(key, file, f"is DoRA, but lacks the magnitude of {list_keys(without)}")
    return {layer: _assemble(key, file, layer, tensors, layers[layer], config) for layer, tensors in found.items()}


def linear_layers(transformer: nn.Module) -> dict[str, nn.Linear]:
    """Return all linear layers by name."""
    return {name: layer for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear)}


def _spellings(layers: Mapping[str, nn.Linear]) -> dict[str, str]:
    """Map every spelling of a layer's name in files to the name."""
    dotted = {name: name for name in layers} | {name.removesuffix(".0"): name for name in layers}
    return {spelling.replace(".", "_"): name for spelling, name in dotted.items()} | dotted


def _parse(key: str, file: Path, name: str, names: Mapping[str, str]) -> tuple[str, str]:
    """Return the layer that the key `name` belongs to, and which tensor of its LoRA it is."""
    for role, end in _ENDS.items():
        if match := end.search(name):
            prefix = _PREFIXES.match(name)
            spelling = name[prefix.end() if prefix else 0 : match.start()]
            if spelling not in names:
                raise BadFile(key, file, f"adapts what is no linear layer of the transformer, in {name!r}")
            return names[spelling], role
    for kind, pattern in _OTHER_KINDS.items():
        if pattern.search(name):
            raise BadFile(key, file, f"is {kind}, which is not served, in {name!r}")
    raise BadFile(key, file, f"holds no LoRA alone: {name!r} is no key of one")


def _assemble(
    key: str, file: Path, layer: str, tensors: Mapping[str, torch.Tensor], linear: nn.Linear, config: _PeftConfig
) -> Lora:
    for role in ("down", "up"):
        if role not in tensors:
            raise BadFile(key, file, f"is half a LoRA: it lacks {role} ({'AB'[role == 'up']}) of {layer!r}")
    down, up, magnitude = tensors["down"], tensors["up"], tensors.get("magnitude")
    rank = down.shape[0] if down.ndim else 0
    outputs, inputs = linear.weight.shape
    if rank < 1 or down.shape != (rank, inputs) or up.shape != (outputs, rank):
        shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        raise BadFile(key, file, f"does not fit {layer!r} of {inputs} inputs and {outputs} outputs with {shapes}")
    if magnitude is not None:
        if magnitude.shape not in ((outputs,), (outputs, 1)):
            shape = tuple(magnitude.shape)
            raise BadFile(key, file, f"is DoRA with other than one magnitude for each output of {layer!r}: {shape}")
        magnitude = magnitude.flatten()
    scale = _alpha(key, file, layer, tensors, rank, config) / rank
    if "alpha" not in tensors and config.use_rslora:
        scale *= math.sqrt(rank)
    up = scale * up
    if not torch.isfinite(up).all():
        raise BadFile(key, file, f"is not finite at {layer!r} once it is scaled by {scale:g}, its alpha over its rank")
    return Lora(down, up, magnitude)


def _alpha(
    key: str, file: Path, layer: str, tensors: Mapping[str, torch.Tensor], rank: int, config: _PeftConfig
) -> float:
    if "alpha" in tensors:
        if tensors["alpha"].numel() != 1:
            raise BadFile(key, file, f"has an alpha of {layer!r} that is no single number")
        return tensors["alpha"].item()
    patterns = config.alpha_pattern
    default = rank if config.lora_alpha is None else config.lora_alpha
    return float(patterns.get(get_pattern_key(patterns, layer), default))


def _read_config(key: str, file: Path) -> _PeftConfig:
    """Read peft's config, as diffusers or peft write it, if there is one; raises BadFile unless it is of a LoRA."""
    written = read_header(key, file).get("lora_adapter_metadata")
    beside = file.with_name("adapter_config.json")
    where = file if written is not None else beside
    try:
        if written is not None:
            content = {name.removeprefix("transformer."): value for name, value in json.loads(written).items()}
        elif beside.is_file():
            content = json.loads(beside.read_text(encoding="utf-8"))
        else:
            return _PeftConfig()
        config = _PeftConfig.model_validate(content)
    except ValidationError as error:
        (first, *_) = error.errors()
        field = ".".join(map(str, first["loc"]))
        raise BadFile(key, where, f"has a config whose {field or 'content'} is wrong: {first['msg']}") from error
    except (OSError, ValueError, AttributeError) as error:
        raise BadFile(key, where, f"has a config that is no JSON object: {error}") from error
    variants = {field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")}
    for name in sorted(variants - {"use_dora"}):
        if (config.model_extra or {}).get(name):
            raise BadFile(key, file, f"is a LoRA with {name}, which is not served")
    if config.init_lora_weights not in _PLAIN_INITS:
        init = config.init_lora_weights
        raise BadFile(key, file, f"belongs to a base model that peft changed by {init}; convert it to a plain LoRA")
    return config
