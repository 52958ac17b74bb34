"""Moderation: the operator's checks of prompts and images, in front of what is made and what is served."""

from __future__ import annotations

import asyncio
import inspect
import logging
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from deployments.http.errors import RETRY, APIError
from deployments.moderation import ContentRefused, ModerationSettings

logger = logging.getLogger("ray.serve")

_THREADS = 8  # in which checks run: those that hang hold back nothing but checks


class Moderation:
    """Runs the checks that there are; what cannot be checked is refused."""

    def __init__(self, settings: ModerationSettings) -> None:
        self._settings = settings
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="moderation")

    async def check_prompt(self, prompt: str, negative_prompt: str | None) -> None:
        """Raise APIError if a request must not be made."""
        if self._settings.prompt:
            await self._run("prompt", "prompt", self._settings.prompt, prompt, negative_prompt)

    async def check_image(self, image: bytes, prompt: str) -> None:
        """Raise APIError if the file of an image must not be served."""
        if self._settings.image:
            await self._run("image", None, self._settings.image, image, prompt)

    async def _run(self, name: str, param: str | None, check: Callable[..., object], *args: object) -> None:
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                loop = asyncio.get_running_loop()
                result = await loop.run_in_executor(
                    self._threads, lambda: check(*args)
                )  # loops take no async functions
                if inspect.isawaitable(result):
                    await result
        except ContentRefused as error:
            raise APIError(400, "content_policy_violation", str(error), param) from None
        except BaseException as error:  # whatever it raises, SystemExit too, which would end this process
            task = asyncio.current_task()
            cancelled = isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling()
            if cancelled or isinstance(error, GeneratorExit):  # the request itself is given up
                raise
            # Its message may quote the prompt, and is not logged.
            where = traceback.extract_tb(error.__traceback__)[-1]
            logger.error(f"moderation.{name}: {type(error).__name__} in {where.filename}, line {where.lineno}")
            message = f"the {name} cannot be checked; try again later"
            raise APIError(503, "moderation_unavailable", message, headers=RETRY) from None
