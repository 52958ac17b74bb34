"""What travels between deployments: JSON with a version, and bytes beside it.

Pools run different environments, so that no class of this project or of a library is pickled on the way.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from stages.image import ImageFormat
from stages.plan import Plan
from stages.spans import Span

T = TypeVar("T")

VERSION = 1


class MessageError(ValueError):
    """A message of another version, or of another shape."""


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ImageRequest(_Message):
    """One image of a request; `negative_prompt` is None where no stage needs one."""

    request_id: str
    image_index: int
    seed: int
    size: str
    prompt: str
    negative_prompt: str | None


class Route(_Message):
    """What is to be done for one image.

    Attributes:
        image: what to draw.
        plan: by which stages.
        preset: name of the model's plan that `plan` is or comes from; None for a request's own.
        format: of the file.
        quality: 1 to 100, of formats that lose something.
        partial_images: how often to send what the image will look like, see `deployments.hops.plan_hops`.
        deadline: seconds since the epoch, after which to give up.
    """

    image: ImageRequest
    plan: Plan
    preset: str | None
    format: ImageFormat
    quality: int
    partial_images: int
    deadline: float


class Hop(_Message):
    """Consecutive stages that one call runs; the first hop begins with encoding.

    Attributes:
        deployment: that runs them.
        stages: how many of the plan's, each part counted.
        nfe: network evaluations that they take if no cache hits.
        previews: after which of its steps, counted from 1, to send the image that the step predicts.
        decodes: whether the call ends with the image.
    """

    deployment: str
    stages: int = 0
    nfe: int = 0
    previews: tuple[int, ...] = ()
    decodes: bool = False


class Call(_Message):
    """What a replica is asked to do; an image's packet, if it has one yet, comes beside it."""

    version: int = VERSION
    route: Route
    hop: Hop

    def to_json(self) -> str:
        return self.model_dump_json()

    @classmethod
    def from_json(cls, data: str) -> Self:
        """Inverse of `to_json`; raises MessageError."""
        return _read(TypeAdapter(cls), data)


class PacketReply(_Message):
    """The image's packet, which comes beside this, after the hop; or, as a preview, within it."""

    version: int = VERSION
    kind: Literal["packet", "preview"] = "packet"


class ImageReply(_Message):
    """The image, whose file comes beside this.

    Attributes:
        index: which of the request's images.
        seed: that makes it again.
        text_tokens: of the request's prompts.
        image_tokens: of the latent.
        spans: one for each stage.
    """

    version: int = VERSION
    kind: Literal["image"] = "image"
    index: int
    seed: int
    text_tokens: int
    image_tokens: int
    spans: tuple[Span, ...]


class RefusalReply(_Message):
    """Why there is no image.

    Attributes:
        code: `prompt_too_long` or `not_finite`.
        message: for the client.
        param: field of the request that is to blame, if one is.
    """

    version: int = VERSION
    kind: Literal["refusal"] = "refusal"
    code: Literal["prompt_too_long", "not_finite"]
    message: str
    param: str | None = None


Reply = Annotated[PacketReply | ImageReply | RefusalReply, Field(discriminator="kind")]
_REPLY: TypeAdapter[PacketReply | ImageReply | RefusalReply] = TypeAdapter(Reply)

# On the wire: a reply's JSON, and a packet, a file or nothing.
Wire = tuple[str, bytes]


def read_reply(data: str) -> PacketReply | ImageReply | RefusalReply:
    """Read a reply's JSON; raises MessageError."""
    return _read(_REPLY, data)


class _Versioned(BaseModel):
    """The one field that a message of any version has."""

    version: int


def _read(adapter: TypeAdapter[T], data: str) -> T:
    try:
        if (version := _Versioned.model_validate_json(data).version) != VERSION:
            raise MessageError(f"a message of version {version}; this process reads version {VERSION}")
        return adapter.validate_json(data)
    except ValidationError as error:
        raise MessageError(f"a message of another shape than version {VERSION}: {error.errors()[0]['msg']}") from error
