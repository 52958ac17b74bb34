"""Checks of prompts and images that misbehave."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable

import pytest
from pydantic import ValidationError

from deployments.http.errors import APIError
from deployments.http.moderation import Moderation
from deployments.moderation import ModerationSettings

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def ends_the_process(prompt: str, negative_prompt: str | None) -> None:
    sys.exit(prompt)


async def ends_the_loop(prompt: str, negative_prompt: str | None) -> None:
    sys.exit(prompt)


def cancels(prompt: str, negative_prompt: str | None) -> None:
    raise asyncio.CancelledError


async def cancels_async(prompt: str, negative_prompt: str | None) -> None:
    raise asyncio.CancelledError


@pytest.mark.parametrize("check", [ends_the_process, ends_the_loop, cancels, cancels_async])
async def test_a_check_that_would_end_the_server_refuses(
    check: Callable[..., object], caplog: pytest.LogCaptureFixture
) -> None:
    moderation = Moderation(ModerationSettings(prompt=check))
    with pytest.raises(APIError) as refused:
        await moderation.check_prompt("a secret ring", None)
    assert (refused.value.status, refused.value.code) == (503, "moderation_unavailable")
    assert "moderation.prompt: " in caplog.text
    assert "secret" not in caplog.text


async def test_a_request_that_is_given_up_is_not_a_check_that_failed() -> None:
    begun = asyncio.Event()

    async def endless(prompt: str, negative_prompt: str | None) -> None:
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(Moderation(ModerationSettings(prompt=endless)).check_prompt("a ring", None))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_check_must_take_what_it_is_called_with() -> None:
    with pytest.raises(ValidationError, match=r"'math:sqrt' must take prompt, negative_prompt: too many positional"):
        ModerationSettings(prompt="math:sqrt")
    with pytest.raises(ValidationError, match="must take image, prompt: missing a required argument: 'size'"):
        ModerationSettings(image=lambda image, prompt, size: None)
    assert ModerationSettings(prompt=lambda *args: None, image=lambda image, prompt, size=1: None)
