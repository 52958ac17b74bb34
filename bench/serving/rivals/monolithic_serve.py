"""One Ray Serve deployment that holds the whole model, after Ray Serve's example "Serve a Stable Diffusion model".

As there: a FastAPI ingress and a model deployment whose method makes one image. It runs a plan of this engine's, by
the same code in one process, so that the only difference is how it is served.

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
    prompt: str
    negative_prompt: str | None = None
    seed: int = 0
    size: str | None = None


@serve.ingress(app)
class APIIngress:
    def __init__(self, model: DeploymentHandle) -> None:
        self._model = model

    @app.get("/readyz")
    async def ready(self) -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/v1/images/generations")
    async def generate(self, body: Body) -> dict[str, Any]:
        data = await self._model.generate.remote(body.prompt, body.negative_prompt, body.seed, body.size)
        return {"data": [{"b64_json": base64.b64encode(data).decode()}]}


class Model:
    def __init__(self, model: str, plan: str) -> None:
        self._pipeline = Pipeline(ModelConfig.read(Path(model)), get_backend("cpu"))
        self._plan = plan
        self._device = Lock()  # Serve calls a method that is not async from several threads

    def generate(self, prompt: str, negative_prompt: str | None, seed: int, size: str | None) -> bytes:
        with self._device:
            (result,) = self._pipeline.run(self._plan, prompt, negative_prompt=negative_prompt, seeds=[seed], size=size)
        return to_file(result.image, "png")


class Arguments(BaseModel):
    model: str
    plan: str


def build(arguments: Arguments) -> Application:
    model = serve.deployment(Model).options(max_ongoing_requests=64).bind(arguments.model, arguments.plan)
    return serve.deployment(APIIngress).bind(model)
