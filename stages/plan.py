"""What happens to one image, as data: which stages, over which noise levels, at what cost."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stages.yaml_file import read_mapping, validate

StageName = Literal["base", "bridge", "distilled"]
STAGES: tuple[StageName, ...] = ("base", "bridge", "distilled")

MOST_PARTS = 8  # of a plan

# A distilled adapter at part of its strength stands in for a bridge that nobody trained.
UNTRAINED_BRIDGE_SCALE = 0.5

Sigma = Annotated[float, Field(ge=0.0, le=1.0)]

# Of an adapter, which becomes the name of modules, and of a model's plan, which becomes a metric's tag.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]


class PlanError(ValueError):
    """A plan that cannot be run: `field`, as `stages.0.sigma_end`, is wrong, and `message` says what it must be."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.field, self.message = field, message

    def __str__(self) -> str:
        return f"{self.field} {self.message}"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FirstBlockSpec(_Strict):
    """First-Block Cache: the blocks after the first keep their contribution while the first one's changes little.

    Attributes:
        threshold: largest relative change of the first block's residual at which the others are skipped.
    """

    kind: Literal["first_block"] = "first_block"
    threshold: Annotated[float, Field(gt=0.0, lt=1.0)]


class TaylorSeerSpec(_Strict):
    """TaylorSeer: one evaluation in `interval` steps, the velocity between them extrapolated.

    Attributes:
        interval: steps from one evaluation to the next.
        warmup: first steps, all of them evaluated.
        order: of the extrapolation.
    """

    kind: Literal["taylorseer"] = "taylorseer"
    interval: Annotated[int, Field(ge=2, le=50)]
    warmup: Annotated[int, Field(ge=1, le=100)] = 3
    order: Annotated[int, Field(ge=0, le=4)] = 1


class TeaCacheSpec(_Strict):
    """TeaCache: the blocks keep their contribution while what enters the first one changes little.

    Attributes:
        threshold: largest change, summed over the steps since the last evaluation, at which they are skipped.
        coefficients: of a polynomial, highest power first, from the relative change of what enters to that of what
            leaves; fitted for a model, or 1, 0 to take the one for the other.
    """

    kind: Literal["teacache"] = "teacache"
    threshold: Annotated[float, Field(gt=0.0, le=10.0)]
    coefficients: Annotated[tuple[Annotated[float, Field(ge=-1e6, le=1e6)], ...], Field(min_length=1, max_length=8)] = (
        1.0,
        0.0,
    )


class MagCacheSpec(_Strict):
    """MagCache: the blocks keep their contribution while its magnitude is known to change little.

    Attributes:
        threshold: largest error of the magnitude, summed over the steps since the last evaluation.
        ratios: magnitude of the contribution at a step over that of the step before, measured for a model by
            `python -m bench ratios`; for other numbers of steps the nearest are taken.
        most_skipped: steps in a row.
        retention: share of the first steps, all of them evaluated.
    """

    kind: Literal["magcache"] = "magcache"
    threshold: Annotated[float, Field(gt=0.0, le=10.0)]
    ratios: Annotated[tuple[Annotated[float, Field(gt=0.0, le=10.0)], ...], Field(min_length=1, max_length=1000)]
    most_skipped: Annotated[int, Field(ge=1, le=100)] = 3
    retention: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2


class SeaCacheSpec(_Strict):
    """SeaCache: the blocks keep their contribution while the latent's signal, without its noise, changes little.

    Attributes:
        threshold: largest change, summed over the steps since the last evaluation, at which they are skipped.
        order: 1 to extrapolate the contribution by the last two, 0 to keep the last.
        most_skipped: steps in a row.
    """

    kind: Literal["seacache"] = "seacache"
    threshold: Annotated[float, Field(gt=0.0, le=10.0)]
    order: Annotated[int, Field(ge=0, le=1)] = 1
    most_skipped: Annotated[int, Field(ge=1, le=100)] = 2


CacheSpec = Annotated[
    FirstBlockSpec | TaylorSeerSpec | TeaCacheSpec | MagCacheSpec | SeaCacheSpec, Field(discriminator="kind")
]


class AttentionGuidanceSpec(_Strict):
    """Normalized Attention Guidance away from the negative prompt, within one evaluation; see `stages.text`.

    Attributes:
        scale: of the extrapolation, the paper's phi.
        tau: most that it may multiply the L1 norm of attention's answer by.
        alpha: share of the way that is gone.
    """

    scale: Annotated[float, Field(gt=0.0, le=20.0)] = 5.0
    tau: Annotated[float, Field(ge=1.0, le=20.0)] = 2.5
    alpha: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25


class StageSpec(_Strict):
    """One stage's share of a trajectory, or a part of it.

    Attributes:
        name: which deployment runs it.
        sigma_start, sigma_end: noise levels, 1 for pure noise, 0 for a clean latent.
        steps: Euler steps; guidance doubles the network evaluations of each.
        guidance_scale: of classifier-free guidance; 1 is none.
        shift: spacing of the steps: `dynamic` (the base model's own, as its scheduler's config says, with its terminal
            sigma) or a constant, exp(mu) of diffusers' exponential shift (3 for Qwen-Image-Lightning).
        adapter: name of the LoRA, or None for the base model alone.
        adapter_scale: its weight.
        reads_negative: whether the negative prompt follows the prompt, negated; see `stages.denoise.join_negative`.
        attention_guidance: of images with a negative prompt, away from it without a second evaluation, or None; in
            place of classifier-free guidance, for large steps and for adapters that did not learn to read it.
        cache: reuse between steps, or None.
        skip_blocks: indices of the transformer's blocks that this stage does without.
    """

    name: StageName
    sigma_start: Sigma
    sigma_end: Sigma
    steps: Annotated[int, Field(ge=1, le=1000)]
    guidance_scale: Annotated[float, Field(ge=1.0, le=20.0)] = 1.0
    shift: Literal["dynamic"] | Annotated[float, Field(ge=0.1, le=100.0)] = "dynamic"
    adapter: Name | None = None
    adapter_scale: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    reads_negative: bool = False
    attention_guidance: AttentionGuidanceSpec | None = None
    cache: CacheSpec | None = None
    skip_blocks: frozenset[Annotated[int, Field(ge=0, lt=1000)]] = frozenset()

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1.0

    def needs_negative(self, avoids: bool = True) -> bool:
        """Whether it takes a negative prompt, the empty one of an image that `avoids` nothing included."""
        return self.guided or self.reads_negative or (avoids and self.attention_guidance is not None)

    @property
    def evaluations(self) -> int:
        """Rows of a forward pass that a step takes."""
        return 2 if self.guided else 1

    @property
    def nfe(self) -> int:
        """Network evaluations if no cache hits; those that skip blocks count in full."""
        return self.steps * self.evaluations

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sigma_end >= self.sigma_start:
            raise PlanError("sigma_end", f"must be below sigma_start, {self.sigma_start}, not {self.sigma_end}")
        if self.guided and self.adapter is not None:
            raise PlanError("guidance_scale", f"must be 1 with adapter {self.adapter!r}, which takes no guidance")
        if self.reads_negative and self.adapter is None:
            raise PlanError("reads_negative", "needs an adapter that learned it")
        if self.attention_guidance is not None and (self.guided or self.reads_negative):
            raise PlanError("attention_guidance", "takes the place of a guidance_scale above 1 and of reads_negative")
        if isinstance(self.cache, FirstBlockSpec) and 0 in self.skip_blocks:
            raise PlanError("skip_blocks", "must not have 0 with a first_block cache, which decides by that block")
        return self


class Plan(_Strict):
    """Stages that lead from pure noise to a clean latent; pydantic's ValidationError where they do not.

    A stage may come in parts, which differ in all but the name: base without guidance at first, say.
    """

    name: Annotated[str, Field(min_length=1, max_length=256)] = "inline"
    stages: Annotated[tuple[StageSpec, ...], Field(min_length=1, max_length=MOST_PARTS)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        first, last = self.stages[0], self.stages[-1]
        if first.sigma_start != 1.0:
            raise PlanError("stages.0.sigma_start", f"must be 1 (pure noise), not {first.sigma_start}")
        if last.sigma_end != 0.0:
            raise PlanError(f"stages.{len(self.stages) - 1}.sigma_end", f"must be 0 (clean), not {last.sigma_end}")
        for index, (before, after) in enumerate(zip(self.stages, self.stages[1:], strict=False), start=1):
            if after.sigma_start != before.sigma_end:
                raise PlanError(
                    f"stages.{index}.sigma_start",
                    f"must be {before.sigma_end}, where {before.name} ends, not {after.sigma_start}",
                )
            if STAGES.index(after.name) < STAGES.index(before.name):
                raise PlanError(f"stages.{index}.name", f"must not be before {before.name} in {', '.join(STAGES)}")
        return self

    @property
    def nfe(self) -> int:
        """Network evaluations of one image if no cache hits."""
        return sum(stage.nfe for stage in self.stages)

    @property
    def guided(self) -> bool:
        """Whether a guidance scale makes a difference to any stage."""
        return any(stage.guided for stage in self.stages)

    def needs_negative(self, avoids: bool = True) -> bool:
        """Whether any stage takes a negative prompt; see `StageSpec.needs_negative`."""
        return any(stage.needs_negative(avoids) for stage in self.stages)

    def negative_prompt(self, asked: str | None, empty: str) -> str | None:
        """The negative prompt to encode, or None if no stage needs one.

        Args:
            asked: the request's, if it has one.
            empty: what stands for none in particular.
        """
        return (asked or empty) if self.needs_negative(avoids=bool(asked)) else None

    def with_guidance(self, scale: float) -> Plan:
        """The same plan at another guidance scale, 1 for none.

        Raises:
            ValueError: no stage is guided, so that a scale would be ignored; or the scale is out of range.
        """
        if not self.guided:
            raise ValueError(f"guidance_scale has no effect on plan {self.name!r}, none of whose stages is guided")
        stages = [
            StageSpec(**{**stage.model_dump(), "guidance_scale": scale}) if stage.guided else stage
            for stage in self.stages
        ]
        return Plan(name=self.name, stages=tuple(stages))

    def check_transformer(self, blocks: int | None, *, guides_attention: bool) -> None:
        """Check what depends on the transformer, its adapters apart.

        Args:
            blocks: that it has; may be None where no stage skips any.
            guides_attention: whether it can.

        Raises:
            PlanError: a stage skips a block that is not there, or all there are, or guides attention where
                none can be.
        """
        for index, stage in enumerate(self.stages):
            last = max(stage.skip_blocks, default=-1)
            if blocks is not None and last >= blocks:
                raise PlanError(f"stages.{index}.skip_blocks", f"must be below {blocks}, not {last}")
            if len(stage.skip_blocks) == blocks:
                raise PlanError(f"stages.{index}.skip_blocks", f"must leave one of {blocks} blocks")
            if stage.attention_guidance is not None and not guides_attention:
                raise PlanError(f"stages.{index}.attention_guidance", "is not known to the model's family")

    def with_adapters(self, available: Collection[str]) -> Plan:
        """The plan as a model with these adapters can run it.

        In a model without a trained bridge, one that is called `bridge`, a bridge stage that asks for it gets a
        training-free one.

        Raises:
            PlanError: an adapter is missing and nothing can stand in for it.
        """
        stages = []
        for index, stage in enumerate(self.stages):
            if stage.adapter is not None and stage.adapter not in available:
                if not stage.name == stage.adapter == "bridge" or "distilled" not in available:
                    raise PlanError(
                        f"stages.{index}.adapter", f"must be one of {sorted(available)}, not {stage.adapter!r}"
                    )
                scale = UNTRAINED_BRIDGE_SCALE * stage.adapter_scale
                stand_in = {"adapter": "distilled", "adapter_scale": scale, "reads_negative": False}
                stage = stage.model_copy(update=stand_in)
            stages.append(stage)
        return self.model_copy(update={"stages": tuple(stages)})


def name_plans(stages: Mapping[str, Any]) -> dict[str, Any]:
    """Plans to validate from stages by the plan's name, as configs have them."""
    return {name: {"name": name, "stages": each} for name, each in stages.items()}


def read_plans(path: Path) -> dict[str, Plan]:
    """The plans of a YAML file that has a plan's stages under its name.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: names the file and the key that is wrong.
    """
    return validate(path, dict[Name, Plan], name_plans(read_mapping(path)))
