"""Requests of the OpenAI Images API, with further fields for a diffusion engine.

https://platform.openai.com/docs/api-reference/images/create
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator
from pydantic_core import PydanticUseDefault

from deployments.admission import Priority
from deployments.http.errors import APIError
from stages.image import MAX_SEED, ImageFormat
from stages.plan import Plan

Text = Annotated[str, Field(max_length=256)]  # names and identifiers

# Distinguishes a plan's name from its stages before validation, so that errors concern the intended one.
_PlanOrName = Annotated[
    Annotated[Text, Field(min_length=1), Tag("name")] | Annotated[Plan, Tag("inline")],
    Discriminator(lambda value: "name" if isinstance(value, str) else "inline"),
]


def null_is_absent(value: object) -> object:
    """Give a field its default if it is null; for validators before the field's own."""
    if value is None:
        raise PydanticUseDefault
    return value


class PoolChoice(BaseModel):
    """The pools that a stage of a request may run on: those of `only`, or all, without those of `ignore`."""

    model_config = ConfigDict(extra="forbid")

    only: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    ignore: tuple[Text, ...] | None = None


class Generation(BaseModel):
    """What images to generate, in whatever way they are then asked for: OpenAI's fields, and this engine's own.

    `seed` is the seed of the first image, and each further image adds 1. `plan` is a plan's name or its stages.
    `timeout_s` is the time in seconds, queues included, after which the images are of no use. `priority` is the share
    of the devices while others wait, too. `pools` are the pools that stages may run on, by stage. OpenAI's fields that
    change nothing here take the values that ask for nothing special.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    prompt: Annotated[str, Field(min_length=1, max_length=32_000)]
    model: Text | None = None
    n: Annotated[int, Field(ge=1)] = 1
    size: Text = "auto"
    output_format: ImageFormat = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] = 95
    user: Text | None = None
    safety_identifier: Text | None = None

    quality: Literal["auto", "standard"] = "auto"
    style: Literal["vivid"] = "vivid"  # DALL-E 3's default, which some clients always send
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["auto", "low"] = "auto"  # what is checked is the operator's choice
    complexity: None = None
    frame_count: None = None
    frame_duration_ms: None = None
    svg: None = None

    negative_prompt: Annotated[str, Field(max_length=32_000)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    guidance_scale: Annotated[float, Field(ge=1.0, le=20.0)] | None = None
    plan: _PlanOrName | None = None
    timeout_s: Annotated[float, Field(gt=0.0)] | None = None
    priority: Priority = "interactive"
    pools: dict[Text, PoolChoice] | None = None

    _nulls = field_validator(
        "n", "size", "output_format", "output_compression", "quality", "style", "background", "moderation",
        "priority", mode="before",
    )(null_is_absent)  # fmt: skip

    @classmethod
    def read(cls, body: bytes) -> Self:
        """Parse a request's JSON; raises APIError, which names the invalid field, or the position of a syntax error."""
        try:
            return cls.model_validate_json(body, strict=True)
        except ValidationError as error:
            raise APIError.from_validation(error.errors()) from error


class ImagesRequest(Generation):
    """Body of `POST /v1/images/generations`: all fields of OpenAI's API, and this engine's own, see `Generation`.

    `fallback_plans` names plans to take, the first that is fast enough, while the server is too loaded for `plan`.
    """

    response_format: Literal["b64_json"] = "b64_json"
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0
    fallback_plans: Annotated[list[Text], Field(max_length=8)] = []

    _more_nulls = field_validator(
        "response_format", "stream", "partial_images", "fallback_plans", mode="before"
    )(null_is_absent)  # fmt: skip


class ErrorDetail(BaseModel):
    """What is wrong: `param` is the field, if it is a field."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """Body of an error."""

    error: ErrorDetail
