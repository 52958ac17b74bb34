"""The running server, as clients that others wrote speak to it."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent, ImagesResponse, Model
from PIL import Image
from served import images_of, pixels

CLIENTS = Path(__file__).parent / "clients"
PROMPT = "a red star"
DISTILLED = {"plan": "distilled", "seed": 5}


def run(*command: str | Path) -> dict[str, Any]:
    """What a client prints, as JSON."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


@pytest.fixture(scope="module")
def node() -> str:
    """The program; where it is not installed, skip, but in CI."""
    program = shutil.which("node")
    if program is None and "CI" not in os.environ:
        pytest.skip("node is not installed, which the JavaScript clients need")
    assert program
    return program


def post(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/images/generations", json=body, timeout=120)


def events_of(url: str, **body: Any) -> list[tuple[str, bytes]]:
    """Names and data of the server-sent events of a request."""
    text = post(url, stream=True, **body).raise_for_status().text
    pairs = [event.split("\n") for event in text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), data.removeprefix("data: ").encode()) for name, data in pairs]


def test_answers_validate_strictly_against_openais_types(url: str) -> None:
    answer = post(url, prompt=PROMPT, n=2, **DISTILLED)
    response = ImagesResponse.model_validate_json(answer.content, strict=True)
    assert response.usage is not None
    assert response.usage.input_tokens == response.usage.input_tokens_details.text_tokens == 3
    assert response.usage.output_tokens == 2 * (128 // 16) ** 2  # tokens of 16x16 pixels
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert (response.size, response.output_format, response.background) == ("128x128", "png", "opaque")
    longer = post(url, prompt=PROMPT, negative_prompt="a blue ring", plan="hybrid").json()
    assert longer["usage"]["input_tokens"] == 6


def test_events_validate_strictly_against_openais_types(url: str) -> None:
    *partial, (name, data) = events_of(url, prompt=PROMPT, partial_images=3, **DISTILLED)
    assert [kind for kind, _ in partial] == ["image_generation.partial_image"] * 3
    for index, (_, event) in enumerate(partial):
        assert ImageGenPartialImageEvent.model_validate_json(event, strict=True).partial_image_index == index
    assert name == "image_generation.completed"
    completed = ImageGenCompletedEvent.model_validate_json(data, strict=True)
    assert (completed.usage.input_tokens, completed.usage.output_tokens) == (3, 64)


def test_models_validate_strictly_against_openais_types(url: str, client: OpenAI) -> None:
    listed = httpx.get(f"{url}/v1/models", timeout=10).json()
    (model,) = listed["data"]
    assert listed["object"] == "list"
    assert Model.model_validate(model, strict=True).created > 0
    assert client.models.retrieve("scenes") == client.models.list().data[0]
    with pytest.raises(NotFoundError, match="model must be 'scenes'") as caught:
        client.models.retrieve("org/other")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("plan", "work"),
    [
        ("distilled", {0: [4], 1: [2, 4], 3: [1, 2, 3, 4]}),
        ("hybrid", {0: [7], 1: [4, 7], 3: [1, 4, 5, 7]}),  # of six steps, the second of two evaluations
    ],
)
def test_previews_come_at_equal_shares_of_the_steps_and_leave_the_image(
    client: OpenAI, plan: str, work: dict[int, list[int]]
) -> None:
    extra = {"plan": plan, "seed": 5}
    (image,) = images_of(client.images.generate(prompt=PROMPT, extra_body=extra))
    whole = pixels(image)
    for asked, evaluations in work.items():
        stream = client.images.generate(prompt=PROMPT, stream=True, partial_images=asked, extra_body=extra)
        events = list(stream)
        assert [event.type.rpartition(".")[2] for event in events] == ["partial_image"] * asked + ["completed"]
        assert [event.model_dump()["nfe"] for event in events] == evaluations
        assert np.abs(pixels(events[-1]) - whole).max() <= 1
        assert all(np.abs(pixels(event) - whole).max() > 5 for event in events[:-1])


def test_openais_client_for_node(url: str, node: str) -> None:
    said = run(node, CLIENTS / "openai_client.mjs", url)
    assert [pixels(image).shape for image in said["whole"]["data"]] == [(128, 128, 3)] * 2
    assert said["whole"]["usage"]["input_tokens"] == 3
    kinds = [event["type"].rpartition(".")[2] for event in said["events"]]
    assert kinds == ["partial_image", "partial_image", "completed"]
    assert np.abs(pixels(said["events"][-1]) - pixels(said["whole"]["data"][0])).max() <= 1
    assert said["model"]["id"] == "scenes"
    assert said["refusals"] == [
        {"class": "BadRequestError", "status": 400, "param": "background", "code": "invalid_value"},
        {"class": "NotFoundError", "status": 404, "param": "model", "code": "model_not_found"},
    ]


def test_vercels_ai_sdk(url: str, node: str) -> None:
    said = run(node, CLIENTS / "ai_sdk.mjs", url)
    assert [image["mediaType"] for image in said["images"]] == ["image/png"] * 2
    assert all(pixels({"b64_json": image["base64"]}).shape == (128, 128, 3) for image in said["images"])
    assert said["warnings"] == []
    assert said["refusal"]["status"] == 400
    assert said["refusal"]["message"].startswith("size must be one of auto, 128x128")


def test_litellm(url: str) -> None:
    said = run(CLIENTS / ".venv" / "bin" / "python", CLIENTS / "litellm_client.py", url)
    assert [pixels(image).shape for image in said["made"]["data"]] == [(128, 128, 3)] * 2
    assert said["made"]["usage"]["output_tokens"] == 128
    assert (said["refusal"]["class"], said["refusal"]["status"]) == ("BadRequestError", 400)
    assert "size must be one of auto, 128x128" in said["refusal"]["message"]


# Bodies as these projects build them, with this server's model and sizes filled in as their users configure them.
BODIES: dict[str, dict[str, str | int | None]] = {
    # LibreChat, api/app/clients/tools/structured/OpenAIImageTools.js: its defaults; what is undefined is left out.
    "LibreChat": {"model": "scenes", "prompt": PROMPT, "n": 1, "background": "auto", "output_format": "png",
                  "quality": "auto", "size": "auto"},
    "LibreChat, webp": {"model": "scenes", "prompt": PROMPT, "n": 1, "background": "auto", "output_format": "webp",
                        "output_compression": 100, "quality": "auto", "size": "auto"},
    # LibreChat, api/app/clients/tools/structured/DALLE3.js: its style is the tool's default.
    "LibreChat, DALL-E": {"model": "scenes", "prompt": PROMPT, "quality": "standard", "style": "vivid",
                          "size": "128x128", "n": 1},
    # Open WebUI, backend/open_webui/routers/images.py, image_generations.
    "Open WebUI": {"model": "scenes", "prompt": PROMPT, "n": 1, "size": "128x128", "response_format": "b64_json"},
    # Dify, tools/openai/tools/gpt_image_generate.py of its official plugins: what differs from a default is sent.
    "Dify": {"model": "scenes", "prompt": PROMPT, "n": 2},
    "Dify, everything": {"model": "scenes", "prompt": PROMPT, "background": "opaque", "output_format": "jpeg",
                         "output_compression": 0, "moderation": "low", "n": 1},
    # LangChain, langchain_community/utilities/dalle_image_generator.py, DallEAPIWrapper.run.
    "LangChain": {"prompt": PROMPT, "n": 1, "size": "128x128", "model": "scenes", "quality": "standard"},
    # What typed clients make of fields that their users left alone.
    "nulls": {"model": "scenes", "prompt": PROMPT, "n": None, "size": None, "stream": None, "response_format": None,
              "output_format": None, "output_compression": None, "partial_images": None, "quality": None,
              "style": None, "background": None, "moderation": None, "user": None, "safety_identifier": None},
}  # fmt: skip


@pytest.mark.parametrize("project", BODIES)
def test_bodies_that_other_projects_send(url: str, project: str) -> None:
    body = BODIES[project]
    answer = post(url, **body)
    assert answer.status_code == 200, answer.text
    images = images_of(ImagesResponse.model_validate_json(answer.content, strict=True))
    assert len(images) == (body["n"] or 1)
    for image in images:
        assert image.b64_json is not None
        kind = Image.open(BytesIO(base64.b64decode(image.b64_json))).format
        assert kind == str(body.get("output_format") or "png").upper()


def test_what_they_send_and_this_engine_cannot_do_is_refused_by_name(client: OpenAI) -> None:
    asked: list[dict[str, Any]] = [{"background": "transparent"}, {"quality": "hd"}, {"response_format": "url"}]
    for body in asked:
        (field,) = body
        with pytest.raises(BadRequestError) as caught:
            client.images.generate(prompt=PROMPT, **body)
        assert caught.value.param == field
