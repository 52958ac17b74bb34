"""Messages between deployments: JSON with a version, and bytes beside it; `stages.wire` says when to raise it.

Pools run different environments, so no class of this project or of a library is pickled.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from deployments.settings import Placement, ServedStage
from stages.config import ModelConfig
from stages.image import ImageFormat, megapixels
from stages.plan import Plan
from stages.spans import Span
from stages.wire import OtherVersion, Version, to_plain

T = TypeVar("T")

VERSION = Version(3, 2)


class MessageError(ValueError):
    """A message of this version with other fields, or none at all."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)  # for these are logged


class _Message(_Part):
    version: Version = VERSION

    def to_json(self) -> str:
        """Serialise."""
        return json.dumps(to_plain(self))

    @classmethod
    def from_json(cls, data: str) -> Self:
        """Inverse of `to_json`; raises OtherVersion or MessageError."""
        return _read(TypeAdapter(cls), data)


class Start(_Message):
    """What a replica is started with.

    Attributes:
        model: the model's config.
        placement: the stages to run, and how.
        stall_timeout_s: seconds that the replica's device may be at one piece of work.
    """

    model: ModelConfig
    placement: Placement
    stall_timeout_s: float


class ImageRequest(_Part):
    """One image of a request; `negative_prompt` is None where no stage needs one."""

    request_id: str
    image_index: int
    seed: int
    size: str
    prompt: str
    negative_prompt: str | None


class Route(_Part):
    """The work to do for one image.

    Attributes:
        image: the image to generate.
        plan: the plan to run.
        preset: name of the model's plan that `plan` is or derives from; None for a request's own.
        format: format of the file.
        quality: 0 to 100, for lossy formats.
        partial_images: number of partial images to send, see `deployments.hops.next_hop`.
        deadline: seconds since the epoch, after which to give up.
        pools: names of the pools that a stage may run on, where these are not all.
    """

    image: ImageRequest
    plan: Plan
    preset: str | None
    format: ImageFormat
    quality: int
    partial_images: int
    deadline: float
    pools: dict[ServedStage, tuple[str, ...]] = {}

    @property
    def megapixels(self) -> float:
        """Size of the image in millions of pixels."""
        return megapixels(self.image.size)


class Hop(_Part):
    """One call to a deployment, which runs consecutive stages; the first hop begins with encoding.

    Attributes:
        deployment: name of the deployment.
        end: number of the plan's stages that are done after it, each part counted.
        work: network evaluations that it takes if no cache hits, weighted by their share of the image's tokens.
        previews: steps of the plan, counted from 1, after which to send the image that the step predicts.
        checkpoints: steps of the plan, counted likewise, after which to send the packet.
        decodes: whether the call ends with the image.
        tells: whether to tell of each step.
    """

    deployment: str
    end: int = 0
    work: float = 0.0
    previews: tuple[int, ...] = ()
    checkpoints: tuple[int, ...] = ()
    decodes: bool = False
    tells: bool = False


class Call(_Message):
    """A request to a replica; the image's packet, if it has one yet, is sent beside it.

    Attributes:
        route: the work to do for the image.
        hop: the part of it that the replica does.
        traceparent: the caller's span, as W3C's Trace Context writes it, if it has one.
    """

    route: Route
    hop: Hop
    traceparent: str | None = None


class StepReply(_Message):
    """A reply during a hop: a preview, to decode, or a checkpoint, to go on from, with a packet; or just a step's end.

    Attributes:
        step: the step of the plan that was the last one, counted from 1.
    """

    kind: Literal["preview", "checkpoint", "step"]
    step: int


class PacketReply(_Message):
    """The reply with an image's packet after the hop beside it."""

    kind: Literal["packet"] = "packet"


class ImageReply(_Message):
    """The reply with an image's file beside it.

    Attributes:
        index: which of the request's images it is.
        seed: seed that reproduces the image.
        text_tokens: tokens of the request's prompts.
        image_tokens: tokens of the latent.
        spans: the work on the image, one span for each stage.
    """

    kind: Literal["image"] = "image"
    index: int
    seed: int
    text_tokens: int
    image_tokens: int
    spans: tuple[Span, ...]


class RefusalReply(_Message):
    """The reply of a hop that cannot produce its image, with the reason.

    Attributes:
        code: `prompt_too_long`, `not_finite`, or `other_version` where the call or its packet cannot be read.
        message: reason, for the client.
        param: field of the request that is at fault, if any.
    """

    kind: Literal["refusal"] = "refusal"
    code: Literal["prompt_too_long", "not_finite", "other_version"]
    message: str
    param: str | None = None


class StalledReply(_Message):
    """The reply of a replica whose device makes no progress.

    Attributes:
        begun: whether the replica had begun with the call; it takes no new ones.
    """

    kind: Literal["stalled"] = "stalled"
    begun: bool


FinalReply = PacketReply | ImageReply | RefusalReply | StalledReply  # the last reply to a call
Reply = StepReply | FinalReply
_REPLY: TypeAdapter[Reply] = TypeAdapter(
    Annotated[Reply, Field(discriminator="kind")], config=ConfigDict(hide_input_in_errors=True)
)

# A reply on the wire: its JSON, and a packet, a file or nothing.
Wire = tuple[str, bytes]


def read_reply(data: str) -> Reply:
    """Read a reply's JSON; raises OtherVersion or MessageError."""
    return _read(_REPLY, data)


class _Versioned(BaseModel):
    """The one field that a message of any version has."""

    model_config = ConfigDict(hide_input_in_errors=True)

    version: Version


def _read(adapter: TypeAdapter[T], data: str) -> T:
    version = VERSION
    try:
        version = _Versioned.model_validate_json(data).version
        if version.major == VERSION.major:
            return adapter.validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        if version == VERSION:
            raise MessageError(f"a message of another shape than version {VERSION}: {reason}") from error
        raise OtherVersion("message", version, VERSION, reason) from error
    raise OtherVersion("message", version, VERSION)
