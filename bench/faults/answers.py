"""Load whose every answer is kept, and what answers amount to."""

from __future__ import annotations

import asyncio
import base64
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any

import httpx
import numpy as np
from PIL import Image

from bench.serving.load import connected
from bench.serving.traffic import body, mixed, vary
from scenes.cases import DEV, Cases

_SPARE_S = 30.0  # beyond a request's own time, after which it counts as unanswered
_SAME = 3  # largest difference of a channel of 8 bits between images of one seed: other batches sum in another order


@dataclass(frozen=True)
class Answer:
    """What a request got.

    Attributes:
        number: place of the request among those that were sent, and its image's seed.
        sent, end: when it was due and when it was answered, in seconds of the monotonic clock.
        status: HTTP status, or 0 if the connection broke or nothing came in time.
        error: code of the API's error, or what happened to the connection; None for an image.
        message: the error's message.
        image: the image's file; empty for an error.
        retry_after_s: seconds after which it may be sent again, if the answer says so.
    """

    number: int
    sent: float
    end: float
    status: int
    error: str | None = None
    message: str = ""
    image: bytes = b""
    retry_after_s: float | None = None

    @property
    def latency(self) -> float:
        return self.end - self.sent


@dataclass(frozen=True)
class Figures:
    """Figures of a run.

    Attributes:
        answers: number of answers by status and, of an error, its code.
        p50, p99, longest: of the images' latencies, in seconds.
        gap: longest time in seconds without an image, while requests waited.
    """

    answers: dict[str, int]
    p50: float
    p99: float
    longest: float
    gap: float

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Figures:
        """Summarise answers; raises ValueError if none has an image."""
        images = [answer for answer in answers if answer.status == 200]
        if not images:
            raise ValueError(f"no image: {counts(answers)}")
        latencies = [answer.latency for answer in images]
        p50, p99 = (float(value) for value in np.percentile(latencies, [50, 99]))
        ends = [min(answer.sent for answer in answers), *sorted(answer.end for answer in images)]
        gap = max(
            end - max(begin, min((answer.sent for answer in answers if begin < answer.end), default=end))
            for begin, end in itertools.pairwise(ends)
        )
        return cls(counts(answers), p50, p99, max(latencies), gap)

    def rounded(self) -> dict[str, Any]:
        """Return the figures for a file of results."""
        return {key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(self).items()}


def counts(answers: Sequence[Answer]) -> dict[str, int]:
    """Count answers by status and code."""
    return dict(
        Counter(f"{answer.status} {answer.error}" if answer.error else str(answer.status) for answer in answers)
    )


def requests(timeout_s: float) -> Iterator[dict[str, Any]]:
    """Yield bodies of requests without end, each of another seed: two of three by the hybrid plan, others distilled.

    Args:
        timeout_s: seconds that each may take.
    """
    bodies = vary([body(case) for case in mixed(Cases.read(DEV))], ["128x128"])
    for number, made in enumerate(itertools.cycle(bodies)):
        yield {**made, "seed": number, "timeout_s": timeout_s}


async def ask(client: httpx.AsyncClient, number: int, request: dict[str, Any], sent: float | None = None) -> Answer:
    """Send a request, which was due at `sent` or now."""
    sent = time.monotonic() if sent is None else sent
    try:
        async with asyncio.timeout(request["timeout_s"] + _SPARE_S):
            answer = await client.post("/v1/images/generations", json=request)
    except (httpx.HTTPError, TimeoutError) as failure:
        return Answer(number, sent, time.monotonic(), 0, type(failure).__name__, str(failure))
    end = time.monotonic()
    if answer.status_code != 200:
        wait = answer.headers.get("retry-after")
        error = answer.json()["error"]
        after = float(wait) if wait else None
        return Answer(number, sent, end, answer.status_code, error["code"], error["message"], retry_after_s=after)
    return Answer(number, sent, end, 200, image=base64.b64decode(answer.json()["data"][0]["b64_json"]))


async def steadily(url: str, sent: Sequence[dict[str, Any]], rate: float) -> list[Answer]:
    """Send requests, `rate` of them a second, without waiting for answers."""
    async with connected(url) as client:
        start = time.monotonic()

        async def one(number: int, request: dict[str, Any]) -> Answer:
            due = start + number / rate
            await asyncio.sleep(due - time.monotonic())
            return await ask(client, number, request, due)

        return list(await asyncio.gather(*(one(number, request) for number, request in enumerate(sent))))


def lost(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Describe the answers without an image."""
    return [
        {"number": answer.number, "status": answer.status, "error": answer.error, "message": answer.message}
        for answer in answers
        if answer.status != 200
    ]


def different(answers: Sequence[Answer], expected: Sequence[Answer]) -> list[int]:
    """List the numbers of the answers whose image is another than that of the same number, beyond rounding."""
    images = {answer.number: answer.image for answer in expected}
    return [
        answer.number
        for answer in answers
        if answer.image and np.abs(_pixels(answer.image) - _pixels(images[answer.number])).max() > _SAME
    ]


def _pixels(file: bytes) -> np.ndarray:
    with Image.open(BytesIO(file)) as image:
        return np.asarray(image.convert("RGB")).astype(int)
