"""What tests of jobs share: jobs to keep, and images without a model."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

from deployments.access.access import Caller
from deployments.http.resolve import Job
from deployments.jobs.progress import Progress
from deployments.jobs.store import ImageJob
from deployments.messages import ImageReply
from deployments.router import DecodedImage
from stages.spans import Span

PROMPT = "a secret ring"
REQUEST = f'{{"prompt": "{PROMPT}", "seed": 7, "size": "128x128", "plan": "hybrid"}}'


def new_job(**fields: Any) -> ImageJob:
    """A job that is not kept yet."""
    made = {"id": f"imgjob_{secrets.token_hex(4)}", "created_at": 1.0, "request": REQUEST, "request_hash": "h"}
    return ImageJob(**{**made, **fields})


@dataclass
class Deployments:
    """Stands in for the stages: each image's file says its seed and size.

    Attributes:
        errors: what the next requests end with, before they are done.
        began: ids of the requests that came.
    """

    errors: list[Exception] = field(default_factory=list)
    began: list[str] = field(default_factory=list)

    async def make(
        self, job: Job, request_id: str, deadline: float, progress: Progress, caller: Caller
    ) -> list[DecodedImage]:
        self.began.append(request_id)
        if self.errors:
            raise self.errors.pop(0)
        images = []
        for route in job.routes(request_id, deadline):
            index, seed = route.image.image_index, route.image.seed
            for step in range(sum(stage.steps for stage in job.plan.stages) + 1):
                progress.note_step(index, step)
            spans = (Span("base", 1.0, 2.0, 30),)
            reply = ImageReply(index=index, seed=seed, text_tokens=1, image_tokens=64, spans=spans)
            images.append(DecodedImage(reply, f"{job.size} of seed {seed}".encode()))
            progress.note_image()
        return images
