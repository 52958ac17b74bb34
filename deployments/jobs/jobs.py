"""Jobs as the API knows them: what may be asked of them, over the store, the files, the worker and the webhooks."""

from __future__ import annotations

import asyncio
import base64
import logging
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from deployments import tracing
from deployments.access.access import Access, Caller
from deployments.http import readiness
from deployments.http.errors import RETRY, APIError
from deployments.http.moderation import Moderation
from deployments.http.resolve import Offer, resolve
from deployments.jobs.files import BadLink, ImageFiles, Links
from deployments.jobs.schemas import JobRequest, pinned
from deployments.jobs.settings import JobsSettings
from deployments.jobs.store import ImageJob, KeyReused, QueueFull, Store
from deployments.jobs.webhook import Webhooks, check_url, read_secret
from deployments.jobs.worker import Generate, Worker

logger = logging.getLogger("ray.serve")

P = ParamSpec("P")
T = TypeVar("T")

_POLL_S = 1.0
_DRAINING_POLL_S = 0.2


class Jobs:
    """Accepts jobs, tells of them and works on them; there is one in each replica of Ingress."""

    def __init__(
        self,
        settings: JobsSettings,
        offer: Offer,
        generate: Generate,
        access: Access,
        moderation: Moderation,
        *,
        log_prompts: bool = False,
    ) -> None:
        """Open the store, and start to work in the running event loop.

        Args:
            settings: where jobs are kept, and how they are worked on.
            offer: the limits of requests; the settings have the time that a job may take.
            generate: makes a request's images.
            access: what jobs are charged to.
            moderation: what checks prompts.
            log_prompts: whether prompts are logged.
        """
        self._settings = settings
        self._offer = replace(offer, max_timeout_s=settings.timeout_s)
        self._store = Store(settings.store_url)
        self._files = ImageFiles(settings.images_url)
        self._access, self._moderation, self._log_prompts = access, moderation, log_prompts
        self._links = Links(self._store.key("links"), settings.links_s)
        self._worker = Worker(self._store, self._files, settings, self._offer, generate, access)
        self._tasks = [asyncio.create_task(self._work())]
        if settings.webhooks:
            webhooks = Webhooks(self._store, settings.webhooks, read_secret(settings.webhooks.secret_file))
            self._tasks.append(asyncio.create_task(webhooks.run(_POLL_S)))

    async def _work(self) -> None:
        """Work until the server drains, and say when nothing is left here that others would have to wait for."""
        await asyncio.to_thread(readiness.hold)
        work = asyncio.create_task(self._worker.run())
        try:
            while not await asyncio.to_thread(readiness.is_draining):
                if (await asyncio.wait({work}, timeout=_DRAINING_POLL_S))[0]:
                    work.result()  # an error: it has no other end
        finally:
            await _end(work)
            await asyncio.to_thread(readiness.let_go)

    async def stop(self) -> None:
        """Stop working; jobs that are not done are given back."""
        for task in self._tasks:
            await _end(task)

    def check_health(self) -> None:
        """Raise if the work has ended by an error."""
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()

    @property
    def model(self) -> str:
        """Name of the model that is served."""
        return self._offer.model.name

    async def create(self, request: JobRequest, key: str | None, caller: Caller, request_id: str) -> ImageJob:
        """Accept a job; one with an idempotency key that was accepted before is returned as it is now.

        Raises:
            APIError: a field is invalid, the key came with another body, as many jobs as may be are not done, or the
                caller may not have that.
        """
        if request.webhook:
            self._check_webhook(request.webhook.url)
        asked = resolve(request.images, self._offer)
        job = ImageJob(
            id=f"imgjob_{secrets.token_hex(16)}",
            created_at=time.time(),
            request=pinned(request.images, asked).model_dump_json(exclude_defaults=True),
            request_hash=request.digest,
            key_id=caller.key_id,
            idempotency_key=key,
            response_format=request.response_format,
            webhook_url=request.webhook.url if request.webhook else None,
            traceparent=tracing.header(),
        )
        if key and (before := await self._keep(self._store.before, job)):  # costs nothing, and is no request
            return before
        await self._access.reserve(job.id, caller, request_id, asked.n, asked.size)
        with ExitStack() as refusing:
            refusing.callback(self._access.void, job.id)
            await self._moderation.check_prompt(asked.prompt, asked.negative_prompt)
            try:
                kept = await self._keep(self._store.create, job, self._settings.max_unfinished)
            except asyncio.CancelledError:  # the client has gone away: the job will be there, and is charged
                refusing.pop_all()
                raise
            if kept is job:
                refusing.pop_all()
        if kept is job:
            logger.info(f"{job.id}: {asked.summary(with_prompt=self._log_prompts)}")
            self._worker.wake()
        return kept

    async def _keep(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the store with a new job; raises APIError if it does not answer, or does not take the job."""
        try:
            return await self._call(function, *args, **kwargs)
        except KeyReused:
            raise APIError(
                409, "idempotency_key_reused", "Idempotency-Key must be new: it came with another body before"
            ) from None
        except QueueFull:
            message = f"{self._settings.max_unfinished} jobs are not done; try again later"
            raise APIError(429, "too_many_jobs", message, headers=RETRY) from None

    def _check_webhook(self, url: str) -> None:
        settings = self._settings.webhooks
        if settings is None:
            message = "webhook needs args.jobs.webhooks in the server's serve_config.yaml"
            raise APIError(400, "invalid_value", message, "webhook")
        try:
            check_url(url, allow_private=settings.allow_private)
        except ValueError as error:
            raise APIError(400, "invalid_value", f"webhook.url {error}", "webhook.url") from error

    async def get(self, job_id: str, caller: Caller) -> ImageJob:
        """Return a caller's job; raises APIError if it is not there."""
        job = await self._call(self._store.get, job_id)
        if job is None or job.key_id != caller.key_id:
            raise APIError(404, "job_not_found", f"there is no job {job_id!r}")
        return job

    async def page(
        self, caller: Caller, limit: int, after: str | None, *, ascending: bool
    ) -> tuple[list[ImageJob], bool]:
        """Return a caller's next jobs after one in order of time, and whether there are more; raises APIError."""
        start = None
        if after is not None:
            start = await self._call(self._store.get, after)
            if start is None or start.key_id != caller.key_id:
                raise APIError(400, "invalid_value", "after must be the id of a job", "after")
        found = await self._call(self._store.page, caller.key_id, limit + 1, start, ascending=ascending)
        return found[:limit], len(found) > limit

    async def cancel(self, job_id: str, caller: Caller) -> ImageJob:
        """Cancel a caller's job; raises APIError if it is not there, or has ended otherwise."""
        await self.get(job_id, caller)
        job = await self._call(self._store.cancel, job_id, self._settings.keep_s)
        if job is None:  # deleted since
            raise APIError(404, "job_not_found", f"there is no job {job_id!r}")
        if job.status != "cancelled":
            raise APIError(409, "job_finished", f"the job is {job.status} and cannot be cancelled")
        self._access.void(job_id)
        return job

    async def delete(self, job_id: str, caller: Caller) -> None:
        """Delete a caller's job that has ended, and its images; raises APIError if it has not, or is not there."""
        job = await self.get(job_id, caller)
        if not job.finished:
            raise APIError(409, "job_not_finished", f"the job is {job.status}: cancel it first")
        await self._file(self._files.delete_job, job_id)
        await self._call(self._store.delete, job_id)

    async def result(self, job_id: str, caller: Caller, link: Callable[[str], str]) -> dict[str, Any]:
        """Return the result of a caller's completed job.

        Args:
            job_id: the job's id.
            caller: whom the request is from.
            link: makes an address of this API of a token for a file.

        Raises:
            APIError: the job is not there, or not completed.
        """
        job = await self.get(job_id, caller)
        if job.result is None:
            if not job.finished:
                raise APIError(409, "job_not_completed", f"the job is {job.status}; try again later", headers=RETRY)
            reason = f": {job.error_message}" if job.error_message else ""
            raise APIError(409, f"job_{job.status}", f"the job is {job.status}{reason}")
        links = job.response_format == "url"
        data = [await self._image(entry, link if links else None) for entry in job.result["data"]]
        expiry = {"expires_at": int(time.time()) + self._links.seconds} if links else {}
        return {**job.result, "data": data, **expiry}

    async def _image(self, entry: dict[str, Any], link: Callable[[str], str] | None) -> dict[str, Any]:
        said = {key: value for key, value in entry.items() if key != "file"}
        name = entry["file"]
        if link is None:
            return {"b64_json": base64.b64encode(await self._file(self._files.read, name)).decode(), **said}
        elsewhere = await self._file(self._files.sign, name, self._links.seconds)
        return {"url": elsewhere or link(self._links.sign(name)), **said}

    async def file(self, token: str) -> tuple[bytes, str]:
        """Return the file that a link is to, and its name; raises APIError."""
        try:
            name = self._links.read(token)
        except BadLink as error:
            raise APIError(403, "invalid_link", str(error)) from error
        return await self._file(self._files.read, name), name

    @property
    def public_url(self) -> str | None:
        """Address of the API as clients know it, if the settings have it."""
        return self._settings.public_url

    async def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the store; raises APIError if it does not answer."""
        try:
            return await asyncio.to_thread(function, *args, **kwargs)
        except SQLAlchemyError as error:
            logger.error("the store of jobs does not answer", exc_info=error)
            raise APIError(503, "jobs_unavailable", "the store of jobs does not answer", headers=RETRY) from error

    async def _file(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the files; raises APIError if one is gone, or they cannot be had."""
        try:
            return await asyncio.to_thread(function, *args, **kwargs)
        except FileNotFoundError as error:
            raise APIError(404, "image_not_found", "the image is no longer there") from error
        except Exception as error:  # of whatever file system it is
            logger.error("the images of jobs cannot be had", exc_info=error)
            raise APIError(503, "images_unavailable", "the images cannot be had", headers=RETRY) from error


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end; its errors are for `Jobs.check_health`."""
    task.cancel()
    await asyncio.wait({task})
