"""The ingress: HTTP requests in, images out."""

# No postponed annotations: FastAPI reads those of methods that Serve has moved by then.
import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi_offline import FastAPIOffline
from opentelemetry import trace
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from deployments import console, ray_internals, tracing
from deployments.access.access import Access, Caller, KeyedAccess, OpenAccess, Settle
from deployments.access.caller import ForImages, ForModels
from deployments.admission import Admission, Flow, Late, Turn
from deployments.balancer import Balancer
from deployments.http.body import read_json
from deployments.http.errors import APIError
from deployments.http.front import Front, charge_id, received
from deployments.http.moderation import Moderation
from deployments.http.readiness import announce
from deployments.http.resolve import Job, Offer, resolve, unknown_model
from deployments.http.responses import (
    EVENT,
    ImagesResponse,
    ModelResponse,
    ModelsResponse,
    PlansResponse,
    evaluations,
    images_response,
    inline,
    stream_event,
)
from deployments.http.schemas import ErrorResponse, Generation, ImagesRequest
from deployments.http.traced import Traced
from deployments.jobs import routes
from deployments.jobs.jobs import Jobs
from deployments.jobs.progress import Progress
from deployments.jobs.schemas import JobRequest
from deployments.router import DecodedImage, Partial, Router
from deployments.settings import Settings

logger = logging.getLogger("ray.serve")


# The documentation page and its script come from this server, since users may have no other network access.
app = FastAPIOffline(
    redoc_url=None,
    redirect_slashes=False,
    title="Images",
    description="Text-to-image generation through base, bridge and distilled stages.",
    responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}},
    # `Traced` makes spans that begin in Serve's proxy and take a client's trace along without an exporter, too.
    telemetry={"tracing": False, "metrics": False, "logs": False},
)
describe_routes = app.openapi


def describe() -> dict[str, Any]:
    """Describe the API, including the bodies that are parsed without FastAPI."""
    document = describe_routes()
    bodies: dict[str, type[Generation]] = {"/v1/images/generations": ImagesRequest, "/v1/images/jobs": JobRequest}
    for path, kind in bodies.items():
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        document.setdefault("components", {}).setdefault("schemas", {}).update(schema.pop("$defs"))
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        document["paths"][path]["post"]["requestBody"] = body
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own; here it is a 400
    return document


app.include_router(routes.router)
app.openapi = describe  # type: ignore[method-assign]
app.add_middleware(Front, in_proxy=False)  # if Serve's proxy has no front, probes arrive here
app.add_middleware(Traced)


@app.exception_handler(APIError)
async def _respond(request: Request, error: APIError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


@app.exception_handler(HTTPException)
async def _respond_unrouted(request: Request, error: HTTPException) -> JSONResponse:
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    message = f"{request.method} {request.url.path}: {error.detail}"
    return await _respond(request, APIError(error.status_code, code, message, headers=error.headers))


@app.exception_handler(RequestValidationError)
async def _respond_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """Name parameters and headers without the place that they came from."""
    return await _respond(
        request, APIError.from_validation([{**each, "loc": each["loc"][1:]} for each in error.errors()])
    )


@app.exception_handler(Exception)
async def _respond_failure(request: Request, error: Exception) -> JSONResponse:
    return await _respond(request, APIError.from_failure(error))


@serve.ingress(app)
class Ingress:
    """Checks requests, sends each image through its stages, and speaks the OpenAI Images API."""

    def __init__(self, settings: Settings, replicas: dict[str, DeploymentHandle]) -> None:
        console.attach()
        tracing.begin()
        self._settings = settings
        model = settings.read_model()
        announce(serve.get_replica_context().app_name, settings.needed_for(model), settings.cors_origins)
        self._offer = Offer(
            model=model,
            blocks=model.count_blocks(),
            default_plan=settings.default_plan,
            max_images=settings.max_images,
            max_timeout_s=settings.request_timeout_s,
            pools=settings.pools_by_stage,
        )
        self._described: ModelResponse = {
            "id": model.name,
            "object": "model",
            "created": int(settings.model.stat().st_mtime),
            "owned_by": "local",
            "aliases": model.aliases,
            "sizes": model.sizes,
        }
        # In this process: the router only waits, so a deployment of its own would merely add a call.
        balancer = Balancer(settings.placement, settings.hang_factor, settings.hang_floor_s, settings.overflow_wait_s)
        self._admission = Admission(balancer, settings.max_images_in_service, settings.max_waiting_images)
        for handle in replicas.values():
            ray_internals.follow(handle)
        self._router = Router(replicas, balancer, settings.checkpoint_steps)
        self.max_body_bytes = settings.max_body_bytes
        self.access: Access = KeyedAccess(settings.access) if settings.access else OpenAccess()
        self._moderation = Moderation(settings.moderation)
        self.jobs = None
        if settings.jobs:
            self.jobs = Jobs(
                settings.jobs,
                self._offer,
                self._make_job,
                self.access,
                self._moderation,
                log_prompts=settings.log_prompts,
            )

    async def __del__(self) -> None:
        """Give jobs back and export what is left of traces; Serve awaits this before it ends a replica."""
        if self.jobs:
            await self.jobs.stop()
        await asyncio.to_thread(tracing.end)

    def check_health(self) -> None:
        """Raise if jobs are no longer worked on; Serve calls this, and replaces a replica that raises several times.

        Metrics are told here, too, as in replicas of stages.
        """
        self._admission.tell()
        if self.jobs:
            self.jobs.check_health()

    @app.post(
        "/v1/images/generations",
        responses={200: {"model": ImagesResponse, "content": {"text/event-stream": {"schema": EVENT}}}},
    )
    async def generate(self, request: Request, caller: ForImages) -> Response:
        """Generate `n` images of a prompt."""
        start = received(request.headers)  # so that the time counts which it waited for this replica
        try:
            async with asyncio.timeout(start + self._settings.request_timeout_s - time.time()):
                body = await read_json(request, self._settings.max_body_bytes)
        except TimeoutError as error:
            raise APIError.from_failure(error) from error
        job = resolve(ImagesRequest.read(body), self._offer)
        logger.info(job.summary(with_prompt=self._settings.log_prompts))
        request_id, deadline = request.headers["x-request-id"], start + job.timeout_s
        async with AsyncExitStack() as stack:
            charged = self.access.charged(caller, request_id, job.n, job.size, deadline, charge_id(request.headers))
            settle = await stack.enter_async_context(charged)
            await self._moderation.check_prompt(job.prompt, job.negative_prompt)
            job, turns = self._admit(job, request_id, deadline, caller)
            if job.stream:
                events = self._stream(job, turns[0], settle, stack.pop_all())
                return StreamingResponse(events, media_type="text/event-stream")
            images = await self._make(job, turns)
            await settle([evaluations(image) for image in images])
            return JSONResponse(images_response(job, images, [inline(image) for image in images]))

    @app.get("/v1/models")
    async def models(self, caller: ForModels) -> ModelsResponse:
        """List the model that is served, with its sizes."""
        return {"object": "list", "data": [self._described]}

    @app.get("/v1/models/{name:path}")
    async def model(self, name: str, caller: ForModels) -> ModelResponse:
        """Describe one model of the list."""
        if name not in (self._described["id"], *self._offer.model.aliases):
            raise unknown_model(name, self._offer)
        return self._described

    @app.get("/v1/plans")
    async def plans(self, caller: ForModels) -> PlansResponse:
        """List the model's plans, which a request may name."""
        data = [
            {"nfe": plan.nfe, "work": plan.work, "sizes": sizes, **plan.model_dump(mode="json")}
            for plan, sizes in self._offer.model.plans_by_size()
        ]
        return {"object": "list", "data": data, "default": self._offer.default_plan}

    def _admit(self, asked: Job, request_id: str, deadline: float, caller: Caller) -> tuple[Job, list[Turn]]:
        """Admit a request's images by its own plan, or a fallback if that is late or the server loaded.

        Raises:
            APIError: they would be late by all of them.
        """
        jobs = (asked, *asked.fallbacks)
        try:
            index, turns = self._admission.admit_first(
                [job.routes(request_id, deadline) for job in jobs],
                Flow(asked.priority, tenant=caller.key_id, size=asked.size),
                within_s=deadline - time.time(),
                soon_s=self._settings.fallback_wait_s,
            )
        except Late as late:
            raise self._admission.refuse(late, asked.n, asked.size, asked.timeout_s) from late
        return jobs[index], turns

    async def _events(
        self, job: Job, turn: Turn, tell: Callable[[int], object] | None = None
    ) -> AsyncGenerator[Partial | DecodedImage]:
        """Yield what the router does, once it is the image's turn; for `tell` see `Router.generate`."""
        try:
            async with turn, aclosing(self._router.generate(turn.route, tell)) as events:
                async for event in events:
                    image = event.image if isinstance(event, Partial) else event
                    await self._moderation.check_image(image.data, job.prompt)
                    yield event
        except Late as late:
            raise self._admission.refuse(late, 1, job.size, job.timeout_s) from late

    async def _make_job(
        self, job: Job, request_id: str, deadline: float, progress: Progress, caller: Caller
    ) -> list[DecodedImage]:
        """Make a job's images, in order, and note how far they are. Raises APIError."""
        async with self.access.making(caller, request_id, deadline):
            admitted, turns = self._admit(job, request_id, deadline, caller)
            return await self._make(admitted, turns, progress)

    async def _make(self, job: Job, turns: list[Turn], progress: Progress | None = None) -> list[DecodedImage]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._last(job, turn, progress)) for turn in turns]
        except ExceptionGroup as errors:
            raise APIError.from_failure(errors) from errors
        finally:
            for turn in turns:  # a task that was cancelled before it began has not entered its own
                turn.end()
        return [task.result() for task in tasks]

    async def _last(self, job: Job, turn: Turn, progress: Progress | None) -> DecodedImage:
        tell = partial(progress.note_step, turn.route.image.image_index) if progress else None
        async with aclosing(self._events(job, turn, tell)) as events:
            async for event in events:
                if isinstance(event, DecodedImage):
                    if progress:
                        progress.note_image()
                    return event
        raise RuntimeError("the router ended without an image")

    async def _stream(self, job: Job, turn: Turn, settle: Settle, stack: AsyncExitStack) -> AsyncIterator[str]:
        """Yield server-sent events; an error after the headers is an event too. The stack is closed at the end."""
        async with stack:
            try:
                async with aclosing(self._events(job, turn)) as events:
                    async for event in events:
                        order = event.order if isinstance(event, Partial) else None
                        image = event.image if isinstance(event, Partial) else event
                        if order is None:
                            await settle([evaluations(image)])
                        data = stream_event(job, image, order)
                        yield f"event: {data['type']}\ndata: {json.dumps(data)}\n\n"
            except Exception as error:
                tracing.fail(trace.get_current_span(), error)
                yield f"event: error\ndata: {json.dumps(APIError.from_failure(error).body)}\n\n"
