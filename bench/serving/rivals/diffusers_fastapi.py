"""Diffusers' pipeline behind FastAPI, after diffusers' guide "Create a server".

As in the guide, all requests share one pipeline, each has its own scheduler (`from_pipe`), and they run in the default
executor.

`RIVAL_MODEL=configs/scenes.yaml uvicorn bench.serving.rivals.diffusers_fastapi:app`
"""

from __future__ import annotations

import asyncio
import base64
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImagePipeline
from fastapi import FastAPI
from pydantic import BaseModel

from stages.config import ModelConfig
from stages.image import parse_size

app = FastAPI()
config = ModelConfig.read(Path(os.environ["RIVAL_MODEL"]))
(base,) = config.plan("base").stages
shared = QwenImagePipeline.from_pretrained(config.source, dtype=torch.float32)


class Body(BaseModel):
    """Body of a request; the fields are those of this engine's API."""

    prompt: str
    negative_prompt: str = " "
    seed: int = 0
    size: str = config.sizes[0]


@app.get("/readyz")
def ready() -> dict[str, str]:
    """Answer a readiness probe."""
    return {"status": "ready"}


@app.post("/v1/images/generations")
async def generate(body: Body) -> dict[str, Any]:
    """Generate one image by the base plan, as a base64-encoded PNG."""
    scheduler = shared.scheduler.from_config(shared.scheduler.config)
    pipeline = QwenImagePipeline.from_pipe(shared, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    width, height = parse_size(body.size)

    def work() -> bytes:
        image = pipeline(
            prompt=body.prompt,
            negative_prompt=body.negative_prompt,
            width=width,
            height=height,
            num_inference_steps=base.steps,
            true_cfg_scale=base.guidance_scale,
            generator=torch.Generator().manual_seed(body.seed),
        ).images[0]
        buffer = BytesIO()
        image.save(buffer, format="png")
        return buffer.getvalue()

    data = await asyncio.get_running_loop().run_in_executor(None, work)
    return {"data": [{"b64_json": base64.b64encode(data).decode()}]}
