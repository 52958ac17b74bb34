"""Resolution of a request's names and defaults, independent of HTTP and Ray."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace

from deployments.admission import Priority
from deployments.http.errors import APIError
from deployments.http.schemas import ImagesRequest
from deployments.messages import ImageRequest, Route
from deployments.settings import ServedStage
from stages.config import ModelConfig
from stages.families import get_family
from stages.image import MAX_SEED, ImageFormat
from stages.plan import STAGES, Plan, PlanError
from stages.vocabulary import prompt_warnings


@dataclass(frozen=True)
class Offer:
    """The limits of requests.

    Attributes:
        model: config of the model that is served.
        blocks: number of blocks of the model's transformer.
        default_plan: name of the model's plan for requests that name none.
        max_images: largest `n` of a request.
        max_timeout_s: longest time that a request may take, and the time of requests that name none.
        pools: names of the pools that each stage stands on.
    """

    model: ModelConfig
    blocks: int
    default_plan: str
    max_images: int
    max_timeout_s: float
    pools: Mapping[ServedStage, tuple[str, ...]]


@dataclass(frozen=True)
class Job:
    """Images to generate.

    Attributes:
        prompt: the prompt.
        negative_prompt: the negative prompt, or None if no stage needs one.
        plan: the plan, as the model can run it.
        preset: name of the model's plan that `plan` is or derives from; None for a request's own.
        size: `WIDTHxHEIGHT`.
        n: number of images.
        seed: seed of the first image; each further image adds 1.
        format: format of the files.
        quality: 0 to 100, for lossy formats.
        stream: whether to send events.
        partial_images: number of partial images to send.
        user: the end user, as the client names them.
        timeout_s: seconds after which to give up.
        priority: share of the devices while others wait, too.
        pools: names of the pools that a stage may run on, where these are not all.
        warnings: warnings for the client, sent with its images.
        fallbacks: the same images by other plans, in the order of preference, for a server under load.
    """

    prompt: str
    negative_prompt: str | None
    plan: Plan
    preset: str | None
    size: str
    n: int
    seed: int
    format: ImageFormat
    quality: int
    stream: bool
    partial_images: int
    user: str | None
    timeout_s: float
    priority: Priority
    pools: dict[ServedStage, tuple[str, ...]]
    warnings: list[str]
    fallbacks: tuple[Job, ...] = ()

    def summary(self, *, with_prompt: bool) -> str:
        """Say in a line of the log what is asked for."""
        prompts = f", prompt {self.prompt!r}, negative prompt {self.negative_prompt!r}" if with_prompt else ""
        plan = self.preset or "inline"
        return f"{self.n} of {self.size} by plan {plan}, seed {self.seed}, user {self.user!r}{prompts}"

    def routes(self, request_id: str, deadline: float) -> list[Route]:
        """Return a route for each image.

        Args:
            request_id: the request's id.
            deadline: seconds since the epoch, after which to give up.
        """
        return [
            Route(
                image=ImageRequest(
                    request_id=request_id,
                    image_index=index,
                    seed=self.seed + index,
                    size=self.size,
                    prompt=self.prompt,
                    negative_prompt=self.negative_prompt,
                ),
                plan=self.plan,
                preset=self.preset,
                format=self.format,
                quality=self.quality,
                partial_images=self.partial_images,
                deadline=deadline,
                pools=self.pools,
            )
            for index in range(self.n)
        ]


def resolve(body: ImagesRequest, offer: Offer) -> Job:
    """Resolve a request's names and defaults; a request without a seed gets a random one.

    Raises:
        APIError: a field is invalid; the error names it and what it may be.
    """
    if body.model is not None and body.model not in (offer.model.name, *offer.model.aliases):
        raise unknown_model(body.model, offer)
    if body.n > offer.max_images:
        raise _invalid("n", f"must be 1 to {offer.max_images}, not {body.n}")
    if body.stream and body.n > 1:
        raise _invalid("n", f"must be 1 with stream, not {body.n}")
    if body.partial_images and not body.stream:
        raise _invalid("partial_images", "needs stream")
    timeout_s = offer.max_timeout_s if body.timeout_s is None else body.timeout_s
    if timeout_s > offer.max_timeout_s:
        raise _invalid("timeout_s", f"must be at most {offer.max_timeout_s:g}, not {timeout_s:g}")
    size = offer.model.sizes[0] if body.size == "auto" else body.size
    if size not in offer.model.sizes:
        raise _invalid("size", f"must be one of {', '.join(('auto', *offer.model.sizes))}, not {size!r}")
    plan, preset = _plan(body, offer, size)
    try:
        plan.check_grid(offer.model.grid(size))
    except PlanError as error:
        raise _invalid("size", f"must suit the plan, whose {error}") from error
    seed = secrets.randbelow(MAX_SEED - body.n + 2) if body.seed is None else body.seed
    if seed + body.n - 1 > MAX_SEED:
        raise _invalid("seed", f"must be at most {MAX_SEED - body.n + 1} for {body.n} images")
    return Job(
        prompt=body.prompt,
        negative_prompt=plan.negative_prompt(body.negative_prompt, get_family(offer.model.family).empty_prompt),
        plan=plan,
        preset=preset,
        size=size,
        n=body.n,
        seed=seed,
        format=body.output_format,
        quality=body.output_compression,
        stream=body.stream,
        partial_images=body.partial_images,
        user=body.safety_identifier or body.user,
        timeout_s=timeout_s,
        priority=body.priority,
        pools=_pools(body, offer),
        warnings=prompt_warnings(body.prompt, body.negative_prompt, offer.model.vocabulary),
        fallbacks=tuple(_fallback(index, body, seed, offer) for index in range(len(body.fallback_plans))),
    )


def _fallback(index: int, body: ImagesRequest, seed: int, offer: Offer) -> Job:
    """Resolve a request by one of its fallback plans, which takes its guidance scale if it is guided."""
    name = body.fallback_plans[index]
    if name not in offer.model.plans:
        raise _invalid(f"fallback_plans.{index}", f"must be one of {', '.join(offer.model.plans)}, not {name!r}")
    job = resolve(
        body.model_copy(
            update={
                "plan": name,
                "fallback_plans": [],
                "seed": seed,
                "guidance_scale": body.guidance_scale if offer.model.plans[name].guided else None,
            }
        ),
        offer,
    )
    asked = body.plan if isinstance(body.plan, str) else "the request's own" if body.plan else offer.default_plan
    return replace(job, warnings=[*job.warnings, f"the server is loaded: plan {name} in place of {asked}"])


def unknown_model(name: str, offer: Offer) -> APIError:
    """The answer to a request for a model that is not served."""
    known = " or ".join(map(repr, (offer.model.name, *offer.model.aliases)))
    return APIError(404, "model_not_found", f"model must be {known}, not {name!r}", "model")


def _plan(body: ImagesRequest, offer: Offer, size: str) -> tuple[Plan, str | None]:
    """Return the plan for a size as the model can run it, and the name of the plan that it derives from, if any."""
    if isinstance(body.plan, Plan):
        preset = None
        for index, stage in enumerate(body.plan.stages):
            if stage.name not in offer.pools:
                placed = ", ".join(name for name in STAGES if name in offer.pools)
                field = f"plan.stages.{index}.name"
                raise _invalid(field, f"must be one of {placed}, which this server runs, not {stage.name!r}")
        try:
            offer.model.check_plan(body.plan, offer.blocks)
            plan = body.plan.with_adapters(offer.model.adapters)
        except PlanError as error:
            raise APIError(400, "invalid_value", f"plan.{error}", f"plan.{error.field}") from error
    else:
        preset = body.plan or offer.default_plan
        if preset not in offer.model.plans:
            raise _invalid("plan", f"must be one of {', '.join(offer.model.plans)}, or stages, not {preset!r}")
        plan = offer.model.plan(preset, size)
    if body.guidance_scale is not None:
        try:
            plan = plan.with_guidance(body.guidance_scale)
        except ValueError as error:
            raise APIError(400, "invalid_value", str(error), "guidance_scale") from error
    return plan, preset


def _pools(body: ImagesRequest, offer: Offer) -> dict[ServedStage, tuple[str, ...]]:
    """Return the pools that the request leaves to each stage of which it says something."""
    permitted: dict[ServedStage, tuple[str, ...]] = {}
    for name, choice in (body.pools or {}).items():
        stage = next((stage for stage in offer.pools if stage == name), None)
        if stage is None:
            raise _invalid(f"pools.{name}", f"must be one of the stages {', '.join(offer.pools)}")
        pools = offer.pools[stage]
        for field, named in (("only", choice.only), ("ignore", choice.ignore)):
            if unknown := [pool for pool in named or () if pool not in pools]:
                raise _invalid(
                    f"pools.{name}.{field}",
                    f"must be of the pools that {name} stands on, {', '.join(pools)}; not {unknown[0]!r}",
                )
        permitted[stage] = tuple(
            pool for pool in pools if pool in (choice.only or pools) and pool not in (choice.ignore or ())
        )
        if not permitted[stage]:
            raise _invalid(f"pools.{name}", f"must leave one of {', '.join(pools)}")
    return permitted


def _invalid(field: str, message: str) -> APIError:
    return APIError(400, "invalid_value", f"{field} {message}", field)
