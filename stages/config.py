"""The config of a model: its files, sizes, adapters and plans; read without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from backends import Quantization
from stages.families import get_family
from stages.image import MOST_PIXELS, parse_size, token_grid
from stages.plan import Name, Plan, PlanError, name_plans, read_plans
from stages.sources import BadFile, read_json
from stages.yaml_file import ConfigError, read_mapping, validate


def _in_lower_case(word: str) -> str:
    if word != word.lower():
        raise ValueError("must be in lower case")
    return word


Word = Annotated[str, Field(pattern=r"^[^\W_]+(['\u2019][^\W_]+)*$", max_length=32), AfterValidator(_in_lower_case)]
Source = Annotated[str, Field(min_length=1, max_length=4096)]
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]*$", max_length=128)]


class AdapterSource(BaseModel):
    """Where a LoRA is: a directory or a repo id, and the name of the file if there are several."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Source
    weight_name: Source | None = None


class Quantize(BaseModel):
    """How the linear layers of the large components are quantized; None leaves them as they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text_encoder: Quantization | None = None
    transformer: Quantization | None = None


class ModelConfig(BaseModel):
    """A diffusers pipeline, and the LoRAs that its further stages use.

    Attributes:
        name: name of the model in the API.
        aliases: other names that requests may use, for clients that offer no choice of names.
        family: name of the model's family, see `stages.families`.
        source: directory, or repo id on a hub; a relative directory is also looked up from the parent of the config
            file's directory.
        dtype: dtype of the weights, or None for the backend's default.
        sizes: `WIDTHxHEIGHT` in pixels; the first is the default.
        adapters: LoRAs by the names that plans use.
        plans: plans that a request may name, as the adapters allow.
        plans_at: by size, plans that take the place of those of the same names there.
        quantize: eight-bit arithmetic for the text encoder or the transformer.
        max_prompt_tokens: longest prompt, in tokens of the model's own tokenizer; by default the family's longest.
        vocabulary: all words that the model knows, in lower case, or None if it knows any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ModelName
    aliases: Annotated[tuple[ModelName, ...], Field(max_length=16)] = ()
    family: str = "qwen_image"
    source: Source
    dtype: str | None = None
    sizes: Annotated[tuple[str, ...], Field(min_length=1, max_length=64)]
    adapters: dict[Name, AdapterSource] = {}
    plans: dict[Name, Plan] = {}
    plans_at: dict[str, dict[Name, Plan]] = {}
    quantize: Quantize = Quantize()
    max_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    vocabulary: Annotated[frozenset[Word], Field(min_length=1)] | None = None

    @field_validator("aliases")
    @classmethod
    def _distinct(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        names = (info.data.get("name"), *value)
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"{', '.join(map(str, twice))} is there twice, or the model's own name")
        return value

    @field_validator("family")
    @classmethod
    def _known_family(cls, value: str) -> str:
        get_family(value)
        return value

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, value: str | None) -> str | None:
        if value == "float16":
            raise ValueError("must be float32 or bfloat16: float16 ends at 65504, which activations pass")
        if value not in (None, "float32", "bfloat16"):
            raise ValueError(f"must be float32 or bfloat16, not {value!r}")
        return value

    @field_validator("sizes")
    @classmethod
    def _readable_sizes(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        multiple = get_family(info.data["family"]).pixels_per_token if "family" in info.data else 1
        for size in value:
            width, height = parse_size(size)
            if width % multiple or height % multiple:
                raise ValueError(f"{size}: width and height must be multiples of {multiple}")
            if max(width, height) > MOST_PIXELS:
                raise ValueError(f"{size}: width and height must be at most {MOST_PIXELS}")
        if twice := [size for size, count in Counter(value).items() if count > 1]:
            raise ValueError(f"{', '.join(twice)} is there twice")
        return value

    @field_validator("max_prompt_tokens")
    @classmethod
    def _short_enough(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and "family" in info.data:
            longest = get_family(info.data["family"]).longest_prompt
            if value > longest:
                raise ValueError(f"must be at most {longest}, not {value}")
        return value

    @field_validator("plans")
    @classmethod
    def _runnable_plans(cls, value: dict[str, Plan], info: ValidationInfo) -> dict[str, Plan]:
        if "adapters" not in info.data:  # they are wrong themselves
            return value
        return _runnable(value, info.data["adapters"])

    @field_validator("plans_at")
    @classmethod
    def _runnable_plans_at(
        cls, value: dict[str, dict[Name, Plan]], info: ValidationInfo
    ) -> dict[str, dict[Name, Plan]]:
        if not {"family", "sizes", "adapters", "plans"} <= info.data.keys():
            return value
        for size, plans in value.items():
            if size not in info.data["sizes"]:
                raise ValueError(f"{size}: must be one of {list(info.data['sizes'])}")
            if unknown := plans.keys() - info.data["plans"].keys():
                raise ValueError(f"{size}.{min(unknown)}: must be one of {list(info.data['plans'])}")
        return {size: _runnable(plans, info.data["adapters"], f"{size}.") for size, plans in value.items()}

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        for size, plans in self.plans_at.items():
            for name, plan in plans.items():
                try:
                    plan.check_grid(self.grid(size))
                except PlanError as error:
                    raise ValueError(f"plans_at.{size}.{name}.{error}") from error
        return self

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a YAML file.

        Relative directories are looked up from the working directory and from the parent of the file's directory.
        `plans`, and those of a size in `plans_at`, may be the path of a file of plans, relative to this file's
        directory.

        Raises:
            FileNotFoundError: no such file.
            ConfigError: names the file and the key that is wrong.
        """
        content = read_mapping(path)
        if "plans" in content:
            content["plans"] = _inline(path, "plans", content["plans"])
        if isinstance(at := content.get("plans_at"), dict):
            content["plans_at"] = {size: _inline(path, f"plans_at.{size}", plans) for size, plans in at.items()}
        config = validate(path, cls, content)
        root = path.resolve().parent.parent

        def locate(source: str) -> str:
            return str(root / source) if (root / source).is_dir() else source

        adapters = {
            name: adapter.model_copy(update={"source": locate(adapter.source)})
            for name, adapter in config.adapters.items()
        }
        return config.model_copy(update={"source": locate(config.source), "adapters": adapters})

    def plan(self, name: str, size: str | None = None) -> Plan:
        """Return the plan of a name for images of `size`, by default the first; raises a ConfigError with all names."""
        if name not in self.plans:
            raise ConfigError(f"plan must be one of {', '.join(self.plans)}, not {name!r}")
        return self.plans_at.get(size or self.sizes[0], {}).get(name, self.plans[name])

    def plans_by_size(self) -> list[tuple[Plan, tuple[str, ...]]]:
        """Return each plan with the sizes at which its name means it."""
        apart = [(plan, (size,)) for size, plans in self.plans_at.items() for plan in plans.values()]
        own = [
            (plan, tuple(size for size in self.sizes if name not in self.plans_at.get(size, {})))
            for name, plan in self.plans.items()
        ]
        return own + apart

    def check_family(self) -> None:
        """Check that a pipeline in a directory is of the family; raises `stages.sources.BadFile`."""
        if Path(self.source).is_dir():
            family = get_family(self.family)
            pipeline = read_json(self.source, "model_index.json").get("_class_name")
            if pipeline != family.pipeline:
                index = Path(self.source) / "model_index.json"
                raise BadFile("source", index, f"is of a {pipeline}, and family {family.name} is {family.pipeline}")

    def check_plans(self) -> None:
        """Check plans against the transformer, whose own config is read only if a plan skips blocks.

        Raises:
            ConfigError: names the plan and its field.
        """
        for where, plan in self._plans_by_key():
            skips = any(stage.skip_blocks for stage in plan.stages)
            try:
                self.check_plan(plan, self.count_blocks() if skips else None)
            except PlanError as error:
                raise ConfigError(f"{where}.{error}") from error

    def _plans_by_key(self) -> Iterator[tuple[str, Plan]]:
        for name, plan in self.plans.items():
            yield f"plans.{name}", plan
        for size, plans in self.plans_at.items():
            for name, plan in plans.items():
                yield f"plans_at.{size}.{name}", plan

    def check_plan(self, plan: Plan, blocks: int | None) -> None:
        """Check a plan, see `Plan.check_transformer`; raises PlanError."""
        plan.check_transformer(blocks, guides_attention=get_family(self.family).guides_attention)

    def read_transformer(self) -> dict[str, Any]:
        """Read the transformer's own config; raises `stages.sources.BadFile`."""
        return read_json(self.source, "transformer/config.json")

    def count_blocks(self) -> int:
        """Count the transformer's blocks; raises `stages.sources.BadFile`."""
        return get_family(self.family).count_blocks(self.read_transformer())

    def grid(self, size: str, scale: float = 1.0) -> tuple[int, int]:
        """Return the rows and columns of tokens of one of `sizes`, for a stage that works at a scale of it."""
        rows, columns = token_grid(size, get_family(self.family).pixels_per_token)
        return round(rows * scale), round(columns * scale)


def _runnable(plans: Mapping[str, Plan], adapters: Collection[str], where: str = "") -> dict[str, Plan]:
    """Return plans as a model with these adapters can run them; raises ValueError, which names `where` and the key."""
    runnable = {}
    for name, plan in plans.items():
        try:
            runnable[name] = plan.with_adapters(adapters)
        except PlanError as error:
            raise ValueError(f"{where}{name}.{error}") from error
    return runnable


def _inline(path: Path, key: str, plans: object) -> object:
    """Return the plans that a key of the config at `path` holds, or that the file holds which it names."""
    if isinstance(plans, str):
        file = path.parent / plans
        if not file.is_file():
            raise ConfigError(f"{path}: {key}: there is no file {file}")
        read_plans(file)  # so that errors there name that file
        plans = read_mapping(file)
    return name_plans(plans) if isinstance(plans, dict) else plans
