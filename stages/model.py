"""Which model is served: where its parts are, its sizes and its adapters."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from backends import Backend, Quantization
from stages.lora_files import Lora, linear_layers, read_lora
from stages.plan import Name, Plan, name_plans, read_plans
from stages.sigmas import SchedulerConfig
from stages.vae import convolve_images
from stages.weight_files import BadFile, check_loaded, find_adapter, find_part, load_part
from stages.yaml_file import ConfigError, read_mapping, validate

# Eight pixels to a latent, two latents to a token: fixed by Qwen-Image's architecture.
PIXELS_PER_TOKEN = 16
MOST_PIXELS = 4096  # of a side

# Modules keep adapters under their names, beside attributes of their own.
_TAKEN = frozenset(dir(torch.nn.ModuleDict()))


Word = Annotated[str, Field(pattern=r"^[^\WA-Z_]+$", max_length=32)]
Source = Annotated[str, Field(min_length=1, max_length=4096)]
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]*$", max_length=128)]

TEXT_ENCODER, TRANSFORMER, VAE = (
    Qwen2_5_VLForConditionalGeneration,
    QwenImageTransformer2DModel,
    AutoencoderKLQwenImage,
)


class AdapterSource(BaseModel):
    """A LoRA: a directory or a repo id, and the file in it where there are several."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Source
    weight_name: Source | None = None


class Quantize(BaseModel):
    """How the linear layers of the large parts are quantized, or None for not at all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text_encoder: Quantization | None = None
    transformer: Quantization | None = None


class ModelConfig(BaseModel):
    """A diffusers Qwen-Image pipeline and the LoRAs that make its other stages.

    Attributes:
        name: what the API calls it.
        aliases: other names that requests may call it by, for clients that offer no choice of names.
        source: directory, or repo id on a hub; a directory is looked up from the config file's own place too.
        dtype: of the weights, or None for the backend's default.
        sizes: `WIDTHxHEIGHT` in pixels, the first one the default.
        adapters: LoRA by the name that plans use.
        plans: those that a request may name, by their names and as the adapters allow.
        quantize: eight bits for the text encoder or the transformer.
        max_prompt_tokens: longest prompt, in tokens of the model's own tokenizer; 1019 and the template's last five are
            what diffusers keeps.
        vocabulary: all words that the model knows, in lower case, or None if it knows any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ModelName
    aliases: Annotated[tuple[ModelName, ...], Field(max_length=16)] = ()
    source: Source
    dtype: str | None = None
    sizes: Annotated[tuple[str, ...], Field(min_length=1, max_length=64)]
    adapters: dict[Name, AdapterSource] = {}
    plans: dict[Name, Plan] = {}
    quantize: Quantize = Quantize()
    max_prompt_tokens: Annotated[int, Field(ge=1, le=1019)] = 1019
    vocabulary: Annotated[frozenset[Word], Field(min_length=1)] | None = None

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, value: str | None) -> str | None:
        if value == "float16":
            raise ValueError("must be float32 or bfloat16: float16 ends at 65504, which Qwen-Image's activations pass")
        if value not in (None, "float32", "bfloat16"):
            raise ValueError(f"must be float32 or bfloat16, not {value!r}")
        return value

    @field_validator("sizes")
    @classmethod
    def _readable_sizes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for size in value:
            width, height = parse_size(size)
            if width % PIXELS_PER_TOKEN or height % PIXELS_PER_TOKEN:
                raise ValueError(f"{size}: width and height must be multiples of {PIXELS_PER_TOKEN}")
            if max(width, height) > MOST_PIXELS:
                raise ValueError(f"{size}: width and height must be at most {MOST_PIXELS}")
        if twice := [size for size, count in Counter(value).items() if count > 1]:
            raise ValueError(f"{', '.join(twice)} is there twice")
        return value

    @field_validator("adapters")
    @classmethod
    def _distinct_names(cls, value: dict[str, AdapterSource]) -> dict[str, AdapterSource]:
        if taken := _TAKEN.intersection(value):
            raise ValueError(f"{', '.join(sorted(taken))}: is taken by torch's modules, which keep adapters by name")
        return value

    @field_validator("plans")
    @classmethod
    def _runnable_plans(cls, value: dict[str, Plan], info: ValidationInfo) -> dict[str, Plan]:
        runnable = {}
        for name, plan in value.items():
            try:
                runnable[name] = plan.with_adapters(info.data.get("adapters", {}))
            except ValueError as error:
                raise ValueError(f"{name}.{error}") from error
        return runnable

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a YAML file.

        Relative directories in it are found from the working directory or from the file's parent's. `plans` may be
        the name of a file, beside this one or in a directory there, that has them.

        Raises:
            FileNotFoundError: no such file, or no such file of plans.
            ConfigError: names the file and the key that is wrong.
        """
        content = read_mapping(path)
        if isinstance(plans := content.get("plans"), str):
            read_plans(path.parent / plans)  # so that what is wrong there is told with that file's name
            content["plans"] = plans = read_mapping(path.parent / plans)
        if isinstance(plans, dict):
            content["plans"] = name_plans(plans)
        config = validate(path, cls, content)
        root = path.resolve().parent.parent

        def locate(source: str) -> str:
            return str(root / source) if (root / source).is_dir() else source

        adapters = {
            name: adapter.model_copy(update={"source": locate(adapter.source)})
            for name, adapter in config.adapters.items()
        }
        return config.model_copy(update={"source": locate(config.source), "adapters": adapters})

    def plan(self, name: str) -> Plan:
        """A plan by its name; raises ConfigError that tells which there are."""
        if name not in self.plans:
            raise ConfigError(f"plan must be one of {', '.join(self.plans)}, not {name!r}")
        return self.plans[name]

    def check_plans(self) -> None:
        """Raises ConfigError if a plan skips blocks that the transformer lacks, by its config, if any does."""
        for plan in self.plans.values():
            if any(stage.skip_blocks for stage in plan.stages):
                try:
                    plan.check_blocks(self.read_transformer()["num_layers"])
                except ValueError as error:
                    raise ConfigError(f"plans.{plan.name}.{error}") from error

    def read_transformer(self) -> dict[str, Any]:
        """The transformer's own config, with `num_layers` and `in_channels`."""
        return QwenImageTransformer2DModel.load_config(self.source, subfolder="transformer")

    def dtype_on(self, backend: Backend) -> torch.dtype:
        """Of the weights: the config's, or else the backend's default."""
        return getattr(torch, self.dtype) if self.dtype else backend.default_dtype


def parse_size(size: str) -> tuple[int, int]:
    """`WIDTHxHEIGHT` as two integers; raises ValueError."""
    match = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", size)
    if match is None:
        raise ValueError(f"size must be WIDTHxHEIGHT, not {size!r}")
    return int(match[1]), int(match[2])


def token_grid(size: str) -> tuple[int, int]:
    """Rows and columns of tokens of an image of `WIDTHxHEIGHT` pixels."""
    width, height = parse_size(size)
    return height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN


def load_text_encoder(config: ModelConfig, backend: Backend) -> QwenImagePipeline:
    """A pipeline of tokenizer and text encoder alone, for its `encode_prompt`.

    Raises:
        BadFile: files are missing, truncated or not finite, or hold other weights than the text encoder has.
    """
    text_encoder = load_part(TEXT_ENCODER, config.source, "text_encoder", dtype=config.dtype_on(backend))
    text_encoder = backend.place(text_encoder)
    check_loaded(text_encoder, config.source, "text_encoder")
    if config.quantize.text_encoder:
        backend.quantize(text_encoder.model.language_model.layers, config.quantize.text_encoder)
    return QwenImagePipeline(
        scheduler=None,
        vae=None,
        text_encoder=text_encoder,
        tokenizer=load_tokenizer(config),
        transformer=None,
    )


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The text encoder's, of the class that its own config names; raises BadFile."""
    directory = find_part(config.source, "tokenizer")
    if not (directory / "tokenizer_config.json").is_file():
        raise BadFile("source", directory / "tokenizer_config.json", "is missing")
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # tokenizers raises no narrower one
        raise BadFile("source", directory, f"cannot be loaded: {str(error).splitlines()[0]}") from error


def load_transformer(config: ModelConfig, backend: Backend) -> QwenImageTransformer2DModel:
    """The transformer without adapters; raises BadFile as `load_text_encoder` does."""
    transformer = load_part(TRANSFORMER, config.source, "transformer", torch_dtype=config.dtype_on(backend))
    transformer = backend.place(transformer)
    check_loaded(transformer, config.source, "transformer")
    return transformer


def load_adapters(config: ModelConfig, transformer: QwenImageTransformer2DModel) -> dict[str, dict[str, Lora]]:
    """What each adapter of the config adds to the layers of `transformer`, which may be on the meta device.

    Raises:
        BadFile: a file is no LoRA of this transformer, or not a complete one, see `stages.lora_files`.
    """
    layers = linear_layers(transformer)
    adapters = {}
    for name, adapter in config.adapters.items():
        key = f"adapters.{name}.source"
        adapters[name] = read_lora(key, find_adapter(key, adapter.source, adapter.weight_name), layers)
    return adapters


def load_scheduler(config: ModelConfig) -> FlowMatchEulerDiscreteScheduler:
    """The base model's scheduler; raises ConfigError for one whose steps are others than `stages.sigmas` takes."""
    content = FlowMatchEulerDiscreteScheduler.load_config(config.source, subfolder="scheduler")
    validate(Path(config.source) / "scheduler" / "scheduler_config.json", SchedulerConfig, content)
    return FlowMatchEulerDiscreteScheduler.from_config(content)


def load_vae(config: ModelConfig, backend: Backend) -> AutoencoderKLQwenImage:
    """The autoencoder, ready for single images; raises BadFile as `load_text_encoder` does."""
    vae = backend.place(load_part(VAE, config.source, "vae", torch_dtype=config.dtype_on(backend)))
    check_loaded(vae, config.source, "vae")
    return convolve_images(vae)
