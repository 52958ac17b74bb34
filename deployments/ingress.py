"""HTTP in, images out."""

# Annotations must be evaluated here: FastAPI reads those of the methods, which Serve has moved by then.
import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve.context import _get_serve_request_context
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from deployments.decode import DecodedImage
from deployments.encode import ImageRequest
from deployments.front import Front
from deployments.images_api import APIError, ImagesRequest, images_response, stream_event
from deployments.route import Route
from deployments.router import Partial, Router, cause
from deployments.settings import Settings
from stages.encode import PromptTooLong, negative_for
from stages.finite import NotFinite
from stages.noise import MAX_SEED
from stages.plan import Plan
from stages.vocabulary import prompt_warnings

logger = logging.getLogger("ray.serve")
app = FastAPI(title="Images", description="Text-to-image generation through base, bridge and distilled stages.")
app.add_middleware(Front)  # where Serve's proxy has none, probes get here


@app.exception_handler(APIError)
async def _answer(request: Request, error: APIError) -> JSONResponse:
    return JSONResponse(error.body, error.status, {"Retry-After": "1"} if error.status == 503 else None)


@app.exception_handler(RequestValidationError)
async def _answer_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    return await _answer(request, APIError.from_validation(error.errors()))


@app.exception_handler(HTTPException)
async def _answer_unrouted(request: Request, error: HTTPException) -> JSONResponse:
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    return await _answer(request, APIError(error.status_code, code, f"{request.url.path}: {error.detail}"))


def _to_api_error(error: BaseException) -> APIError:
    """What a client is told of a failure; the log has the rest."""
    error = cause(error)
    if isinstance(error, APIError):
        return error
    if isinstance(error, PromptTooLong):
        return APIError(400, "prompt_too_long", str(error), error.parameter)
    if isinstance(error, BackPressureError):
        return APIError(503, "overloaded", "all queues are full; try again later")
    if isinstance(error, TimeoutError):
        return APIError(504, "deadline_exceeded", "not done in the time that a request may take")
    if isinstance(error, NotFinite):
        logger.error(str(error))
        return APIError(500, "not_finite", str(error))
    logger.error("request failed", exc_info=error)
    return APIError(500, "internal_error", "the request failed; the server's log has the reason")


@serve.ingress(app)
class Ingress:
    """Checks requests, sends each image through its stages, and speaks the OpenAI Images API."""

    def __init__(self, settings: Settings, replicas: dict[str, DeploymentHandle]) -> None:
        self._settings = settings
        self._model = settings.read_model()
        self._blocks = self._model.read_transformer()["num_layers"]
        deployments = {stage: name for name, placement in settings.placement.items() for stage in placement.stages}
        # In this process: a deployment of its own would be one more call, and what it does is to wait.
        self._router = Router(replicas, deployments)

    @app.post("/v1/images/generations")
    async def generate(self, body: ImagesRequest) -> Response:
        """Generate `n` images of a prompt."""
        plan, size, routes = self._route(body)
        if body.stream:
            return StreamingResponse(self._stream(body, size, routes[0]), media_type="text/event-stream")
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._last(route)) for route in routes]
        except Exception as error:
            raise _to_api_error(error) from error
        return JSONResponse(images_response(body, plan, size, [task.result() for task in tasks]) | self._warnings(body))

    @app.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """The model that is served, with the sizes that it draws."""
        model = {"id": self._model.name, "object": "model", "created": 0, "owned_by": "local"}
        return {"object": "list", "data": [{**model, "sizes": self._model.sizes}]}

    @app.get("/v1/plans")
    async def plans(self) -> dict[str, Any]:
        """The model's plans, which a request may name."""
        data = [{"nfe": plan.nfe, **plan.model_dump(mode="json")} for plan in self._model.plans.values()]
        return {"object": "list", "data": data, "default": self._settings.default_plan}

    def _route(self, body: ImagesRequest) -> tuple[Plan, str, list[Route]]:
        """Resolve names and defaults; raises APIError that names the field and what it may be."""
        if body.model not in (None, self._model.name):
            raise APIError(404, "model_not_found", f"model must be {self._model.name!r}, not {body.model!r}", "model")
        if body.n > self._settings.max_images:
            raise APIError(400, "invalid_value", f"n must be 1 to {self._settings.max_images}, not {body.n}", "n")
        if body.stream and body.n > 1:
            raise APIError(400, "invalid_value", f"n must be 1 with stream, not {body.n}", "n")
        if body.partial_images and not body.stream:
            raise APIError(400, "invalid_value", "partial_images needs stream", "partial_images")
        size = self._model.sizes[0] if body.size == "auto" else body.size
        if size not in self._model.sizes:
            allowed = ", ".join(("auto", *self._model.sizes))
            raise APIError(400, "invalid_value", f"size must be one of {allowed}, not {size!r}", "size")
        plan = self._plan(body)
        seed = secrets.randbelow(MAX_SEED - body.n + 2) if body.seed is None else body.seed
        if seed + body.n - 1 > MAX_SEED:
            raise APIError(
                400, "invalid_value", f"seed must be at most {MAX_SEED - body.n + 1} for {body.n} images", "seed"
            )
        request_id = _get_serve_request_context().request_id
        deadline = time.time() + self._settings.request_timeout_s
        negative = negative_for(plan, body.negative_prompt)
        logger.info(f"{body.n} of {size} by plan {plan.name}, seed {seed}, user {body.user}")
        return (
            plan,
            size,
            [
                Route(
                    image=ImageRequest(request_id, index, seed + index, size, body.prompt, negative),
                    plan=plan,
                    format=body.output_format,
                    quality=body.output_compression,
                    partial_images=body.partial_images,
                    deadline=deadline,
                )
                for index in range(body.n)
            ],
        )

    def _plan(self, body: ImagesRequest) -> Plan:
        if isinstance(body.plan, Plan):
            try:
                body.plan.check_blocks(self._blocks)
                plan = body.plan.with_adapters(self._model.adapters)
            except ValueError as error:
                raise APIError(400, "invalid_value", f"plan.{error}", "plan") from error
        else:
            name = body.plan or self._settings.default_plan
            if name not in self._model.plans:
                allowed = ", ".join(self._model.plans)
                raise APIError(400, "invalid_value", f"plan must be one of {allowed}, or stages, not {name!r}", "plan")
            plan = self._model.plans[name]
        if body.guidance_scale is None:
            return plan
        try:
            return plan.with_guidance(body.guidance_scale)
        except ValueError as error:
            raise APIError(400, "invalid_value", str(error), "guidance_scale") from error

    def _warnings(self, body: ImagesRequest) -> dict[str, list[str]]:
        """What an answer says of the request beside its images, where there is something."""
        warnings = prompt_warnings(body.prompt, body.negative_prompt, self._model.vocabulary)
        return {"warnings": warnings} if warnings else {}

    async def _last(self, route: Route) -> DecodedImage:
        async with aclosing(self._router.generate(route)) as events:
            async for event in events:
                if isinstance(event, DecodedImage):
                    return event
        raise RuntimeError("the router ended without an image")

    async def _stream(self, body: ImagesRequest, size: str, route: Route) -> AsyncIterator[str]:
        """Server-sent events; an error that comes after the headers is an event too."""
        try:
            async with aclosing(self._router.generate(route)) as events:
                async for event in events:
                    partial = event.order if isinstance(event, Partial) else None
                    image = event.image if isinstance(event, Partial) else event
                    data = stream_event(body, size, image, partial)
                    if partial is None:
                        data |= self._warnings(body)
                    yield f"event: {data['type']}\ndata: {json.dumps(data)}\n\n"
        except Exception as error:
            yield f"event: error\ndata: {json.dumps(_to_api_error(error).body)}\n\n"
