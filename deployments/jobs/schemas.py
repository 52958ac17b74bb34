"""Bodies of `/v1/images/jobs`, after the jobs of OpenAI's Videos API.

https://platform.openai.com/docs/api-reference/videos
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from deployments.admission import Priority
from deployments.http.resolve import Job
from deployments.http.schemas import Generation, ImagesRequest, null_is_absent
from deployments.jobs.store import ImageJob, Status


class WebhookRequest(BaseModel):
    """Whom to tell of the end of a job."""

    model_config = ConfigDict(extra="forbid")

    url: Annotated[str, Field(min_length=1, max_length=2048)]


class JobRequest(Generation):
    """Body of `POST /v1/images/jobs`: that of `POST /v1/images/generations` without streams.

    `response_format` says whether the result has images or links to them. `timeout_s` counts for each attempt, from
    when it begins. `priority` is `batch` unless it says otherwise.
    """

    priority: Priority = "batch"
    response_format: Literal["b64_json", "url"] = "b64_json"
    webhook: WebhookRequest | None = None

    _more_nulls = field_validator("response_format", mode="before")(null_is_absent)

    @property
    def digest(self) -> str:
        """Hash of what is asked for, however it is written."""
        content = self.model_dump(mode="json", exclude_defaults=True)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def images(self) -> ImagesRequest:
        """The request for the same images at once."""
        return ImagesRequest(**{name: getattr(self, name) for name in Generation.model_fields})


def pinned(request: ImagesRequest, job: Job) -> ImagesRequest:
    """Return a request with what was drawn or taken by default, so that it makes the same images at another time."""
    plan = request.plan if job.preset is None else job.preset
    return request.model_copy(update={"seed": job.seed, "size": job.size, "plan": plan})


class StageProgress(BaseModel):
    """Steps of a stage, of all images of a job together, and how many of them are done."""

    stage: str
    steps: int
    done: int


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str


class WebhookState(BaseModel):
    """Whom the end of a job is told, and when it was heard."""

    url: str
    attempts: int
    delivered_at: int | None


class JobObject(BaseModel):
    """A job; times are seconds since the epoch, and `expires_at` is when it is deleted, with its images."""

    id: str
    object: Literal["image.job"] = "image.job"
    status: Status
    progress: Annotated[int, Field(ge=0, le=100)]
    stages: list[StageProgress]
    created_at: int
    completed_at: int | None
    expires_at: int | None
    model: str
    size: str
    n: int
    seed: int
    plan: str
    error: JobError | None
    webhook: WebhookState | None

    @classmethod
    def of(cls, job: ImageJob, model: str) -> Self:
        """Describe a job to clients; `model` is the name of the one that is served."""
        request = ImagesRequest.read(job.request.encode())
        assert request.seed is not None
        error = job.error_code is not None and JobError(code=job.error_code, message=job.error_message or "")
        webhook = job.webhook_url is not None and WebhookState(
            url=job.webhook_url, attempts=job.webhook_attempts, delivered_at=_seconds(job.webhook_delivered_at)
        )
        return cls(
            id=job.id,
            status=job.status,
            progress=job.progress,
            stages=[StageProgress(**stage) for stage in job.stages],
            created_at=int(job.created_at),
            completed_at=_seconds(job.completed_at),
            expires_at=_seconds(job.expires_at),
            model=request.model or model,
            size=request.size,
            n=request.n,
            seed=request.seed,
            plan=request.plan if isinstance(request.plan, str) else request.plan.name if request.plan else "inline",
            error=error or None,
            webhook=webhook or None,
        )


class JobList(BaseModel):
    """A page of jobs; `after=last_id` asks for the next one."""

    object: Literal["list"] = "list"
    data: list[JobObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedJob(BaseModel):
    """What is left of a job."""

    id: str
    object: Literal["image.job.deleted"] = "image.job.deleted"
    deleted: Literal[True] = True


class JobImage(BaseModel):
    """An image of a result, with `b64_json` or `url`, and what `POST /v1/images/generations` says of it."""

    model_config = ConfigDict(extra="allow")

    b64_json: str | None = None
    url: str | None = None


class JobResult(BaseModel):
    """The answer of `POST /v1/images/generations`; `expires_at` is when its links end."""

    model_config = ConfigDict(extra="allow")

    created: int
    data: list[JobImage]
    expires_at: int | None = None


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)
