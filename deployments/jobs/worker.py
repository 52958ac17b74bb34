"""A worker, which claims jobs from the store and has their images made."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, ParamSpec, Protocol, TypeVar

from opentelemetry import trace
from opentelemetry.trace import SpanKind
from sqlalchemy.exc import SQLAlchemyError

from deployments import tracing
from deployments.access.access import Access, Caller, served
from deployments.http.errors import APIError
from deployments.http.resolve import Job, Offer, resolve
from deployments.http.responses import evaluations, images_response
from deployments.http.schemas import ImagesRequest
from deployments.jobs.files import ImageFiles
from deployments.jobs.progress import Progress
from deployments.jobs.settings import JobsSettings
from deployments.jobs.store import ImageJob, Store
from deployments.router import DecodedImage

logger = logging.getLogger("ray.serve")

P = ParamSpec("P")
T = TypeVar("T")

_POLL_S = 1.0  # for jobs that other replicas accepted, or lost
_BEAT_S = 1.0  # from one note of progress to the next, and until a job that was cancelled stops
_SWEEP_S = 30.0
_PAUSE_S = 5.0  # before a job that failed for no fault of its own is tried again
_RELEASE_S = 5.0
_WRITE_S = 120.0  # until a file that is not written yet is given up
_SWEPT = 100  # jobs that one sweep deletes
_FULL_S = 1.0  # until jobs of a key are tried again that has as many images in the making as it may
_LOST = "its worker was lost at each attempt; the request may be the reason"


class Generate(Protocol):
    """What makes a request's images, and notes how far they are."""

    def __call__(
        self, job: Job, request_id: str, deadline: float, progress: Progress, caller: Caller
    ) -> Awaitable[list[DecodedImage]]:
        """Return the images in order."""


class Worker:
    """Works on as many jobs at once as the settings say; there is one in each replica of Ingress."""

    def __init__(
        self,
        store: Store,
        files: ImageFiles,
        settings: JobsSettings,
        offer: Offer,
        generate: Generate,
        access: Access,
    ) -> None:
        self._store, self._files, self._settings = store, files, settings
        self._offer, self._generate, self._access = offer, generate, access
        self._owner = secrets.token_hex(8)
        self._accepted = asyncio.Event()
        self._calls = ThreadPoolExecutor(max_workers=1, thread_name_prefix="jobs")  # to the store, one after the other

    def wake(self) -> None:
        """Look for a job now."""
        self._accepted.set()

    async def run(self) -> None:
        """Work until cancelled; jobs that are not done then are given back."""
        slots = asyncio.Semaphore(self._settings.concurrent)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._sweep())
                while True:
                    await slots.acquire()
                    job = await self._next()
                    group.create_task(self._work(job)).add_done_callback(lambda _: slots.release())
        finally:
            async with asyncio.timeout(_RELEASE_S):
                await self._call(self._store.release_all, self._owner)

    async def _next(self) -> ImageJob:
        """Claim a job, as soon as there is one."""
        while True:
            self._accepted.clear()
            settings = self._settings
            if job := await self._insist(self._store.claim, self._owner, settings.lease_s, settings.attempts):
                return job
            with suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    await self._accepted.wait()

    async def _work(self, job: ImageJob) -> None:
        """Have a job's images made, and end it, unless it is taken away; in the trace of the request for it."""
        attributes = {"job.id": job.id, "job.attempt": job.attempts}
        with tracing.within(job.traceparent), tracing.span("job", attributes, kind=SpanKind.CONSUMER):
            logger.info(f"{job.id}: attempt {job.attempts}")
            progress = Progress()
            making = asyncio.create_task(self._make(job, progress))
            try:
                while not (await asyncio.wait({making}, timeout=_BEAT_S))[0]:
                    lease_s = self._settings.lease_s
                    if not await self._insist(
                        self._store.renew, job.id, self._owner, lease_s, progress.percentage, progress.stages
                    ):
                        logger.info(f"{job.id}: cancelled, or another worker has it")
                        return
                await self._end(job, making, progress)
            finally:
                making.cancel()

    async def _end(self, job: ImageJob, making: asyncio.Task[dict[str, Any]], progress: Progress) -> None:
        settings = self._settings
        try:
            result = making.result()
        except APIError as error:
            tracing.fail(trace.get_current_span(), error)
            full = error.code == "rate_limit_exceeded"  # the key has as many images in the making as it may
            busy = full or error.code == "overloaded"
            if busy or (error.status > 500 and job.attempts < settings.attempts):  # the server's state is the reason
                logger.warning(f"{job.id}: attempt {job.attempts}: {error.code}; it is tried again")
                pause_s = _FULL_S if full else _PAUSE_S
                await self._insist(self._store.release, job.id, self._owner, pause_s, counted=not busy)
                if full:  # the same would be found for each of its jobs
                    await self._insist(self._store.pause, job.key_id, pause_s)
            else:
                message = error.body["error"]["message"]
                if await self._insist(self._store.fail, job.id, self._owner, error.code, message, settings.keep_s):
                    self._access.void(job.id)
            return
        if not await self._insist(
            self._store.complete, job.id, self._owner, result, progress.stages, settings.keep_s
        ):  # fmt: skip
            logger.info(f"{job.id}: done, but cancelled, or another worker has it")

    async def _make(self, job: ImageJob, progress: Progress) -> dict[str, Any]:
        """Make a job's images and write their files; return its result. Raises APIError."""
        try:
            asked = resolve(ImagesRequest.read(job.request.encode()), self._offer)
            progress.begin(asked.plan, asked.n)
            until = time.time() + asked.timeout_s
            images = await self._generate(asked, job.id, until, progress, Caller(job.key_id))
        except Exception as error:
            raise APIError.from_failure(error) from error
        written = []
        for image in images:
            try:
                async with asyncio.timeout(_WRITE_S):
                    name = await asyncio.to_thread(self._files.write, job.id, image.data, asked.format)
            except Exception as error:  # of whatever file system it is
                logger.error(f"{job.id}: its images cannot be written", exc_info=error)
                raise APIError(503, "images_not_kept", "the images cannot be written") from error
            written.append({"file": name})
        # Before the job ends: no result is there that was not charged, and each further attempt charges the same.
        await self._access.settle(job.id, served(asked.size, [evaluations(image) for image in images]), until)
        return dict(images_response(asked, images, written))

    async def _sweep(self) -> None:
        """Delete what need not be kept any longer, and end what was lost too often."""
        while True:
            settings = self._settings
            for job_id in await self._insist(
                self._store.fail_lost, settings.attempts, "attempts_exhausted", _LOST, settings.keep_s
            ):
                logger.error(f"{job_id}: {_LOST}")
                self._access.void(job_id)
            for job_id in await self._insist(self._store.expired, _SWEPT):
                try:
                    await asyncio.to_thread(self._files.delete_job, job_id)
                except Exception as error:  # of whatever file system it is; the next sweep tries again
                    logger.error(f"{job_id}: its images cannot be deleted", exc_info=error)
                else:
                    await self._insist(self._store.delete, job_id)
            await asyncio.sleep(_SWEEP_S)

    async def _insist(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the store until it answers: what it says later is still right, since it looks at who owns a job."""
        while True:
            try:
                return await self._call(function, *args, **kwargs)
            except SQLAlchemyError as error:
                logger.error("the store of jobs does not answer", exc_info=error)
                await asyncio.sleep(_PAUSE_S)

    async def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._calls, partial(function, *args, **kwargs))
