"""One Ray Serve deployment that holds the whole model, after Ray Serve's example "Serve a Stable Diffusion model".

As in the example, a FastAPI ingress calls a model deployment, one of whose methods generates one image. It runs one of
this engine's plans by the same code in one process, so that only the serving differs.

`serve run bench.serving.rivals.monolithic_serve:build model=configs/scenes.yaml plan=hybrid`
"""

import base64
from pathlib import Path
from threading import Lock
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from backends import get_backend
from stages.config import ModelConfig
from stages.decode import to_file
from stages.pipeline import Pipeline

app = FastAPI()


class Body(BaseModel):
    """Body of a request; the fields are those of this engine's API."""

    prompt: str
    negative_prompt: str | None = None
    seed: int = 0
    size: str | None = None


@serve.ingress(app)
class APIIngress:
    """The HTTP interface of the model deployment."""

    def __init__(self, model: DeploymentHandle) -> None:
        self._model = model

    @app.get("/readyz")
    async def ready(self) -> dict[str, str]:
        """Answer a readiness probe."""
        return {"status": "ready"}

    @app.post("/v1/images/generations")
    async def generate(self, body: Body) -> dict[str, Any]:
        """Generate one image, as a base64-encoded PNG."""
        data = await self._model.generate.remote(body.prompt, body.negative_prompt, body.seed, body.size)
        return {"data": [{"b64_json": base64.b64encode(data).decode()}]}


class Model:
    """The deployment that holds the model and generates one image at a time."""

    def __init__(self, model: str, plan: str) -> None:
        self._pipeline = Pipeline(ModelConfig.read(Path(model)), get_backend("cpu"))
        self._plan = plan
        self._device = Lock()  # Serve calls synchronous methods from several threads

    def generate(self, prompt: str, negative_prompt: str | None, seed: int, size: str | None) -> bytes:
        """Generate one image as a PNG file."""
        with self._device:
            (result,) = self._pipeline.run(self._plan, prompt, negative_prompt=negative_prompt, seeds=[seed], size=size)
        return to_file(result.image, "png")


class Arguments(BaseModel):
    """Arguments of the application.

    Attributes:
        model: path of the model's config.
        plan: name of one of its plans.
    """

    model: str
    plan: str


def build(arguments: Arguments) -> Application:
    """Build the application for `serve run`."""
    model = serve.deployment(Model).options(max_ongoing_requests=64).bind(arguments.model, arguments.plan)
    return serve.deployment(APIIngress).bind(model)
