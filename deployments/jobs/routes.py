"""Routes of `/v1/images/jobs`."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, get_args

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from ray import serve

from deployments.access.caller import ForJobs
from deployments.http.body import read_json
from deployments.http.errors import APIError
from deployments.jobs.jobs import Jobs
from deployments.jobs.schemas import DeletedJob, JobList, JobObject, JobRequest, JobResult
from stages.image import ImageFormat

_OFF = "this server keeps no jobs: its serve_config.yaml has no args.jobs"
_IMAGES: dict[str, Any] = {f"image/{name}": {} for name in get_args(ImageFormat)}

router = APIRouter(prefix="/v1/images")


def jobs_here() -> Jobs:
    """Return the jobs of the replica that this runs in; raises APIError if it keeps none."""
    jobs: Jobs | None = serve.get_replica_context().servable_object.jobs
    if jobs is None:
        raise APIError(404, "jobs_not_configured", _OFF)
    return jobs


def max_body_bytes() -> int:
    """Return the largest body of a request."""
    return serve.get_replica_context().servable_object.max_body_bytes


Here = Annotated[Jobs, Depends(jobs_here)]
IdempotencyKey = Annotated[str | None, Header(min_length=1, max_length=255, pattern=r"^[!-~]+$")]


@router.post("/jobs")
async def create(
    request: Request,
    caller: ForJobs,
    jobs: Here,
    limit: Annotated[int, Depends(max_body_bytes)],
    idempotency_key: IdempotencyKey = None,
) -> JobObject:
    """Accept a job. The same `Idempotency-Key` with the same body is the same job."""
    body = await read_json(request, limit)
    return JobObject.of(
        await jobs.create(JobRequest.read(body), idempotency_key, caller, request.headers.get("x-request-id", "")),
        jobs.model,
    )


@router.get("/jobs")
async def list_jobs(
    caller: ForJobs,
    jobs: Here,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
) -> JobList:
    """List jobs by the time at which they were accepted, the last ones first."""
    found, more = await jobs.page(caller, limit, after, ascending=order == "asc")
    data = [JobObject.of(job, jobs.model) for job in found]
    ends = (data[0].id, data[-1].id) if data else (None, None)
    return JobList(data=data, first_id=ends[0], last_id=ends[1], has_more=more)


@router.get("/jobs/{job_id}")
async def get(caller: ForJobs, jobs: Here, job_id: str) -> JobObject:
    """Tell how far a job is."""
    return JobObject.of(await jobs.get(job_id, caller), jobs.model)


@router.get("/jobs/{job_id}/result", response_model=JobResult, response_model_exclude_unset=True)
async def result(request: Request, caller: ForJobs, jobs: Here, job_id: str) -> dict[str, Any]:
    """Return a completed job's images, in the shape of `POST /v1/images/generations`."""
    base = (jobs.public_url or str(request.base_url)).rstrip("/")
    return await jobs.result(job_id, caller, lambda token: f"{base}/v1/images/files/{token}")


@router.post("/jobs/{job_id}/cancel")
async def cancel(caller: ForJobs, jobs: Here, job_id: str) -> JobObject:
    """Cancel a job that is not done."""
    return JobObject.of(await jobs.cancel(job_id, caller), jobs.model)


@router.delete("/jobs/{job_id}")
async def delete(caller: ForJobs, jobs: Here, job_id: str) -> DeletedJob:
    """Delete a job that is done, and its images."""
    await jobs.delete(job_id, caller)
    return DeletedJob(id=job_id)


@router.get("/files/{token}", response_class=Response, responses={200: {"content": _IMAGES}})
async def file(jobs: Here, token: str) -> Response:
    """Return the image that a result's link is to; the link's signature is in place of a key."""
    data, name = await jobs.file(token)
    headers = {"Cache-Control": "private, immutable", "X-Content-Type-Options": "nosniff"}
    return Response(data, media_type=f"image/{PurePosixPath(name).suffix[1:]}", headers=headers)
