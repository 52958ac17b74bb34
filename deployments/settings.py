"""Arguments that `serve_config.yaml` passes to the application; errors in them name the key, at start."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationInfo, field_validator, model_validator

from backends import Quantization, get_backend
from cluster.pools import BackendName, Pool, read_pools
from deployments.access.settings import AccessSettings
from deployments.jobs.settings import JobsSettings
from deployments.moderation import ModerationSettings
from stages.config import ModelConfig
from stages.plan import STAGES, Name, StageName

ServedStage = Literal["encode", StageName, "decode"]
ENCODE: ServedStage = "encode"
DECODE: ServedStage = "decode"
SERVED_STAGES: tuple[ServedStage, ...] = get_args(ServedStage)


class Placement(BaseModel):
    """The stages that a deployment's replicas run, and how.

    Attributes:
        stages: stages to run; those that denoise share one set of weights, and each image selects its LoRA.
        pool: name of the pool whose devices and environment replicas have.
        backend: name of the backend that replicas run on; settings take it from the pool.
        compilation_cache: directory that keeps what replicas compile; settings take it from the pool, too.
        fuse: adapter to fuse into the weights, where it costs nothing extra; for a deployment of one denoising stage.
        compile: whether to compile the transformer's blocks before the replica reports ready.
        max_batch_tokens: most image tokens in a forward pass; a guided image counts twice.
        preference: place in the order in which deployments of a stage get its images, 0 for the first; those of equal
            preference share them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stages: Annotated[tuple[ServedStage, ...], Field(min_length=1)]
    pool: str = "cpu"
    backend: BackendName = "cpu"
    compilation_cache: Path | None = None
    fuse: Name | None = None
    compile: StrictBool = False
    max_batch_tokens: Annotated[int, Field(strict=True, ge=1, le=2**24)] = 16384
    preference: Annotated[int, Field(strict=True, ge=0, le=1000)] = 0

    @property
    def denoises(self) -> bool:
        """Whether replicas hold the transformer."""
        return not {ENCODE, DECODE}.issuperset(self.stages)

    @field_validator("stages")
    @classmethod
    def _each_once(cls, value: tuple[ServedStage, ...]) -> tuple[ServedStage, ...]:
        if twice := sorted(stage for stage in set(value) if value.count(stage) > 1):
            raise ValueError(f"{', '.join(twice)} is there twice")
        return value

    @model_validator(mode="after")
    def _has_transformer(self) -> Placement:
        needless = {"fuse", "compile", "max_batch_tokens"} & self.model_fields_set
        if needless and not self.denoises:
            raise ValueError(f"{', '.join(sorted(needless))} must go with one of the stages {', '.join(STAGES)}")
        return self


class Settings(BaseModel):
    """Arguments of the application.

    Attributes:
        model: path of the model's config, relative to the working directory.
        default_plan: name of the model's plan for requests that name none.
        pools: path of the file of pools, relative to the working directory.
        placement: deployments by name; together they run each stage of the model's plans, and those of the same stage
            share its images.
        max_images: largest `n` of a request.
        max_images_in_service: most images that all stages together have at once, for each replica of Ingress: enough to
            fill their batches.
        max_waiting_images: most images that wait before them, likewise.
        fallback_wait_s: seconds until an image would be done, past which requests that name fallback plans get these.
        max_body_bytes: largest body of a request, in bytes.
        metrics_port: port at which a node of a cluster that is started for this config has its metrics.
        request_timeout_s: longest time that a request may take, in seconds, queues included.
        checkpoint_steps: steps after which a stage hands the image's packet back to the router, so that another replica
            can go on from there; None for never, and then it goes on from the stage's start.
        hang_factor, hang_floor_s: times as long as expected, and seconds, after both of which an attempt at a stage is
            given up and made elsewhere.
        overflow_wait_s: seconds of expected wait in all deployments of a stage that are of one preference, past which
            those of the next one get images, too; None for never, and then only while they do not work.
        stall_timeout_s: seconds that a replica's device may be at one step, prompt or batch of images; after that the
            replica takes no more work, and Serve replaces it.
        jobs: where jobs are kept, and how they are worked on; None for no jobs.
        access: who may use the API; None for everyone, and then it answers on this machine alone.
        moderation: checks of prompts and images that the operator provides.
        cors_origins: origins whose pages in browsers may call the API, `*` for any.
        log_prompts: whether prompts are logged.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Path
    default_plan: str = "hybrid"
    pools: Path = Path("cluster/pools.yaml")
    placement: Annotated[dict[Name, Placement], Field(validate_default=True)] = {
        "TextEncoder": Placement(stages=("encode",)),
        **{stage.capitalize(): Placement(stages=(stage,)) for stage in STAGES},
        "VAEDecoder": Placement(stages=("decode",)),
    }
    max_images: Annotated[int, Field(strict=True, ge=1, le=64)] = 10
    max_images_in_service: Annotated[int, Field(strict=True, ge=1, le=65536)] = 32
    max_waiting_images: Annotated[int, Field(strict=True, ge=0, le=65536)] = 1024
    fallback_wait_s: Annotated[float, Field(strict=True, gt=0.0, le=86400.0)] = 10.0
    max_body_bytes: Annotated[int, Field(strict=True, ge=1, le=2**30)] = 1024 * 1024
    metrics_port: Annotated[int, Field(strict=True, ge=1, le=65535)] = 9464
    request_timeout_s: Annotated[float, Field(strict=True, gt=0.0, le=86400.0)] = 120.0
    checkpoint_steps: Annotated[int, Field(strict=True, ge=1, le=1000)] | None = 10
    hang_factor: Annotated[float, Field(strict=True, ge=2.0, le=1000.0)] = 10.0
    hang_floor_s: Annotated[float, Field(strict=True, gt=0.0, le=86400.0)] = 45.0
    stall_timeout_s: Annotated[float, Field(strict=True, gt=0.0, le=86400.0)] = 30.0
    overflow_wait_s: Annotated[float, Field(strict=True, ge=0.0, le=86400.0)] | None = None
    jobs: JobsSettings | None = None
    access: AccessSettings | None = None
    moderation: ModerationSettings = ModerationSettings()
    cors_origins: tuple[Annotated[str, Field(pattern=r"^(\*|https?://[^*/?#\s]+)$")], ...] = ()
    log_prompts: StrictBool = False

    @field_validator("placement")
    @classmethod
    def _on_pools(cls, value: dict[str, Placement], info: ValidationInfo) -> dict[str, Placement]:
        if "pools" not in info.data:  # it is wrong itself
            return value
        path = info.data["pools"]
        pools = read_pools(path)
        for name, placement in value.items():
            for key in sorted({"backend", "compilation_cache"} & placement.model_fields_set):
                raise ValueError(f"{name}.{key} is the pool's: name a pool in place of it, one of {sorted(pools)}")
            if placement.pool not in pools:
                raise ValueError(f"{name}.pool must be one of {sorted(pools)} of {path}, not {placement.pool!r}")
        return {
            name: placement.model_copy(
                update={
                    "backend": pools[placement.pool].backend,
                    "compilation_cache": pools[placement.pool].environment.compilation_cache,
                }
            )
            for name, placement in value.items()
        }

    @model_validator(mode="after")
    def _runnable(self) -> Settings:
        model = self.read_model()
        if self.default_plan not in model.plans:
            raise ValueError(
                f"default_plan must be one of the plans of {self.model}: {', '.join(model.plans)}; "
                f"not {self.default_plan!r}"
            )
        model.check_plans()
        adapters = model.adapters
        run = {stage for placement in self.placement.values() for stage in placement.stages}
        needed = _needed_stages(model)
        if missing := [stage for stage in needed if stage not in run]:
            raise ValueError(
                f"placement must run each of {', '.join(needed)}, which the plans of {self.model} need; "
                f"it lacks {', '.join(missing)}"
            )
        if "Ingress" in self.placement:
            raise ValueError("placement.Ingress must have another name: the deployment that speaks HTTP has this one")
        if self.stall_timeout_s >= self.hang_floor_s:  # what is given up would go to the same replica again
            raise ValueError(
                f"stall_timeout_s must be below hang_floor_s, {self.hang_floor_s:g}, not {self.stall_timeout_s:g}"
            )
        self._check_preferences()
        for name, placement in self.placement.items():
            if placement.fuse not in (None, *adapters):
                raise ValueError(f"placement.{name}.fuse must be one of {sorted(adapters)}, not {placement.fuse!r}")
            if ENCODE in placement.stages:
                self._check_quantization("text_encoder", model.quantize.text_encoder, placement.backend)
            if placement.denoises:
                self._check_quantization("transformer", model.quantize.transformer, placement.backend)
        return self

    def _check_preferences(self) -> None:
        for name, placement in self.placement.items():
            before = [other for other in self.placement.values() if other.preference < placement.preference]
            if placement.preference and not any(set(placement.stages).intersection(other.stages) for other in before):
                raise ValueError(
                    f"placement.{name}.preference must be 0, not {placement.preference}: no deployment of a lower one "
                    f"runs {' or '.join(placement.stages)}"
                )
        if self.overflow_wait_s is not None and not any(placed.preference for placed in self.placement.values()):
            raise ValueError("overflow_wait_s must go with a preference above 0 of a deployment in placement")

    def _check_quantization(self, component: str, scheme: Quantization | None, backend: str) -> None:
        if scheme is None:
            return
        try:
            get_backend(backend).check_quantization(scheme)
        except ValueError as error:
            raise ValueError(f"quantize.{component} of {self.model} {error}") from error

    @property
    def pools_by_stage(self) -> dict[ServedStage, tuple[str, ...]]:
        """Names of the pools that each stage stands on; without the stages that no deployment runs."""
        stands = {
            stage: tuple(dict.fromkeys(placed.pool for placed in self.placement.values() if stage in placed.stages))
            for stage in SERVED_STAGES
        }
        return {stage: pools for stage, pools in stands.items() if pools}

    def needed_for(self, model: ModelConfig) -> dict[str, list[ServedStage]]:
        """List for each deployment the stages that it runs and the model's plans use."""
        needed = _needed_stages(model)
        return {
            name: [stage for stage in needed if stage in placement.stages] for name, placement in self.placement.items()
        }

    def read_model(self) -> ModelConfig:
        """Read the model's config; raises FileNotFoundError or `stages.yaml_file.ConfigError`."""
        return ModelConfig.read(self.model)

    def read_pools(self) -> dict[str, Pool]:
        """Read the pools that are placed on, by name; raises FileNotFoundError or `stages.yaml_file.ConfigError`."""
        used = {placement.pool for placement in self.placement.values()}
        return {name: pool for name, pool in read_pools(self.pools).items() if name in used}


def _needed_stages(model: ModelConfig) -> list[ServedStage]:
    """List the stages that a model's plans use."""
    planned = {ENCODE, DECODE, *(stage.name for plan, _ in model.plans_by_size() for stage in plan.stages)}
    return [stage for stage in SERVED_STAGES if stage in planned]
