"""Checks of prompts and images that whoever runs the server provides: `moderation` of the application's arguments.

None is shipped. A check is a function, or anything else that can be called, of the signature below, plain or async;
plain ones run in a thread. It returns to accept, and raises `ContentRefused` to refuse. Whatever else it raises, and a
check that is not done in time, refuses as well.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Awaitable
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class ContentRefused(Exception):
    """What a check raises to refuse; the client is told the message."""


class PromptCheck(Protocol):
    """Looks at what a request asks for, before anything is made."""

    def __call__(self, prompt: str, negative_prompt: str | None) -> Awaitable[None] | None:
        """Return to accept, or raise `ContentRefused`."""


class ImageCheck(Protocol):
    """Looks at an image before it is served, and at each partial one."""

    def __call__(self, image: bytes, prompt: str) -> Awaitable[None] | None:
        """Return to accept the file of an image, or raise `ContentRefused`."""


def _taking(*parameters: str) -> BeforeValidator:
    """Import what an import path names, and look whether it can be called with such parameters."""

    def resolve(value: object) -> object:
        found = value
        if isinstance(value, str):
            try:
                found = pkgutil.resolve_name(value)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # whatever the module raises, also if it means to end the process
                raise ValueError(f"{value!r} cannot be imported: {type(error).__name__}: {error}") from error
        if found is None:
            return None
        if not callable(found):
            raise ValueError(f"must be the import path of a function, as module:function, not {value!r}")
        try:
            signature = inspect.signature(found)
        except ValueError:  # some that are not written in Python tell none
            return found
        try:
            signature.bind(*parameters)
        except TypeError as error:
            raise ValueError(f"{value!r} must take {', '.join(parameters)}: {error}") from error
        return found

    return BeforeValidator(resolve)


class ModerationSettings(BaseModel):
    """Checks of prompts and images.

    Attributes:
        prompt: import path, `module:function`, of a `PromptCheck`; None for none.
        image: the same of an `ImageCheck`.
        timeout_s: longest time that a check may take, in seconds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Annotated[Any, _taking("prompt", "negative_prompt")] = None
    image: Annotated[Any, _taking("image", "prompt")] = None
    timeout_s: Annotated[float, Field(strict=True, gt=0.0, le=600.0)] = 10.0
