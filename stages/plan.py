"""How one image is made, as data: the stages, the noise levels that each covers, and what they cost."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stages.yaml_file import read_mapping, validate

StageName = Literal["base", "bridge", "distilled"]
STAGES: tuple[StageName, ...] = ("base", "bridge", "distilled")

MOST_PARTS = 8  # parts of stages in one plan

# A distilled adapter at a fraction of its strength stands in for a bridge that nobody trained.
UNTRAINED_BRIDGE_SCALE = 0.5

Sigma = Annotated[float, Field(ge=0.0, le=1.0)]

# Names of adapters, deployments and a model's plans; a plan's becomes a metric's tag.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]


class PlanError(ValueError):
    """A plan that cannot be run: `field` (e.g. `stages.0.sigma_end`) is wrong, and `message` says what it must be."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.field, self.message = field, message

    def __str__(self) -> str:
        return f"{self.field} {self.message}"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FirstBlockSpec(_Strict):
    """First-Block Cache: reuses the later blocks' contribution while the first block's changes little.

    Attributes:
        threshold: largest relative change of the first block's residual at which the others are skipped.
    """

    kind: Literal["first_block"] = "first_block"
    threshold: Annotated[float, Field(gt=0.0, lt=1.0)]


class TaylorSeerSpec(_Strict):
    """TaylorSeer: evaluates one step in `interval` and extrapolates the velocity of the others.

    Attributes:
        interval: steps from one evaluation to the next.
        warmup: number of first steps, all of them evaluated.
        order: order of the extrapolation.
    """

    kind: Literal["taylorseer"] = "taylorseer"
    interval: Annotated[int, Field(ge=2, le=50)]
    warmup: Annotated[int, Field(ge=1, le=100)] = 3
    order: Annotated[int, Field(ge=0, le=4)] = 1


class TeaCacheSpec(_Strict):
    """TeaCache: reuses the blocks' contribution while the input of the first block changes little.

    Attributes:
        threshold: largest change, summed over the steps since the last evaluation, at which the blocks are skipped.
        coefficients: polynomial, highest power first, that maps the relative change of the blocks' input to that of
            their output; fitted for a model, or (1, 0) for the identity.
    """

    kind: Literal["teacache"] = "teacache"
    threshold: Annotated[float, Field(gt=0.0, le=10.0)]
    coefficients: Annotated[tuple[Annotated[float, Field(ge=-1e6, le=1e6)], ...], Field(min_length=1, max_length=8)] = (
        1.0,
        0.0,
    )


class MagCacheSpec(_Strict):
    """MagCache: reuses the blocks' contribution while its magnitude is known to change little.

    Attributes:
        threshold: largest error of the magnitude, summed over the steps since the last evaluation.
        ratios: magnitude of the contribution at each step over that at the step before, measured for a model by
            `python -m bench ratios`; for another number of steps, the nearest entries are used.
        most_skipped: largest number of consecutive steps that are skipped.
        retention: share of the steps, from the first on, that are always evaluated.
    """

    kind: Literal["magcache"] = "magcache"
    threshold: Annotated[float, Field(gt=0.0, le=10.0)]
    ratios: Annotated[tuple[Annotated[float, Field(gt=0.0, le=10.0)], ...], Field(min_length=1, max_length=1000)]
    most_skipped: Annotated[int, Field(ge=1, le=100)] = 3
    retention: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2


class SeaCacheSpec(_Strict):
    """SeaCache: reuses the blocks' contribution while the latent's signal, without its noise, changes little.

    Attributes:
        threshold: largest change, summed over the steps since the last evaluation, at which the blocks are skipped.
        order: 1 to extrapolate the contribution from the last two, 0 to reuse the last.
        most_skipped: largest number of consecutive steps that are skipped.
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
        scale: strength of the extrapolation, the paper's phi.
        tau: largest factor by which it may increase the L1 norm of the attention output.
        alpha: weight of the guided output where it is blended with the unguided one.
    """

    scale: Annotated[float, Field(gt=0.0, le=20.0)] = 5.0
    tau: Annotated[float, Field(ge=1.0, le=20.0)] = 2.5
    alpha: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25


class StageSpec(_Strict):
    """A stage of a plan, or a part of one: how to cover a range of noise levels.

    Attributes:
        name: name of the stage, which decides the deployment that runs it.
        sigma_start, sigma_end: noise levels, 1 for pure noise, 0 for a clean latent.
        steps: number of Euler steps; guidance doubles the network evaluations of each.
        guidance_scale: scale of classifier-free guidance; 1 means none.
        shift: spacing of the steps: `dynamic` (the base model's own, from its scheduler's config, with its terminal
            sigma) or a constant, exp(mu) of diffusers' exponential shift (3 for Qwen-Image-Lightning).
        adapter: name of the LoRA, or None for the base model alone.
        adapter_scale: strength of the LoRA.
        reads_negative: whether the negated negative prompt follows the prompt; see `stages.denoise.join_negative`.
        attention_guidance: guidance away from the negative prompt without a second evaluation, for images that have
            such a prompt, or None. It replaces classifier-free guidance at large steps and with adapters that were not
            trained to read the negative prompt.
        cache: reuse between steps, or None.
        skip_blocks: indices of the transformer's blocks to skip.
        scale: share of the image's width and height that the stage works at, 1 or 1/2; what is drawn where takes no
            fine grid. The latent is enlarged where the next stage works at 1, see `stages.lift`.
    """

    name: StageName
    sigma_start: Sigma
    sigma_end: Sigma
    steps: Annotated[int, Field(strict=True, ge=1, le=1000)]
    guidance_scale: Annotated[float, Field(ge=1.0, le=20.0)] = 1.0
    shift: Literal["dynamic"] | Annotated[float, Field(ge=0.1, le=100.0)] = "dynamic"
    adapter: Name | None = None
    adapter_scale: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    reads_negative: bool = False
    attention_guidance: AttentionGuidanceSpec | None = None
    cache: CacheSpec | None = None
    skip_blocks: frozenset[Annotated[int, Field(ge=0, lt=1000)]] = frozenset()
    scale: float = 1.0

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on."""
        return self.guidance_scale > 1.0

    def needs_negative(self, avoids: bool = True) -> bool:
        """Whether the stage takes a negative prompt.

        Args:
            avoids: whether the image has a negative prompt; one without gets the empty prompt where one is needed.
        """
        return self.guided or self.reads_negative or (avoids and self.attention_guidance is not None)

    @property
    def evaluations(self) -> int:
        """Rows that one step takes in a forward pass."""
        return 2 if self.guided else 1

    @property
    def nfe(self) -> int:
        """Network evaluations if no cache hits; evaluations that skip blocks count in full."""
        return self.steps * self.evaluations

    @property
    def step_work(self) -> float:
        """Network evaluations of one step, weighted by their share of the image's tokens."""
        return self.evaluations * self.scale**2

    @property
    def work(self) -> float:
        """Network evaluations if no cache hits, weighted likewise."""
        return self.steps * self.step_work

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.scale not in (0.5, 1.0):
            raise PlanError("scale", f"must be 1 or 0.5, not {self.scale}")
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
    """Stages that lead from pure noise to a clean latent; other sequences raise pydantic's ValidationError.

    A stage may come in parts, which share its name and may differ in all else: base begins without guidance, say.
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
        if last.scale != 1.0:
            raise PlanError(f"stages.{len(self.stages) - 1}.scale", f"must be 1 at the end, not {last.scale}")
        for index, (before, after) in enumerate(zip(self.stages, self.stages[1:], strict=False), start=1):
            if after.sigma_start != before.sigma_end:
                raise PlanError(
                    f"stages.{index}.sigma_start",
                    f"must be {before.sigma_end}, where {before.name} ends, not {after.sigma_start}",
                )
            if after.scale < before.scale:
                raise PlanError(f"stages.{index}.scale", f"must not be below {before.scale}, which is {before.name}'s")
            if STAGES.index(after.name) < STAGES.index(before.name):
                raise PlanError(f"stages.{index}.name", f"must not be before {before.name} in {', '.join(STAGES)}")
        return self

    @property
    def nfe(self) -> int:
        """Network evaluations of one image if no cache hits."""
        return sum(stage.nfe for stage in self.stages)

    def steps_left(self, done: int) -> list[int]:
        """Return how many steps of each stage are left once the plan's first `done` steps are done."""
        left = []
        for stage in self.stages:
            left.append(stage.steps - min(done, stage.steps))
            done -= stage.steps - left[-1]
        return left

    @property
    def work(self) -> float:
        """Network evaluations of one image if no cache hits, weighted by their share of the image's tokens."""
        return sum(stage.work for stage in self.stages)

    @property
    def guided(self) -> bool:
        """Whether a guidance scale affects any stage."""
        return any(stage.guided for stage in self.stages)

    def needs_negative(self, avoids: bool = True) -> bool:
        """Whether any stage takes a negative prompt; see `StageSpec.needs_negative`."""
        return any(stage.needs_negative(avoids) for stage in self.stages)

    def negative_prompt(self, asked: str | None, empty: str) -> str | None:
        """Return the negative prompt to encode, or None if no stage needs one.

        Args:
            asked: the request's negative prompt, if it has one; one of nothing but spaces is none.
            empty: the prompt that stands for no negative prompt.
        """
        asked = asked if asked and asked.strip() else None
        return (asked or empty) if self.needs_negative(avoids=asked is not None) else None

    def with_guidance(self, scale: float) -> Plan:
        """Return the plan at another guidance scale, 1 for none.

        Raises:
            ValueError: no stage is guided, so a scale would be ignored; or the scale is out of range.
        """
        if not self.guided:
            if scale == 1.0:
                return self
            raise ValueError(f"guidance_scale has no effect on plan {self.name!r}, none of whose stages is guided")
        stages = [
            StageSpec(**{**stage.model_dump(), "guidance_scale": scale}) if stage.guided else stage
            for stage in self.stages
        ]
        return Plan(name=self.name, stages=tuple(stages))

    def check_transformer(self, blocks: int | None, *, guides_attention: bool) -> None:
        """Check what depends on the transformer, except for its adapters.

        Args:
            blocks: number of the transformer's blocks; may be None where no stage skips any.
            guides_attention: whether the transformer supports attention guidance.

        Raises:
            PlanError: a stage skips a block that does not exist, skips all blocks, or needs attention guidance that
                the transformer does not support.
        """
        for index, stage in enumerate(self.stages):
            last = max(stage.skip_blocks, default=-1)
            if blocks is not None and last >= blocks:
                raise PlanError(f"stages.{index}.skip_blocks", f"must be below {blocks}, not {last}")
            if len(stage.skip_blocks) == blocks:
                raise PlanError(f"stages.{index}.skip_blocks", f"must leave one of {blocks} blocks")
            if stage.attention_guidance is not None and not guides_attention:
                raise PlanError(f"stages.{index}.attention_guidance", "is not known to the model's family")

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raise PlanError if a stage works at half an image's size and the image's rows or columns are odd.

        Args:
            grid: rows and columns of the image's tokens.
        """
        for index, stage in enumerate(self.stages):
            if any(side * stage.scale % 1 for side in grid):
                raise PlanError(f"stages.{index}.scale", f"must be 1 for {grid[0]}x{grid[1]} tokens, not {stage.scale}")

    def with_adapters(self, available: Collection[str]) -> Plan:
        """Return the plan as a model with these adapters can run it.

        In a model without a trained bridge (an adapter called `bridge`), a bridge stage that names it uses the
        distilled adapter at reduced strength instead.

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
    """Turn stages by plan name, as configs have them, into plans to validate."""
    return {name: {"name": name, "stages": each} for name, each in stages.items()}


def read_plans(path: Path) -> dict[str, Plan]:
    """Read a YAML file that maps names of plans to their stages.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: names the file and the key that is wrong.
    """
    return validate(path, dict[Name, Plan], name_plans(read_mapping(path)))
