"""Checks of prompts and images for a server of the tests, which refuse, fail or hang by words of the prompt."""

from __future__ import annotations

import asyncio

from deployments.moderation import ContentRefused


async def check_prompt(prompt: str, negative_prompt: str | None) -> None:
    if "forbidden" in prompt:
        raise ContentRefused("no such things are drawn here")
    if "faulty" in prompt:
        raise ValueError(prompt)
    if "endless" in prompt:
        await asyncio.sleep(3600)


def check_image(image: bytes, prompt: str) -> None:
    assert image
    if "unseen" in prompt:
        raise ContentRefused("the image is not for everyone's eyes")
